"""All adapters of a model in one flat vector, merged once per use.

Legend: P perturbed copies of the vector, d its length, S sites of one shape, D features, r rank, H bottleneck.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from typing_extensions import override

from wandazeta.modules.zo.directions import Direction, Directions, directions_of_step

from .tensor_train import TTShape, init_cores, tt_matrices


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


class Matrices(Protocol):
    """One site's adapter, ready to be applied."""

    def apply(self, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        """Apply it to activations `(…, D)`, viewed as `(*rows, D)`: one share of rows for each copy, or all at once."""


class Layout(Protocol):
    """Which slice of the flat vector is what."""

    num_parameters: int

    def merge(self, theta: Tensor) -> Sequence[Matrices]:
        """Adapters of all sites from vectors `(…, num_parameters)`."""

    def merge_site(self, theta: Tensor, site: int) -> Matrices:
        """Adapter of one site."""

    def bias_slices(self) -> list[slice]:
        """Slices of the vector that hold biases."""


class AdapterMatrices(NamedTuple):
    """One site's merged adapter: `x + (relu(x A_down B_down + b_down) A_up B_up + b_up)`, with or without leading P."""

    down_A: Tensor
    down_B: Tensor
    down_bias: Tensor
    up_A: Tensor
    up_B: Tensor
    up_bias: Tensor

    def apply(self, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        """Adapt activations `(…, D)`; shape and dtype stay as they are."""
        x_ND = x.reshape(*rows, x.shape[-1]).to(self.down_A.dtype)
        # in place, as fresh activation-sized tensors cost more than the arithmetic on them
        h_NH = (x_ND @ self.down_A @ self.down_B).add_(self.down_bias).relu_()
        return (h_NH @ self.up_A @ self.up_B).add_(self.up_bias).add_(x_ND).to(x.dtype).reshape(x.shape)


class _Group:
    """The sites of one width: their cores lie side by side in the vector, so slices stack them without a copy."""

    def __init__(self, sites: list[int], down: TTShape, offset: int) -> None:
        self.sites = sites
        self.layers: list[tuple[TTShape, list[tuple[slice, tuple[int, ...]]]]] = []
        for shape in (down, down.mirrored()):
            slices = []
            for size in (*shape.core_shapes, (1, shape.out_features)):
                numel = len(sites) * prod(size)
                slices.append((slice(offset, offset + numel), (len(sites), *size)))
                offset += numel
            self.layers.append((shape, slices))
        self.end = offset

    def merge(self, theta: Tensor, only: int | None = None) -> list[AdapterMatrices]:
        """Contract the cores of all these sites at once, or of the `only`-th."""
        stacked: list[Tensor] = []
        for shape, slices in self.layers:
            views = [theta[..., where].unflatten(-1, size) for where, size in slices]
            if only is not None:
                views = [view.narrow(-len(size), only, 1) for view, (_, size) in zip(views, slices, strict=True)]
            stacked += [*tt_matrices(views[:-1], len(shape.in_factors)), views[-1]]
        return [AdapterMatrices(*parts) for parts in zip(*(part.unbind(-3) for part in stacked), strict=True)]


class AdapterLayout:
    """Which slice of the flat vector is which core; plain arithmetic, no tensors.

    Args:
        widths: Width of every site, in the order of the sites.
        rank: TT rank.
        bottleneck: Inner width of every adapter.
        num_factors: Largest numbers of factors of a site's width and of the bottleneck.

    Example:
        >>> AdapterLayout([4096] * 96).num_parameters  # LLaMA-2-7B, three sites in each of 32 layers
        610560
    """

    def __init__(
        self, widths: Sequence[int], rank: int = 5, bottleneck: int = 64, num_factors: tuple[int, int] = (3, 3)
    ) -> None:
        self.num_sites = len(widths)
        self.rank = rank
        self.bottleneck = bottleneck
        self.groups: list[_Group] = []
        offset = 0
        for width in dict.fromkeys(widths):
            sites = [index for index, other in enumerate(widths) if other == width]
            self.groups.append(_Group(sites, TTShape.balanced(width, bottleneck, rank, num_factors), offset))
            offset = self.groups[-1].end
        self.num_parameters = offset

    def bias_slices(self) -> list[slice]:
        """Slices of the vector that hold biases."""
        return [slices[-1][0] for group in self.groups for _, slices in group.layers]

    def merge(self, theta: Tensor) -> list[AdapterMatrices]:
        """Contract the cores of all sites, batched over sites of one width and over leading dimensions of `theta`."""
        merged: list[Any] = [None] * self.num_sites
        for group in self.groups:
            for site, matrices in zip(group.sites, group.merge(theta), strict=True):
                merged[site] = matrices
        return merged

    def merge_site(self, theta: Tensor, site: int) -> AdapterMatrices:
        """Contract the cores of one site."""
        group = next(group for group in self.groups if site in group.sites)
        return group.merge(theta, group.sites.index(site))[0]

    def initial(self, identity_start: bool, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Initial vector; with `identity_start` the last core of every `up` is zero and the model unchanged."""
        theta = torch.zeros(self.num_parameters, dtype=dtype)
        for group in self.groups:
            for layer, (shape, slices) in enumerate(group.layers):
                views = [theta[where].view(size) for where, size in slices]
                for site in range(len(group.sites)):
                    for view, core in zip(views[:-1], init_cores(shape, generator, dtype), strict=True):
                        view[site] = core
                if identity_start and layer == 1:
                    views[-2].zero_()
        return theta


class FlatBank(nn.Module):
    """Holds every adapter of a model in one flat buffer `theta` and applies them.

    A buffer, not a parameter: sharding strategies never touch it, and it keeps its dtype (fp32) whatever precision the
    module is converted to. Only back-propagation makes a parameter of it, `train_by_gradient`.

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
        self._folded: tuple[int, Sequence[Matrices]] | None = None
        self._cache: tuple[ReferenceType[Tensor], tuple[int, bool], Sequence[Matrices]] | None = None
        self._decay_mask: Tensor | None = None

    def description(self) -> dict[str, Any]:
        """What the vector fits, in plain values."""
        raise NotImplementedError

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
        """Number of trainable values."""
        return self.layout.num_parameters

    @property
    def decay_mask(self) -> Tensor:
        """Boolean vector, true where weight decay applies: everywhere but in the biases."""
        if self._decay_mask is None or self._decay_mask.device != self.theta.device:
            mask = torch.ones(self.num_parameters, dtype=torch.bool)
            for where in self.layout.bias_slices():
                mask[where] = False
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
        self._folded = (theta_Pd.shape[0], self.layout.merge(theta_Pd))
        try:
            yield
        finally:
            self._folded = outer

    def adapt(self, site: int, x: Tensor) -> Tensor:
        """Apply the adapter of a site to activations of shape `(…, D)`."""
        rows: tuple[int, ...] = (-1,)
        if self._folded is None:
            matrices = self._plain(site)
        else:
            copies, merged = self._folded
            matrices, rows = merged[site], (copies, -1)
            if x.shape[0] % copies:
                raise ValueError(
                    f"Expected a batch whose rows are a multiple of the {copies} adapter copies in use, but got an "
                    f"activation of shape {tuple(x.shape)}; repeat the batch once per copy, copy by copy."
                )
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return matrices.apply(x, rows)
        return matrices.apply(x, rows)

    def _plain(self, site: int) -> Matrices:
        """Merged adapter of `theta` itself, kept for all sites until `theta` changes."""
        theta = self.theta
        graph = theta.requires_grad and torch.is_grad_enabled()
        if graph or theta.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(theta):
            # a graph is freed by its backward, a transform's tensors live no longer than the transform
            return self.layout.merge_site(theta, site)
        # tensors made under inference mode cannot take part in a later graph
        state = (theta._version, torch.is_inference_mode_enabled())
        if self._cache is None or self._cache[0]() is not theta or self._cache[1] != state:
            self._cache = (ref(theta), state, self.layout.merge(theta))
        return self._cache[2][site]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FlatBank":
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


class AdapterBank(FlatBank):
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
    def description(self) -> dict[str, Any]:
        return {
            "kind": "tensor_train",
            "rank": self.layout.rank,
            "bottleneck": self.layout.bottleneck,
            "sites": [f"{site.block}:{site.position}:{site.name}:{site.width}" for site in self.sites],
            "num_parameters": self.num_parameters,
        }
