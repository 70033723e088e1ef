"""All adapters of a model in one flat vector, merged once per use.

Legend: P perturbed copies of the vector, d its length, D features, C outputs of a trained Linear.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from typing_extensions import override

from wandazeta.adapters.layout import AdapterLayout, Layout, Matrices
from wandazeta.zeroth_order.directions import Direction, Directions, directions_of_step


@dataclass(frozen=True)
class Site:
    """Where one adapter sits.

    Args:
        block: Index of the decoder block.
        name: Name of the adapted module inside its block, such as `mlp.up_proj`.
        position: `before` adapts the module's input, `after` its output.
        width: Number of features there.
    """

    block: int
    name: str
    position: str
    width: int


class AdapterVector(nn.Module, ABC):
    """Holds every adapter of a model in one flat buffer `theta` and applies them.

    A buffer, not a parameter: sharding strategies never touch it, and it keeps its dtype (fp32) whatever precision the
    module is converted to. Only back-propagation makes a parameter of it, `train_by_gradient`. Linears that are trained
    as they are (a new classification head) follow the adapters in it.

    Args:
        layout: Which slice of the vector is what.
        theta: The initial vector.
    """

    theta: Tensor
    folds = True
    """Whether several copies go through one forward, each on its share of the rows."""
    model_names: frozenset[str] = frozenset()
    """Names of the model's own parameters that are trained."""

    def __init__(self, layout: Layout, theta: Tensor) -> None:
        super().__init__()
        self.layout = layout
        self.register_buffer("theta", theta)
        self.linear_shapes: dict[str, tuple[int, int]] = {}
        """Outputs and inputs of the Linears that are trained in full, by their names in the model."""
        self._folded: tuple[Tensor, Sequence[Matrices]] | None = None
        self._cache: tuple[ReferenceType[Tensor], tuple[int, bool], Sequence[Matrices]] | None = None
        self._decay_mask: Tensor | None = None

    def append(self, linears: dict[str, nn.Linear]) -> None:
        """Copy Linears with a bias to the end of the vector, to be trained in full; to be called once.

        Args:
            linears: The Linears, by their names in the model.
        """
        assert not self.linear_shapes
        self.linear_shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        with torch.inference_mode(False):
            values = [x.detach().to(self.theta).flatten() for lin in linears.values() for x in (lin.weight, lin.bias)]
            self.theta = torch.cat([self.theta, *values])

    def description(self) -> dict[str, Any]:
        """What the vector fits, in plain values."""
        linears = [f"{name}:{columns}:{rows}" for name, (rows, columns) in self.linear_shapes.items()]
        return {**self.adapter_description(), "linears": linears, "num_parameters": self.num_parameters}

    @abstractmethod
    def adapter_description(self) -> dict[str, Any]:
        """What the adapters are and where they sit, in plain values."""

    file_name = "adapters.safetensors"

    def tensors(self) -> dict[str, Tensor]:
        """What is trained, by the names of the file that it is exported to: `theta` itself or views of it."""
        return {"theta": self.theta.detach()}

    def start(self, seed: int, step: int, num_queries: int, draw: Direction) -> Directions:
        """Go to a step and return its directions; adapters are the same vector in every one.

        Args:
            seed: Base seed of the run.
            step: Global step.
            num_queries: Queries of the step.
            draw: Distribution of the directions.
        """
        return directions_of_step(self.theta, seed, step, draw)

    def store(self, updated: Tensor, shrink: float, stored: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Take new values of the vector, and note down in the same call that they are taken.

        A signal handler that writes a checkpoint sees the adapters and their step both old or both new.

        Args:
            updated: The new vector; changed by the decay.
            shrink: Share of the old vector that is taken off, but for biases.
            stored: Tensors that say how far training is.
            new: Their new values.
        """
        if shrink:
            updated.sub_(self.theta * self.decay_mask, alpha=shrink)
        torch._foreach_copy_([self.theta, *stored], [updated, *new])

    def checked(self) -> Tensor:
        """What ranks that drifted apart are noticed by."""
        return self.theta

    def train_by_gradient(self) -> None:
        """Make `theta` a parameter of the same name, for an optimizer."""
        theta = self.theta
        del self._buffers["theta"]
        self.theta = nn.Parameter(theta)

    @property
    def num_parameters(self) -> int:
        """Number of trainable values, of a vector that is shared out over ranks, too."""
        return self.layout.num_parameters + sum((columns + 1) * rows for rows, columns in self.linear_shapes.values())

    @property
    def decay_mask(self) -> Tensor:
        """Boolean vector, true where weight decay applies: everywhere but in the biases."""
        if self._decay_mask is None or self._decay_mask.device != self.theta.device:
            mask = torch.ones(self.num_parameters, dtype=torch.bool)
            for where in self.layout.bias_slices():
                mask[where] = False
            for name in self.linear_shapes:
                self._linear(mask, name)[1].fill_(False)
            self._decay_mask = mask.to(self.theta.device)
        return self._decay_mask

    @contextmanager
    def use(self, theta_Pd: Tensor) -> Iterator[None]:
        """Run the model with P other vectors at once, each on its share of the rows.

        Inside, the rows of every batch must be P-major: `x.view(P, rows, …)`, the p-th share adapted by `theta_Pd[p]`.
        All cores are merged once, here.

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
        """Weight and bias of the trained Linears, as views of `theta`."""
        found: dict[str, Tensor] = {}
        for name in self.linear_shapes:
            weight, bias = self._linear(self.theta.detach(), name)
            found |= {f"{name}.weight": weight, f"{name}.bias": bias}
        return found

    def _linear(self, theta: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Weight `(…, C, D)` and bias `(…, C)` of a trained Linear, as views of a vector."""
        sizes = [size for shape in self.linear_shapes.values() for size in (prod(shape), shape[0])]
        parts = theta[..., self.layout.num_parameters :].split(sizes, -1)
        index = list(self.linear_shapes).index(name)
        return parts[2 * index].unflatten(-1, self.linear_shapes[name]), parts[2 * index + 1]

    def _rows(self, x: Tensor) -> tuple[int, ...]:
        """How to view the rows of activations: all at once, or as one share for each of the vectors in use."""
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
        """Merged adapter of `theta` itself, kept for all sites until `theta` changes."""
        theta = self.theta
        trained = isinstance(theta, nn.Parameter) or (theta.requires_grad and torch.is_grad_enabled())
        if trained or theta.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(theta):
            # a graph is freed by its backward, a transform's tensors live no longer than the transform, and what
            # DeepSpeed writes to a parameter leaves its version as it was
            return self.layout.merge_site(theta, site)
        # tensors made under inference mode cannot take part in a later graph
        state = (theta._version, torch.is_inference_mode_enabled())
        if self._cache is None or self._cache[0]() is not theta or self._cache[1] != state:
            self._cache = (ref(theta), state, self.layout.merge(theta))
        return self._cache[2][site]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterVector":
        buffers = dict(self._buffers)
        theta = self.theta.detach()
        super()._apply(fn, recurse)
        if "theta" in self._parameters and self.theta.dtype != theta.dtype:
            self.theta.data = theta.to(self.theta.device)
        for name, before in buffers.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                # follow the module to its device, but not to its precision: 16 bits would swallow the updates
                self._buffers[name] = before.to(after.device)
        self._cache = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "_folded": None, "_decay_mask": None}

    def extra_repr(self) -> str:
        """Size of the bank, for `print(model)`."""
        return f"num_parameters={self.num_parameters}"


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Leave autocast, which would run the adapters in 16 bits."""
    enabled = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if enabled else nullcontext()


class TensorTrainVector(AdapterVector):
    """A bank of tensor-train adapters.

    Args:
        sites: Where the adapters sit.
        rank: TT rank.
        bottleneck: Inner width of every adapter.
        num_factors: Largest numbers of factors of a site's width and of the bottleneck.
        identity_start: Start with adapters that change nothing; otherwise with the reference's random ones.
        generator: Source of the initial values; seed 0 if not given.
        dtype: Type of the vector and of the adapters' arithmetic.
    """

    layout: AdapterLayout

    def __init__(
        self,
        sites: Sequence[Site],
        rank: int = 5,
        bottleneck: int = 64,
        num_factors: tuple[int, int] = (3, 3),
        identity_start: bool = True,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        layout = AdapterLayout([site.width for site in sites], rank, bottleneck, num_factors)
        generator = generator or torch.Generator().manual_seed(0)
        # a normal tensor wherever the bank is made: inference tensors have no version to tell a change by
        with torch.inference_mode(False):
            theta = layout.initial(identity_start, generator, dtype)
        super().__init__(layout, theta)
        self.sites = tuple(sites)

    @override
    def adapter_description(self) -> dict[str, Any]:
        return {
            "kind": "tensor_train",
            "rank": self.layout.rank,
            "bottleneck": self.layout.bottleneck,
            "sites": [f"{site.block}:{site.position}:{site.name}:{site.width}" for site in self.sites],
        }
