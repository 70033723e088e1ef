"""Slopes of the loss along random directions, from forward passes alone.

The work of a step is cut into points, which chunks hold and ranks share out: a point is what is evaluated at once, such
as one side of a query. Legend: V values of a point, P points of the step, Q queries, d length of the trained vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from wandazeta.utilities.arguments import check_range
from wandazeta.zeroth_order.chunks import Evaluations, in_chunks
from wandazeta.zeroth_order.directions import Directions

LossFn = Callable[[Tensor], Tensor]
"""Maps vectors `(N, d)` to their losses `(N,)`."""


class Estimator(Protocol):
    """How the slopes along the queries' directions are found."""

    num_values: int

    def num_points(self, num_queries: int) -> int:
        """Points of a step, P."""

    def num_forwards(self, num_queries: int) -> int:
        """Forward passes of a step over its batch, whatever the number of ranks."""

    def evaluate(
        self, loss_fn: LossFn, theta: Tensor, directions: Directions, points: Sequence[int], chunk_size: int
    ) -> Evaluations:
        """Evaluate some points; `theta` is never changed, copies go to `loss_fn`.

        Args:
            loss_fn: The loss of any number of vectors.
            theta: The trained vector, shape `(d,)`.
            directions: The directions of the step.
            points: Points to evaluate; a rank may have none.
            chunk_size: Points per call of `loss_fn`; halved when memory runs out.
        """
        ...

    def slopes(self, values_VP: Tensor) -> Tensor:
        """Slopes of all queries `(Q,)` from the values of all points; not finite where a loss was not."""
        ...

    def loss(self, values_VP: Tensor) -> float:
        """Loss at the trained vector itself, or an estimate of it (`nan` without a finite query)."""
        ...


@dataclass(frozen=True)
class ProjectedGradients:
    """Slopes of the loss along the directions of the queries that stayed finite.

    Args:
        query_ids: Queries that count.
        values: Their projected gradients, as Python floats so that every rank computes with the same bits.
        num_dropped: Queries dropped because a loss was not finite.
    """

    query_ids: tuple[int, ...]
    values: tuple[float, ...]
    num_dropped: int

    @property
    def std(self) -> float:
        """Standard deviation over the queries (0 for fewer than two)."""
        return float(torch.tensor(self.values, dtype=torch.float64).std()) if len(self.values) > 1 else 0.0


def projected_gradients(slopes_Q: Tensor) -> ProjectedGradients:
    """Keep the finite slopes of the queries; the others are dropped and counted."""
    kept = [(query, slope) for query, slope in enumerate(slopes_Q.tolist()) if isfinite(slope)]
    return ProjectedGradients(
        tuple(query for query, _ in kept), tuple(slope for _, slope in kept), len(slopes_Q) - len(kept)
    )


class TwoSided:
    """Central differences, `(L(θ + ε z) - L(θ - ε z)) / 2ε`: 2Q forwards, error O(ε²) (MeZO and AdaZeta, eq. 3).

    Point 2q is the plus side of query q, point 2q + 1 its minus side.

    Args:
        epsilon: Distance of the two sides from the trained vector in units of the direction.

    Raises:
        ValueError: If it is not above 0.
    """

    num_values = 1

    def __init__(self, epsilon: float) -> None:
        check_range("epsilon", epsilon, epsilon > 0, "above 0")
        self.epsilon = epsilon

    def num_points(self, num_queries: int) -> int:
        """Points of a step: both sides of its queries."""
        return 2 * num_queries

    def num_forwards(self, num_queries: int) -> int:
        """Two for each query."""
        return 2 * num_queries

    @torch.no_grad()
    def evaluate(
        self, loss_fn: LossFn, theta: Tensor, directions: Directions, points: Sequence[int], chunk_size: int
    ) -> Evaluations:
        """Evaluate sides of some queries, as `Estimator.evaluate` says."""

        def sides(chunk: Sequence[int]) -> Tensor:
            moves = [(point // 2, -self.epsilon if point % 2 else self.epsilon) for point in chunk]
            return loss_fn(_moved(theta, directions, moves))

        return in_chunks(sides, points, chunk_size, self.num_values, theta.device)

    def slopes(self, values_VP: Tensor) -> Tensor:
        """Central differences of all queries, `(Q,)`."""
        plus, minus = values_VP.view(-1, 2).T
        return (plus - minus) / (2 * self.epsilon)

    def loss(self, values_VP: Tensor) -> float:
        """Mean of both sides over the queries whose losses are finite."""
        sides_Q2 = values_VP.view(-1, 2)
        return float(sides_Q2[sides_Q2.isfinite().all(1)].mean())


class OneSided:
    """Forward differences, `(L(θ + ε z) - L(θ)) / ε`, from one shared base: Q + 1 forwards, error O(ε).

    Half the forwards of `TwoSided`, and the loss at θ itself comes with them. The curvature along z stays in the slope,
    and what the base is off by is in all slopes alike. Point 0 is the base, point q + 1 the query q.

    Args:
        epsilon: Distance of the perturbed vector from the trained one in units of the direction.

    Raises:
        ValueError: If it is not above 0.
    """

    num_values = 1

    def __init__(self, epsilon: float) -> None:
        check_range("epsilon", epsilon, epsilon > 0, "above 0")
        self.epsilon = epsilon

    def num_points(self, num_queries: int) -> int:
        """Points of a step: its queries and their base."""
        return num_queries + 1

    def num_forwards(self, num_queries: int) -> int:
        """One for each query and one for their base."""
        return num_queries + 1

    @torch.no_grad()
    def evaluate(
        self, loss_fn: LossFn, theta: Tensor, directions: Directions, points: Sequence[int], chunk_size: int
    ) -> Evaluations:
        """Evaluate some points, as `Estimator.evaluate` says."""

        def one_side(chunk: Sequence[int]) -> Tensor:
            return loss_fn(_moved(theta, directions, [(point - 1, self.epsilon) for point in chunk]))

        return in_chunks(one_side, points, chunk_size, self.num_values, theta.device)

    def slopes(self, values_VP: Tensor) -> Tensor:
        """Forward differences of all queries, `(Q,)`; none is finite where the base is not."""
        return (values_VP[0, 1:] - values_VP[0, 0]) / self.epsilon

    def loss(self, values_VP: Tensor) -> float:
        """Loss at the trained vector."""
        return float(values_VP[0, 0])


def _moved(theta: Tensor, directions: Directions, moves: Sequence[tuple[int, float]]) -> Tensor:
    """Copies of a vector `(N, d)`, each moved along the direction of a query by a length; none for query -1."""
    copies = theta.repeat(len(moves), 1)
    drawn, z = -1, theta
    for copy, (query, length) in zip(copies, moves, strict=True):
        if query != drawn:
            z = theta  # the last direction goes before the next one comes
            drawn, z = query, directions(query)
        if query >= 0:
            copy.add_(z, alpha=length)
    return copies
