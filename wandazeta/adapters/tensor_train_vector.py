"""Tensor-train adapters of a model in one flat vector.

Legend: P perturbed copies of the vector, S sites of one width, D features, r rank, H bottleneck.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import override

from wandazeta.adapters.flat_vector import AdapterVector
from wandazeta.adapters.tensor_train import TTShape, init_cores, tt_matrices
from wandazeta.utilities.triton_kernels import load_kernels

# one GPU kernel for a site of up to so many features
_KERNEL = "wandazeta.adapters.fused_kernel"
_MAX_WIDTH = 1 << 14


@dataclass(frozen=True)
class Site:
    """Place of one adapter.

    Args:
        block: Index of the decoder or encoder block.
        name: Name of the adapted module inside its block, such as `mlp.up_proj`.
        position: `before` adapts the module's input, `after` its output.
        width: Number of features there.
    """

    block: int
    name: str
    position: str
    width: int


class AdapterMatrices(NamedTuple):
    """Merged adapter of one site, `x + relu(x A_down B_down + b_down) A_up B_up + b_up`, with or without leading P."""

    down_A: Tensor
    down_B: Tensor
    down_bias: Tensor
    up_A: Tensor
    up_B: Tensor
    up_bias: Tensor

    def apply(self, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        """Adapt activations `(…, D)` and return them in the same shape and dtype."""
        if x.is_cuda and self._fits_kernel(x):
            kernel = load_kernels(_KERNEL, x.device, "an adapter is ten kernels instead of one, and steps take longer")
            if kernel is not None:
                adapted: Tensor = kernel.apply_fused(x.reshape(*rows, x.shape[-1]), self)
                return adapted.view(x.shape)
        x_ND = x.reshape(*rows, x.shape[-1]).to(self.down_A.dtype)
        # in place, as fresh activation-sized tensors cost more than the arithmetic on them
        h_NH = (x_ND @ self.down_A @ self.down_B).add_(self.down_bias).relu_()
        return (h_NH @ self.up_A @ self.up_B).add_(self.up_bias).add_(x_ND).to(x.dtype).reshape(x.shape)

    def _fits_kernel(self, x: Tensor) -> bool:
        """Whether the kernel computes what is asked for: fp32 arithmetic without derivatives, on rows that it holds."""
        theta = self.down_A
        differentiated = (
            (torch.is_grad_enabled() and (x.requires_grad or theta.requires_grad))
            or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in (x, theta))
            or any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in (x, theta))
        )
        return theta.dtype == torch.float32 and x.shape[-1] <= _MAX_WIDTH and not differentiated


class _Group:
    """The sites of one width: their cores are adjacent in the vector, so slices stack them without a copy."""

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
        """Contract the cores of all these sites at once, or of the one with index `only`."""
        stacked: list[Tensor] = []
        for shape, slices in self.layers:
            views = [theta[..., where].unflatten(-1, size) for where, size in slices]
            if only is not None:
                views = [view.narrow(-len(size), only, 1) for view, (_, size) in zip(views, slices, strict=True)]
            left, right = tt_matrices(views[:-1], len(shape.in_factors))
            if theta.is_cuda:
                # the kernel reads one column at a time
                left = left.mT.contiguous().mT
            stacked += [left, right, views[-1]]
        return [AdapterMatrices(*parts) for parts in zip(*(part.unbind(-3) for part in stacked), strict=True)]


class AdapterLayout:
    """Positions of the tensor-train cores in the flat vector.

    Args:
        widths: Width of every site, in the order of the sites.
        rank: TT rank.
        bottleneck: Inner width of every adapter.
        num_factors: Largest numbers of factors of a site's width and of the bottleneck.

    Examples:
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
        """Return the slices of the vector that hold biases."""
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
        """Return an initial vector; with `identity_start` the last core of every `up` is zero."""
        theta = torch.zeros(self.num_parameters, dtype=dtype, device="cpu")
        for group in self.groups:
            for layer, (shape, slices) in enumerate(group.layers):
                views = [theta[where].view(size) for where, size in slices]
                for site in range(len(group.sites)):
                    for view, core in zip(views[:-1], init_cores(shape, generator, dtype), strict=True):
                        view[site] = core
                if identity_start and layer == 1:
                    views[-2].zero_()
        return theta


class TensorTrainVector(AdapterVector):
    """The tensor-train adapters of a model (AdaZeta, arXiv 2406.18060).

    Args:
        sites: Places of the adapters.
        rank: TT rank.
        bottleneck: Inner width of every adapter.
        num_factors: Largest numbers of factors of a site's width and of the bottleneck.
        identity_start: Start with adapters that change nothing; otherwise with random ones, as AdaZeta's code does.
        generator: Source of the initial values; seed 0 by default.
        dtype: Precision of the vector and of the adapters' arithmetic.
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
        # a normal tensor even under inference mode: inference tensors have no version counter
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
