"""Which distance ε the differences of losses should be taken at: measured against exact directional derivatives.

Too small an ε drowns the difference in rounding, too large a one measures the curvature, too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from wandazeta.zeroth_order.directions import Direction, direction, directions_of_step
from wandazeta.zeroth_order.estimators import LossFn, OneSided, TwoSided
from wandazeta.zeroth_order.forward_mode import ForwardMode

EPSILONS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_AS_GOOD = 0.01


@dataclass(frozen=True)
class EpsilonRow:
    """How well an estimator measures slopes at a distance.

    Args:
        estimator: `two_sided` or `one_sided`.
        epsilon: Distance of the perturbed vectors.
        correlation: Of its slopes with the exact derivatives, about zero: `Σ g d / √(Σ g² Σ d²)`; `nan` if a loss was
            not finite. The share of an estimate's square that is signal is its square.
    """

    estimator: str
    epsilon: float
    correlation: float

    def as_dict(self) -> dict[str, Any]:
        """Return the row in plain values."""
        return asdict(self)


def measure_epsilons(
    loss_fns: Iterable[LossFn],
    theta: Tensor,
    *,
    seed: int = 0,
    num_queries: int = 16,
    epsilons: Sequence[float] = EPSILONS,
    chunk_size: int = 8,
    draw: Direction = direction,
) -> list[EpsilonRow]:
    """Compare the slopes of both difference estimators with exact derivatives, along the same directions.

    Costs `num_queries · (2 · len(epsilons) + 2) + 1` forwards for each loss.

    Args:
        loss_fns: Losses of different batches, each a map from vectors `(N, d)` to `(N,)`; the b-th has the directions
            of step b.
        theta: The vector that they are measured at, shape `(d,)`.
        seed: Seed of the directions.
        num_queries: Directions for each loss.
        epsilons: Distances to try.
        chunk_size: Vectors at a time.
        draw: Distribution of the directions.

    Returns:
        A row for each estimator and distance, in this order.

    Raises:
        ValueError: If a loss has no forward-mode derivative, or an argument is out of range.
    """
    exact: list[Tensor] = []
    measured: dict[tuple[str, float], list[Tensor]] = {
        (name, epsilon): [] for name in ("two_sided", "one_sided") for epsilon in epsilons
    }
    for batch, loss_fn in enumerate(loss_fns):
        directions = directions_of_step(theta, seed, batch, draw)
        queries, forward_mode = range(num_queries), ForwardMode()
        derivatives = forward_mode.evaluate(loss_fn, theta, directions, queries, chunk_size)
        exact.append(forward_mode.slopes(derivatives.values_VP))
        # the base is the same at every distance, the perturbed losses are the plus sides
        base = OneSided(1.0).evaluate(loss_fn, theta, directions, [0], 1).values_VP
        for epsilon in epsilons:
            two_sided, one_sided = TwoSided(epsilon), OneSided(epsilon)
            sides = two_sided.evaluate(
                loss_fn, theta, directions, range(2 * num_queries), derivatives.chunk_size
            ).values_VP
            measured["two_sided", epsilon].append(two_sided.slopes(sides))
            measured["one_sided", epsilon].append(one_sided.slopes(torch.cat([base, sides[:, ::2]], 1)))
    return [
        EpsilonRow(name, epsilon, _correlation(torch.cat(slopes), torch.cat(exact)))
        for (name, epsilon), slopes in measured.items()
    ]


def recommended_epsilon(rows: Sequence[EpsilonRow], estimator: str) -> EpsilonRow:
    """Return the row in the middle of those as good as the best: as far as can be from rounding and from curvature.

    As good is a correlation at most 0.01 below the best; the rows are those between the first and the last that are.

    Args:
        rows: What `measure_epsilons` returned.
        estimator: Whose.

    Raises:
        ValueError: If there is no row of the estimator whose losses are finite.
    """
    rows = sorted((row for row in rows if row.estimator == estimator), key=lambda row: row.epsilon)
    finite = [row.correlation for row in rows if row.correlation == row.correlation]
    if not finite:
        raise ValueError(f"Expected a finite loss for some epsilon of {estimator}, but there is none; check the data")
    good = [place for place, row in enumerate(rows) if row.correlation >= max(finite) - _AS_GOOD]
    return rows[(good[0] + good[-1]) // 2]


def _correlation(slopes: Tensor, exact: Tensor) -> float:
    product = (slopes * exact).sum()
    lengths = sqrt(float(slopes.square().sum())) * sqrt(float(exact.square().sum()))
    return float(product) / lengths if lengths else 0.0
