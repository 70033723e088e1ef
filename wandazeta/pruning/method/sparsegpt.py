"""SparseGPT: prune column by column, and let the columns still to come make up for the error (arXiv 2301.00774)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wandazeta.pruning.method.masks import OneGroup, zero_where_false
from wandazeta.pruning.options import PruneOptions, num_pruned

# columns over which an unstructured mask is chosen at once, as in the paper
_MASK_BLOCK = 128
# below this many columns a loop over them beats splitting once more
_LEAF = 8


def sparsegpt(
    weights: Sequence[Tensor], gram: Tensor, options: PruneOptions, damping: float = 0.01
) -> list[tuple[Tensor, Tensor]]:
    """Prune the weights of layers that share an input, and solve for what is kept of them.

    The columns are split in halves again and again, so that most of the error goes to later columns in large matrix
    products; only within a leaf does it go from column to column.

    Args:
        weights: Shape (out, in) each.
        gram: Σxxᵀ of the layer's inputs, shape (in, in); only its directions matter, not its scale.
        options: Gives the pattern. Unstructured masks are chosen over whole blocks of columns, as in the paper, so
            that the rows of a weight share the zeros of a block.
        damping: Added to the diagonal, as a fraction of its mean.

    Returns:
        For each its new values in float32, and the mask of what is kept; both of shape (out, in).

    Raises:
        ValueError: If the Gram matrix is not finite or cannot be inverted.
    """
    solver = _Solver(weights, gram, options, damping)
    solver.solve(0, len(gram))
    zero_where_false(solver.columns, solver.kept)
    results = zip(solver.columns.split(solver.sizes, dim=1), solver.kept.split(solver.sizes, dim=1), strict=True)
    return [(columns.t().contiguous(), kept.t().contiguous()) for columns, kept in results]


class _Solver:
    """Columns are rows here, which makes each of them contiguous."""

    def __init__(self, weights: Sequence[Tensor], gram: Tensor, options: PruneOptions, damping: float) -> None:
        self.options = options
        self.sizes = [len(weight) for weight in weights]
        self.columns = torch.cat([weight.detach().float().t() for weight in weights], dim=1)
        self.kept = torch.ones_like(self.columns, dtype=torch.bool)
        self.errors = torch.zeros_like(self.columns)
        self.mask_size = options.group[1] if options.group is not None else _MASK_BLOCK
        self.group_mask = OneGroup(*options.group, gram.device) if options.group is not None else None
        dead = gram.diagonal() == 0
        self.columns[dead] = 0.0  # never seen: any value does
        self.factor = _inverse_factor(gram, dead, damping)

    def solve(self, start: int, stop: int, chosen: bool = False) -> None:
        """Prune the columns from `start` to `stop`, all earlier error being passed on already.

        Args:
            start: The first column.
            stop: The one after the last.
            chosen: Whether their mask is there.
        """
        size = stop - start
        if not chosen and size <= self.mask_size:
            self._choose(start, stop)
            chosen = True
        if chosen and size <= _LEAF:
            for column in range(start, stop):
                self._eliminate(column, stop)
            return
        unit = 1 if chosen else self.mask_size
        middle = start + max(unit, size // 2 // unit * unit)
        self.solve(start, middle, chosen)
        coupling = self.factor[start:middle, middle:stop]
        self.columns[middle:stop].addmm_(coupling.t(), self.errors[start:middle], alpha=-1)
        self.solve(middle, stop, chosen)

    def _choose(self, start: int, stop: int) -> None:
        diagonal = self.factor.diagonal()[start:stop, None]
        scores = (self.columns[start:stop] / diagonal).square()
        if self.group_mask is not None:
            self.kept[start:stop] = self.group_mask(scores)
        else:
            self._choose_block(start, stop, scores)
        # what an error is divided by: that of a weight that is kept is zero
        self.errors[start:stop] = torch.where(self.kept[start:stop], torch.inf, diagonal)

    def _choose_block(self, start: int, stop: int, scores: Tensor) -> None:
        parts = zip(scores.split(self.sizes, dim=1), self.kept[start:stop].split(self.sizes, dim=1), strict=True)
        for part, kept in parts:
            lowest = part.flatten().sort(stable=True).indices[: num_pruned(part.numel(), self.options.target_sparsity)]
            kept.copy_(torch.ones_like(kept).flatten().index_fill_(0, lowest, False).view_as(kept))

    def _eliminate(self, column: int, stop: int) -> None:
        """Pass the error of a column's pruned weights on to the columns before `stop`."""
        error = self.errors[column]
        torch.div(self.columns[column], error, out=error)
        if column + 1 < stop:
            self.columns[column + 1 : stop].addr_(self.factor[column, column + 1 : stop], error, alpha=-1)


def _inverse_factor(gram: Tensor, dead: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Gram matrix."""
    damped = gram.float().clone()
    damped.diagonal()[dead] = 1.0
    damped.diagonal().add_(damping * damped.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0 or not bool(torch.isfinite(factor.diagonal()).all()):
        raise ValueError(
            "Expected calibration data whose Gram matrix can be inverted, but it cannot; calibrate on more samples, "
            "and check that the activations are finite"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
