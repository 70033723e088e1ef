"""From the slopes of Q queries to an estimate of the gradient, along directions that are drawn again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wandazeta.zeroth_order.directions import Directions
from wandazeta.zeroth_order.estimators import ProjectedGradients

Aggregation = Callable[[Tensor, ProjectedGradients, Directions], Tensor | None]
"""Maps the trained vector `(d,)`, the slopes of all ranks and the directions to a gradient `(d,)`, or to none."""

# of a Gram matrix relative to its largest eigenvalue: what is below is the rounding of dependent directions
_RANK_TOLERANCE = 1e-9
_TILE_BYTES = 1 << 28


@torch.no_grad()
def mean_gradient(theta: Tensor, slopes: ProjectedGradients, directions: Directions) -> Tensor | None:
    """Return `(1/Q) Σ g_q z_q` (AdaZeta, eq. 4), or none if no query was finite.

    Its mean is the gradient; its square is `1 + (d + 1) / Q` times as long on average, with Gaussian directions.
    """
    if not slopes.values:
        return None
    return _combined(theta, slopes, [value / len(slopes.values) for value in slopes.values], directions)


@torch.no_grad()
def aligned_gradient(theta: Tensor, slopes: ProjectedGradients, directions: Directions) -> Tensor | None:
    """Return the projection of the gradient on the span of the directions, times `d / rank`.

    The projection of ZO-Align (arXiv 2509.15552), or none if no query was finite. With the directions as the rows of Z
    and `g = Z ∇L` it is `Zᵀ (Z Zᵀ)⁻¹ g`: the one vector of the span that has all the measured slopes, where the mean
    counts twice what two directions share. It keeps `rank / d` of the gradient on average, so with the factor `d /
    rank` the mean of the estimate is the gradient, as that of `mean_gradient` is, and the same learning rate serves
    (divide it by the factor for the paper's step). Its square is `d / Q` times as long as the gradient's on average,
    shorter than the mean's, and from Q = d on it is the gradient itself. Dependent directions (always some if Q > d)
    are told by the eigenvalues of the Gram matrix and counted once.

    The Gram matrix is made of tiles of directions, drawn again, so that no more than 256 MiB hold any.
    """
    if not slopes.values:
        return None
    eigenvalues, vectors = torch.linalg.eigh(_gram(slopes.query_ids, directions))
    kept = eigenvalues > _RANK_TOLERANCE * eigenvalues[-1]
    along = vectors[:, kept]
    g = torch.tensor(slopes.values, dtype=torch.float64)
    coefficients = along @ (along.T @ g / eigenvalues[kept])
    scale = theta.numel() / int(kept.sum())
    return _combined(theta, slopes, (coefficients * scale).tolist(), directions)


@torch.no_grad()
def normalised_gradient(theta: Tensor, slopes: ProjectedGradients, directions: Directions) -> Tensor | None:
    """Return the mean over the standard deviation of the slopes (FZOO, arXiv 2506.09034).

    The deviation estimates the gradient's length, so steps are of equal length on flat ground and on steep. FZOO
    divides by the deviation of the losses, which is ε times that of the slopes: its learning rate over ε is the one
    here. None if it is zero or there are fewer than two finite queries.
    """
    if slopes.std == 0:
        return None
    scale = 1 / (slopes.std * len(slopes.values))
    return _combined(theta, slopes, [value * scale for value in slopes.values], directions)


AGGREGATIONS: dict[str, Aggregation] = {
    "mean": mean_gradient,
    "align": aligned_gradient,
    "fzoo": normalised_gradient,
}


def _combined(
    theta: Tensor, slopes: ProjectedGradients, coefficients: Sequence[float], directions: Directions
) -> Tensor:
    """Sum the directions in the order of the queries with Python floats as factors: the same bits on every rank."""
    total = torch.zeros_like(theta)
    for query, coefficient in zip(slopes.query_ids, coefficients, strict=True):
        total.add_(directions(query), alpha=coefficient)
    return total


def _gram(query_ids: Sequence[int], directions: Directions) -> Tensor:
    """Inner products of the directions `(Q, Q)`, in fp64 on the CPU."""
    num_queries = len(query_ids)
    gram = torch.empty(num_queries, num_queries, dtype=torch.float64)
    tile = max(1, _TILE_BYTES // (8 * directions(query_ids[0]).numel()))
    for start in range(0, num_queries, tile):
        held = torch.stack([directions(query).double() for query in query_ids[start : start + tile]])
        stop = start + len(held)
        gram[start:stop, start:stop] = held @ held.T
        for column in range(stop, num_queries):
            products = (held @ directions(query_ids[column]).double()).cpu()
            gram[start:stop, column] = gram[column, start:stop] = products
    return gram
