"""Which slice of a flat vector is which core of which adapter, and what is applied once they are merged.

Legend: P perturbed copies of the vector, S sites of one shape, D features, r rank, H bottleneck.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from wandazeta.adapters.tensor_train import TTShape, init_cores, tt_matrices


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
