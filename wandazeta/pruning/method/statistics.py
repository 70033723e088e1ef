"""What pruning needs to know of every layer's input, read in passing from the forwards that run anyway."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.models.blocks import StopForward
from wandazeta.pruning.method.layers import weight_view
from wandazeta.utilities.ranks import Ranks

# a mebibyte of float32
SQUARES_AT_ONCE = 2**18
GRAM_TILE = 512


class InputStatistics:
    """Sums over the inputs of layers: Σx² of every feature and, for SparseGPT, the Gram matrix Σxxᵀ.

    Args:
        layers: The layers, by name.
        with_gram: Whether to sum Gram matrices, too.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], with_gram: bool = False) -> None:
        self._layers = dict(layers)
        self._with_gram = with_gram
        self._mask: Tensor | None = None
        self._last: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._seen: list[str] = []
        self._stop_at: str | None = None
        # by the shape of the hidden states: the layer that runs last, None where one runs twice or not at all
        self._last_layers: dict[torch.Size, str | None] = {}
        self._sums: dict[str, Tensor] = {}
        self._grams: dict[str, Tensor] = {}
        self._earlier: dict[str, Tensor] = {}
        self.num_samples = 0

    def reset(self) -> None:
        """Forget all samples, but for the norms of layers that do not run again: an expert with few tokens may not."""
        self._earlier.update({name: self.norm(name) for name in self._sums})
        self._sums.clear()
        self._grams.clear()
        self.num_samples = 0

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Within this context every forward of a layer counts."""
        handles = [
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    @contextmanager
    def sample(
        self,
        mask: Tensor | None = None,
        num_samples: int = 1,
        shape: torch.Size | None = None,
        may_stop: bool = False,
    ) -> Iterator[None]:
        """Within this context, inside `collect`, samples go through the block in one batch.

        Args:
            mask: Positions that count, bool of shape (samples, tokens); None where all do.
            num_samples: How many samples the batch holds.
            shape: Shape of the hidden states.
            may_stop: The output is not wanted: where a whole forward on this shape has shown that every layer runs
                just once, this one ends before the last layer, and with it the context.
        """
        self._mask = mask
        self._seen = []
        self._stop_at = self._last_layers.get(shape) if shape is not None and may_stop else None
        try:
            yield
        except StopForward as signal:
            if signal.token is not self:
                raise
        else:
            if shape is not None:
                once = sorted(self._seen) == sorted(self._layers)
                self._last_layers[shape] = self._seen[-1] if once else None
        finally:
            # an activation kept here would outlive its graph
            self._last = None
            self._stop_at = None
        self.num_samples += num_samples

    def norm(self, name: str) -> Tensor:
        """Norm of each input feature, `‖X_j‖ = sqrt(mean over samples of the per-sample Σx²)`, as in Wanda.

        Args:
            name: The layer.

        Returns:
            Float32 of shape (in,).

        Raises:
            ValueError: If the layer never ran.
        """
        if name not in self._sums and name in self._earlier:
            return self._earlier[name]
        self._require(name)
        return (self._sums[name] / max(self.num_samples, 1)).sqrt().float()

    def groups(self) -> list[tuple[Tensor, list[str]]]:
        """Gram matrices, each with the layers that had this very input (query, key and value; gate and up).

        Returns:
            Pairs of a float32 matrix of shape (in, in), summed over all positions, and names.

        Raises:
            ValueError: If a layer did not run.
        """
        found: list[tuple[Tensor, list[str]]] = []
        for name in self._layers:
            self._require(name)
            gram = self._grams[name]
            group = next((names for other, names in found if torch.equal(other, gram)), None)
            if group is None:
                found.append((gram, [name]))
            else:
                group.append(name)
        return found

    def share(self, ranks: Ranks) -> None:
        """Adds up what all ranks have seen.

        Args:
            ranks: The ranks; each has collected its own samples since the last `reset`.
        """
        if ranks.size == 1:
            return
        for name, layer in self._layers.items():
            width = weight_view(layer).shape[1]
            ran = ranks.sum(float(name in self._sums))
            if not ran:
                continue
            device = layer.weight.device
            sums = self._sums.setdefault(name, torch.zeros(width, dtype=torch.float64, device=device))
            ranks.all_reduce_([sums])
            if self._with_gram:
                ranks.all_reduce_([self._grams.setdefault(name, torch.zeros(width, width, device=device))])
        self.num_samples = int(ranks.sum(self.num_samples))

    def leave_out_grams(self) -> None:
        """Free the Gram matrices, and sum none from now on."""
        self._with_gram = False
        self._grams.clear()

    def _require(self, name: str) -> None:
        if name not in self._sums:
            raise ValueError(
                f"Expected every layer of the block to run on the calibration data, but `{name}` did not; "
                "add it to `exclude_modules` to leave it dense"
            )

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            # query, key and value see the very same tensor: one product for all
            if self._last is None or self._last[0] is not x:
                self._last = (x, *self._products(name, x))
            _, squares, gram = self._last
            self._sums[name] = self._sums[name] + squares if name in self._sums else squares
            if gram is not None:
                self._grams.setdefault(name, torch.zeros_like(gram)).add_(gram)
            self._seen.append(name)
            # in another order than before, the last layer may come while others have yet to
            if name == self._stop_at and len(set(self._seen)) == len(self._layers):
                raise StopForward(self)

        return hook

    def _products(self, name: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = x.detach().reshape(-1, x.shape[-1])
        if self._mask is not None:
            if rows.shape[0] != self._mask.numel():
                raise ValueError(
                    f"Expected {self._mask.numel()} positions at the input of `{name}`, but got {rows.shape[0]}: "
                    "padding cannot be told from text there; calibrate on samples without padding, or exclude the layer"
                )
            rows = rows[self._mask.reshape(-1)]
        if not self._with_gram:
            return _square_sums(rows), None
        rows = rows.float()
        # not in the block's autocast: a Gram matrix rounded to bfloat16 has negative eigenvalues
        with torch.autocast(rows.device.type, enabled=False):
            return _square_sums(rows), _gram(rows)


def _square_sums(rows: Tensor) -> Tensor:
    """Σx² of every column, a piece at a time: fresh memory for all squares costs a CPU more than their sum."""
    pieces = rows.split(max(1, SQUARES_AT_ONCE // rows.shape[1])) if rows.device.type == "cpu" else (rows,)
    # float64 sums: the result does not depend on the order of many small terms
    return torch.stack([piece.float().square().sum(0).double() for piece in pieces]).sum(0)


def _gram(rows: Tensor) -> Tensor:
    """Σxxᵀ, tile by tile: those below the diagonal are those above it."""
    gram = rows.new_empty(rows.shape[1], rows.shape[1])
    starts = range(0, rows.shape[1], GRAM_TILE)
    for row, left in zip(starts, rows.split(GRAM_TILE, dim=1), strict=True):
        for column, right in zip(starts, rows.split(GRAM_TILE, dim=1), strict=True):
            if column >= row:
                tile = left.t() @ right
                gram[row : row + GRAM_TILE, column : column + GRAM_TILE] = tile
                gram[column : column + GRAM_TILE, row : row + GRAM_TILE] = tile.t()
    return gram
