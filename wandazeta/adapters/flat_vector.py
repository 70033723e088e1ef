"""All adapters of a model in one flat vector.

Legend: P perturbed copies of the vector, d its length, D features, C outputs of a trained Linear.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from math import prod
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from typing_extensions import override

from wandazeta.adapters.trained_vector import TrainedVector
from wandazeta.utilities.random_streams import Direction, Directions, directions_of_step


class Matrices(Protocol):
    """The adapter of one site, ready to be applied."""

    def apply(self, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        """Apply the adapter to activations `(…, D)`, viewed as `(*rows, D)`: rows of all copies, or of each copy."""


class Layout(Protocol):
    """Positions of the adapters in the flat vector."""

    num_parameters: int

    def merge(self, theta: Tensor) -> Sequence[Matrices]:
        """Return the adapters of all sites from vectors `(…, num_parameters)`."""

    def merge_site(self, theta: Tensor, site: int) -> Matrices:
        """Return the adapter of one site."""

    def bias_slices(self) -> list[slice]:
        """Return the slices of the vector that hold biases."""


class AdapterVector(TrainedVector):
    """Holds every adapter of a model in one flat buffer `theta` and applies them.

    It is a buffer and not a parameter, so sharding strategies never touch it, and it keeps its dtype (fp32) whatever
    precision the module is converted to. For training by back-propagation, `train_by_gradient` turns it into a
    parameter. Linears that are trained in full (a new classification head) follow the adapters in the vector.

    Args:
        layout: Positions of the adapters in the vector.
        theta: The initial vector.
    """

    folds_queries = True
    supports_prefix = True

    def __init__(self, layout: Layout, theta: Tensor) -> None:
        super().__init__()
        self.layout = layout
        self.register_buffer("theta", theta)
        self.linear_shapes: dict[str, tuple[int, int]] = {}
        """Output and input widths of the Linears that are trained in full, by their names in the model."""
        self._folded: tuple[Tensor, Sequence[Matrices]] | None = None
        self._cache: tuple[ReferenceType[Tensor], tuple[int, bool], Sequence[Matrices]] | None = None
        self._decay_mask: Tensor | None = None

    def append(self, linears: dict[str, nn.Linear]) -> None:
        """Copy Linears with a bias to the end of the vector, to train them in full. Can be called once.

        Args:
            linears: The Linears, by their names in the model.
        """
        values = [x.detach().flatten() for linear in linears.values() for x in (linear.weight, linear.bias)]
        self._append({name: (linear.out_features, linear.in_features) for name, linear in linears.items()}, values)

    @override
    def append_linear(self, name: str, in_features: int, out_features: int) -> Callable[[Tensor], Tensor]:
        self._append({name: (out_features, in_features)}, [self.theta.new_zeros(out_features * (in_features + 1))])
        return partial(self.linear, name)

    def _append(self, shapes: dict[str, tuple[int, int]], values: Sequence[Tensor]) -> None:
        assert not self.linear_shapes
        self.linear_shapes = shapes
        # a normal tensor even under inference mode: inference tensors have no version counter
        with torch.inference_mode(False):
            self.theta = torch.cat([self.theta, *(value.to(self.theta) for value in values)])

    @override
    def description(self) -> dict[str, Any]:
        linears = [f"{name}:{columns}:{rows}" for name, (rows, columns) in self.linear_shapes.items()]
        return {**self.adapter_description(), "linears": linears, "num_parameters": self.num_parameters}

    @abstractmethod
    def adapter_description(self) -> dict[str, Any]:
        """Return the kind of the adapters, their sizes and their sites, in plain values."""

    file_name = "adapters.safetensors"
    """Name of the file that adapters are exported to."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the exported file by their names: `theta` itself or views of it."""
        return {"theta": self.theta.detach()}

    def peft_config(self) -> dict[str, Any] | None:
        """Return the `adapter_config.json` with which peft reads the exported file, or None if it cannot read it."""
        return None

    @override
    def start_step(self, seed: int, step: int, num_queries: int, draw: Direction) -> Directions:
        return directions_of_step(self.theta, seed, step, draw)

    @override
    def apply_update(self, updated: Tensor, decay: float, stored: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        if decay:
            updated.sub_(self.theta * self.decay_mask, alpha=decay)
        torch._foreach_copy_([self.theta, *stored], [updated, *new])

    @override
    def drift_probe(self) -> Tensor:
        return self.theta

    def train_by_gradient(self) -> None:
        """Turn `theta` into a parameter of the same name, for an optimizer."""
        theta = self.theta
        del self._buffers["theta"]
        self.theta = nn.Parameter(theta)

    @property
    @override
    def num_parameters(self) -> int:
        # by the layout: under ZeRO-3, a parameter `theta` is empty outside of forward passes
        return self.layout.num_parameters + sum((columns + 1) * rows for rows, columns in self.linear_shapes.values())

    @property
    @override
    def linears_slice(self) -> slice:
        return slice(self.layout.num_parameters, None)

    @property
    def decay_mask(self) -> Tensor:
        """Boolean vector that is true where weight decay applies: everywhere except in biases."""
        if self._decay_mask is None or self._decay_mask.device != self.theta.device:
            mask = torch.ones(self.num_parameters, dtype=torch.bool, device="cpu")
            for where in self.layout.bias_slices():
                mask[where] = False
            for name in self.linear_shapes:
                self._linear(mask, name)[1].fill_(False)
            self._decay_mask = mask.to(self.theta.device)
        return self._decay_mask

    @override
    @contextmanager
    def use(self, theta_Pd: Tensor) -> Iterator[None]:
        """Run the model with P other vectors at once, each on its share of the rows.

        Within the context, the rows of every batch must be P-major: `x.view(P, rows, …)`, where the p-th share is
        adapted by `theta_Pd[p]`. The adapters of all sites are merged once, on entry.

        Args:
            theta_Pd: Vectors of shape `(P, num_parameters)`, on the device of the model's activations.
        """
        if theta_Pd.ndim != 2 or theta_Pd.shape[1] != self.num_parameters:
            raise ValueError(
                f"Expected argument `theta_Pd` to have shape (P, {self.num_parameters}), "
                f"but got {tuple(theta_Pd.shape)}."
            )
        outer = self._folded
        self._folded = (theta_Pd, self.layout.merge(theta_Pd))
        try:
            yield
        finally:
            self._folded = outer

    def adapt(self, site: int, x: Tensor) -> Tensor:
        """Apply the adapter of a site to activations of shape `(…, D)`."""
        matrices = self._plain(site) if self._folded is None else self._folded[1][site]
        with _full_precision(x):
            return matrices.apply(x, self._rows(x))

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply a trained Linear to activations of shape `(…, D)`; the result has the vector's dtype."""
        theta = self.theta if self._folded is None else self._folded[0]
        weight, bias = self._linear(theta, name)
        with _full_precision(x):
            y = x.reshape(*self._rows(x), x.shape[-1]).to(theta.dtype) @ weight.mT + bias[..., None, :]
        return y.reshape(*x.shape[:-1], -1)

    def linear_tensors(self) -> dict[str, Tensor]:
        """Return weight and bias of the trained Linears, as views of `theta`."""
        found: dict[str, Tensor] = {}
        for name in self.linear_shapes:
            weight, bias = self._linear(self.theta.detach(), name)
            found |= {f"{name}.weight": weight, f"{name}.bias": bias}
        return found

    def _linear(self, theta: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return weight `(…, C, D)` and bias `(…, C)` of a trained Linear, as views of a vector."""
        sizes = [size for shape in self.linear_shapes.values() for size in (prod(shape), shape[0])]
        parts = theta[..., self.layout.num_parameters :].split(sizes, -1)
        index = list(self.linear_shapes).index(name)
        return parts[2 * index].unflatten(-1, self.linear_shapes[name]), parts[2 * index + 1]

    def _rows(self, x: Tensor) -> tuple[int, ...]:
        """Return how to view the rows of activations: all at once, or as one share for each vector in use."""
        if self._folded is None:
            return (-1,)
        copies = len(self._folded[0])
        if x.shape[0] % copies:
            raise ValueError(
                f"Expected a batch whose rows are a multiple of the {copies} adapter copies in use, but got an "
                f"activation of shape {tuple(x.shape)}; repeat the batch once per copy, copy by copy."
            )
        return copies, -1

    def _plain(self, site: int) -> Matrices:
        """Return the merged adapter of `theta` itself; all sites are cached until `theta` changes."""
        theta = self.theta
        trained = isinstance(theta, nn.Parameter) or (theta.requires_grad and torch.is_grad_enabled())
        if trained or theta.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(theta):
            # not cached: a backward pass frees its graph, tensors of a transform end with the transform, and DeepSpeed
            # writes to parameters without changing their version
            return self.layout.merge_site(theta, site)
        # tensors from inference mode cannot be part of a later graph
        state = (theta._version, torch.is_inference_mode_enabled())
        if self._cache is None or self._cache[0]() is not theta or self._cache[1] != state:
            self._cache = (ref(theta), state, self.layout.merge(theta))
        return self._cache[2][site]

    def clear_cache(self) -> None:
        """Merge the adapters again at their next use, after changes of `theta` that torch does not count.

        Changes through `theta.data` are of that kind, by which callbacks swap weights with their averages.
        """
        self._cache = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterVector":
        buffers = dict(self._buffers)
        theta = self.theta.detach()
        super()._apply(fn, recurse)
        if "theta" in self._parameters and self.theta.dtype != theta.dtype:
            self.theta.data = theta.to(self.theta.device)
        for name, before in buffers.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                # follows the module to its device, but not to its precision: updates are too small for 16 bits
                self._buffers[name] = before.to(after.device)
        self._cache = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "_folded": None, "_decay_mask": None}

    def extra_repr(self) -> str:
        """Return the number of values, for `print(model)`."""
        return f"num_parameters={self.num_parameters}"


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast, which would run the adapters in 16 bits."""
    enabled = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if enabled else nullcontext()
