"""Σx² of every pruned layer's input, read in passing from the forwards that run anyway."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class InputNorms:
    """Norms of the input features of layers, `‖X_j‖ = sqrt(mean over samples of the per-sample Σx²)`, as in Wanda.

    Args:
        layers: The layers, by name.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self._layers = dict(layers)
        self._mask: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._sums: dict[str, Tensor] = {}
        self.num_samples = 0

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Within this context every forward of a layer counts."""
        handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    @contextmanager
    def sample(self, mask: Tensor | None = None) -> Iterator[None]:
        """Within this context, inside `collect`, one sample goes through the block.

        Args:
            mask: Positions that count, bool of shape (1, tokens); None where all do.
        """
        self._mask = mask
        try:
            yield
        finally:
            # an activation kept here would outlive its graph
            self._last = None
        self.num_samples += 1

    def norm(self, name: str) -> Tensor:
        """Norm of each input feature of a layer.

        Args:
            name: The layer.

        Returns:
            Float32 of shape (in,).

        Raises:
            ValueError: If the layer did not run.
        """
        if name not in self._sums:
            raise ValueError(
                f"Expected every layer of the block to run on the calibration data, but `{name}` did not; "
                "add it to `exclude_modules` to leave it dense"
            )
        return (self._sums[name] / max(self.num_samples, 1)).sqrt().float()

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            squares = self._squares(name, args[0])
            if name in self._sums:
                self._sums[name] += squares
            else:
                self._sums[name] = squares.clone()

        return hook

    def _squares(self, name: str, x: Tensor) -> Tensor:
        # query, key and value see the very same tensor: square it once
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        rows = x.detach().reshape(-1, x.shape[-1])
        if self._mask is not None:
            if rows.shape[0] != self._mask.numel():
                raise ValueError(
                    f"Expected {self._mask.numel()} positions at the input of `{name}`, but got {rows.shape[0]}: "
                    "padding cannot be told from text there; calibrate on samples without padding, or exclude the layer"
                )
            rows = rows[self._mask.reshape(-1)]
        # float64 sums: the result does not depend on the order of many small terms
        squares = rows.float().square().sum(0).double()
        self._last = (x, squares)
        return squares
