"""Aggregate the projected gradients of Q queries to an estimate of the gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from wandazeta.utilities.random_streams import Directions


@dataclass(frozen=True)
class ProjectedGradients:
    """Slopes of the loss along the directions of the queries, without those that are not finite.

    Args:
        query_ids: Queries with a finite slope.
        values: Their projected gradients, as Python floats so that every rank computes with the same bits.
        num_dropped: Queries dropped because a loss was not finite.
    """

    query_ids: tuple[int, ...]
    values: tuple[float, ...]
    num_dropped: int

    @property
    def std(self) -> float:
        """Standard deviation over the queries (0 for fewer than two)."""
        return (
            float(torch.tensor(self.values, dtype=torch.float64, device="cpu").std()) if len(self.values) > 1 else 0.0
        )


def projected_gradients(slopes_Q: Tensor) -> ProjectedGradients:
    """Keep the finite slopes of the queries; the others are dropped and counted."""
    kept = [(query, slope) for query, slope in enumerate(slopes_Q.tolist()) if isfinite(slope)]
    return ProjectedGradients(
        tuple(query for query, _ in kept), tuple(slope for _, slope in kept), len(slopes_Q) - len(kept)
    )


Aggregation = Callable[[Tensor, ProjectedGradients, Directions], Tensor | None]
"""Maps the trained vector `(d,)`, the slopes of all ranks and the directions to a gradient `(d,)`, or to None."""

# relative to the largest eigenvalue of a Gram matrix: smaller ones are rounding errors of dependent directions
_RANK_TOLERANCE = 1e-9
_TILE_BYTES = 1 << 28


@torch.no_grad()
def mean_gradient(theta: Tensor, slopes: ProjectedGradients, directions: Directions) -> Tensor | None:
    """Return `(1/Q) Σ g_q z_q` (AdaZeta, eq. 4), or None if no query was finite.

    Its expectation is the gradient. Its squared length is on average `1 + (d + 1) / Q` times the gradient's, with
    Gaussian directions.
    """
    if not slopes.values:
        return None
    return _combined(theta, slopes, [value / len(slopes.values) for value in slopes.values], directions)


@torch.no_grad()
def aligned_gradient(theta: Tensor, slopes: ProjectedGradients, directions: Directions) -> Tensor | None:
    """Return the projection of the gradient on the span of the directions, times `d / rank` (ZO-Align).

    With the directions as the rows of Z and the slopes `g = Z ∇L`, the projection is `Zᵀ (Z Zᵀ)⁻¹ g` (arXiv
    2509.15552): the only vector of the span that has all the measured slopes, where the mean counts twice what two
    directions share. On average it keeps `rank / d` of the gradient, so with the factor `d / rank` the expectation is
    the gradient, as for `mean_gradient`, and the same learning rate works (divide it by the factor for the paper's
    step). Its squared length is on average `d / Q` times the gradient's, smaller than the mean's, and from Q = d on the
    estimate equals the gradient. Linearly dependent directions (always some if Q > d) are found by the eigenvalues of
    the Gram matrix and counted once.

    The Gram matrix is computed from tiles of directions, drawn again, that take at most 256 MiB. Returns None if no
    query was finite.
    """
    if not slopes.values:
        return None
    eigenvalues, vectors = torch.linalg.eigh(_gram(slopes.query_ids, directions))
    kept = eigenvalues > _RANK_TOLERANCE * eigenvalues[-1]
    along = vectors[:, kept]
    g = torch.tensor(slopes.values, dtype=torch.float64, device="cpu")
    coefficients = along @ (along.T @ g / eigenvalues[kept])
    scale = theta.numel() / int(kept.sum())
    return _combined(theta, slopes, (coefficients * scale).tolist(), directions)


@torch.no_grad()
def normalised_gradient(theta: Tensor, slopes: ProjectedGradients, directions: Directions) -> Tensor | None:
    """Return the mean divided by the standard deviation of the slopes (FZOO, arXiv 2506.09034).

    The deviation estimates the gradient's length, so steps have the same length whether the loss is flat or steep. FZOO
    divides by the deviation of the losses, which is ε times that of the slopes: its learning rate divided by ε is the
    one here. None if the deviation is zero or fewer than two queries are finite.
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
    """Sum the directions in the order of the queries, with Python floats as factors: the same bits on every rank."""
    total = torch.zeros_like(theta)
    for query, coefficient in zip(slopes.query_ids, coefficients, strict=True):
        total.add_(directions(query), alpha=coefficient)
    return total


def _gram(query_ids: Sequence[int], directions: Directions) -> Tensor:
    """Return the inner products of the directions `(Q, Q)`, in fp64 on the CPU."""
    num_queries = len(query_ids)
    gram = torch.empty(num_queries, num_queries, dtype=torch.float64, device="cpu")
    tile = max(1, _TILE_BYTES // (8 * directions(query_ids[0]).numel()))
    for start in range(0, num_queries, tile):
        held = torch.stack([directions(query).double() for query in query_ids[start : start + tile]])
        stop = start + len(held)
        gram[start:stop, start:stop] = held @ held.T
        for column in range(stop, num_queries):
            products = (held @ directions(query_ids[column]).double()).cpu()
            gram[start:stop, column] = gram[column, start:stop] = products
    return gram
