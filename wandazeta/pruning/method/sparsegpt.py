"""SparseGPT: prune column by column, and adjust the later columns to compensate for the error (arXiv 2301.00774)."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from wandazeta.pruning.method.masks import OneGroup, zero_where_false
from wandazeta.pruning.pattern import SparsityPattern, num_pruned
from wandazeta.utilities.triton_kernels import load_kernels

_KERNEL = "wandazeta.pruning.method.sparsegpt_kernel"

# columns for which an unstructured mask is chosen at once, as in the paper
_MASK_BLOCK = 128
# below this number of columns a loop is faster than another split
_LEAF = 8


def sparsegpt(
    weights: Sequence[Tensor], gram: Tensor, pattern: SparsityPattern, damping: float = 0.01
) -> list[tuple[Tensor, Tensor]]:
    """Prune the weights of layers that share an input, and solve for the weights that are kept.

    The columns are split in halves recursively, so that most of the error is passed to later columns by large matrix
    products; only within a leaf of a few columns is it passed on column by column. On a GPU such a leaf has up to 128
    columns and is a single kernel, where Triton can be used.

    Args:
        weights: Weights, each of shape (out, in).
        gram: Σxxᵀ of the layers' inputs, shape (in, in); its scale does not matter.
        pattern: The sparsity pattern. Unstructured masks are chosen for blocks of columns, as in the paper: the zeros
            of a block are distributed freely over the rows of a weight.
        damping: Added to the diagonal, as a fraction of its mean.

    Returns:
        For each weight its new values in float32, and the mask of the weights that are kept; both of shape (out, in).

    Raises:
        ValueError: If the Gram matrix is not finite or cannot be inverted.
    """
    solver = _Solver(weights, gram, pattern, damping)
    solver.solve(0, len(gram))
    zero_where_false(solver.columns, solver.kept)
    results = zip(solver.columns.split(solver.sizes, dim=1), solver.kept.split(solver.sizes, dim=1), strict=True)
    return [(columns.t().contiguous(), kept.t().contiguous()) for columns, kept in results]


class _Solver:
    """State of the recursion; matrices are transposed, so that a column of weights is contiguous."""

    def __init__(self, weights: Sequence[Tensor], gram: Tensor, pattern: SparsityPattern, damping: float) -> None:
        self.pattern = pattern
        self.sizes = [len(weight) for weight in weights]
        self.columns = torch.cat([weight.detach().float().t() for weight in weights], dim=1)
        self.kept = torch.ones_like(self.columns, dtype=torch.bool)
        self.errors = torch.zeros_like(self.columns)
        self.mask_size = pattern.group[1] if pattern.group is not None else _MASK_BLOCK
        self.group_mask = OneGroup(*pattern.group, gram.device) if pattern.group is not None else None
        self.kernel = _kernel(gram.device)
        # columns are split at multiples of this number, unless their mask was chosen already
        self.unit = self.mask_size
        if self.kernel is not None:
            self.unit *= max(1, self.kernel.BLOCK // self.mask_size)
        dead = gram.diagonal() == 0
        self.columns.masked_fill_(dead[:, None], 0.0)  # these inputs are always zero, so any value does
        self.factor = _inverse_factor(gram, dead, damping)

    def solve(self, start: int, stop: int, chosen: bool = False) -> None:
        """Prune the columns from `start` to `stop`, after the error of all earlier columns was passed on.

        Args:
            start: The first column.
            stop: The column after the last.
            chosen: Whether their mask was chosen already.
        """
        size = stop - start
        if not chosen and size <= self.mask_size:
            self._choose(start, stop)
            chosen = True
        if self.kernel is not None and size <= self.kernel.BLOCK:
            block = slice(start, stop)
            group = None if chosen else self.pattern.group
            self.kernel.eliminate(
                self.columns[block], self.errors[block], self.kept[block], self.factor[block, block], group
            )
            return
        if chosen and size <= _LEAF:
            for column in range(start, stop):
                self._eliminate(column, stop)
            return
        unit = 1 if chosen else self.unit
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
        # divisors of the errors: infinity, so no error, for weights that are kept
        self.errors[start:stop] = torch.where(self.kept[start:stop], torch.inf, diagonal)

    def _choose_block(self, start: int, stop: int, scores: Tensor) -> None:
        parts = zip(scores.split(self.sizes, dim=1), self.kept[start:stop].split(self.sizes, dim=1), strict=True)
        for part, kept in parts:
            lowest = part.flatten().sort(stable=True).indices[: num_pruned(part.numel(), self.pattern.target_sparsity)]
            kept.copy_(torch.ones_like(kept).flatten().index_fill_(0, lowest, False).view_as(kept))

    def _eliminate(self, column: int, stop: int) -> None:
        """Pass the error of a column's pruned weights on to the columns before `stop`."""
        error = self.errors[column]
        torch.div(self.columns[column], error, out=error)
        if column + 1 < stop:
            self.columns[column + 1 : stop].addr_(self.factor[column, column + 1 : stop], error, alpha=-1)


def _kernel(device: torch.device) -> ModuleType | None:
    """Return the module of the kernel if it runs on a device, else None."""
    if device.type != "cuda":
        return None
    return load_kernels(_KERNEL, device, "SparseGPT takes many times as long")


def _inverse_factor(gram: Tensor, dead: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix."""
    damped = gram.float().clone()
    damped.diagonal().masked_fill_(dead, 1.0)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(damped)
    if not bool((info == 0) & factor.diagonal().isfinite().all()):
        raise ValueError(
            "Expected calibration data whose Gram matrix can be inverted, but it cannot; calibrate on more samples, "
            "and check that the activations are finite"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
