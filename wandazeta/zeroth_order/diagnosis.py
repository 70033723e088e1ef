"""Choose ε of finite differences: measure their slopes at several distances against exact directional derivatives.

If ε is too small, rounding dominates the difference; if it is too large, the curvature of the loss does.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wandazeta.utilities.random_streams import Direction, direction, directions_of_step
from wandazeta.zeroth_order.estimators import DEFAULT_EPSILON, ForwardMode, LossFn, OneSided, TwoSided

if TYPE_CHECKING:
    from rich.table import Table

EPSILONS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Distances that are tried by default."""
ESTIMATORS = ("two_sided", "one_sided")
"""Names of the estimators that have an ε, as in the results."""

_PLATEAU = 0.01
_GOOD_CORRELATION = 0.9


@dataclass(frozen=True)
class EpsilonRow:
    """How well an estimator measures slopes at one distance.

    Args:
        estimator: `two_sided` or `one_sided`.
        epsilon: Distance of the perturbed vectors.
        correlation: Uncentred correlation of its slopes with the exact derivatives, `Σ g d / √(Σ g² Σ d²)`; `nan` if a
            loss was not finite. Its square is the fraction of signal in the squared length of an estimate.
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
    """Compare the slopes of both finite-difference estimators with exact derivatives, along the same directions.

    Costs `num_queries · (2 · len(epsilons) + 2) + 1` forwards for each loss.

    Args:
        loss_fns: Losses of different batches, each a map from vectors `(N, d)` to `(N,)`. The b-th is evaluated along
            the directions of step b.
        theta: The vector at which slopes are measured, shape `(d,)`.
        seed: Seed of the directions.
        num_queries: Directions for each loss.
        epsilons: Distances to try.
        chunk_size: Vectors per call of a loss.
        draw: Distribution of the directions.

    Returns:
        A row for each estimator and distance, in this order.

    Raises:
        ValueError: If a loss has no forward-mode derivative, or an argument is out of range.
    """
    exact: list[Tensor] = []
    measured: dict[tuple[str, float], list[Tensor]] = {
        (name, epsilon): [] for name in ESTIMATORS for epsilon in epsilons
    }
    for batch, loss_fn in enumerate(loss_fns):
        directions = directions_of_step(theta, seed, batch, draw)
        queries, forward_mode = range(num_queries), ForwardMode()
        derivatives = forward_mode.evaluate(loss_fn, theta, directions, queries, chunk_size)
        exact.append(forward_mode.slopes(derivatives.values_VP))
        # the base is the same at every distance, and the plus sides are the perturbed losses of one-sided slopes
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
    """Return the row in the middle of the plateau of good distances, far from both rounding and curvature.

    The plateau reaches from the first to the last row whose correlation is at most 0.01 below the best.

    Args:
        rows: Result of `measure_epsilons`.
        estimator: `two_sided` or `one_sided`.

    Raises:
        ValueError: If no row of the estimator has finite losses.
    """
    rows = sorted((row for row in rows if row.estimator == estimator), key=lambda row: row.epsilon)
    finite = [row.correlation for row in rows if row.correlation == row.correlation]
    if not finite:
        raise ValueError(f"Expected a finite loss for some epsilon of {estimator}, but there is none; check the data")
    good = [place for place, row in enumerate(rows) if row.correlation >= max(finite) - _PLATEAU]
    return rows[(good[0] + good[-1]) // 2]


def write_report(rows: Sequence[EpsilonRow], dtype: torch.dtype, output_dir: str | Path, **settings: Any) -> None:
    """Print the table and the recommendation; write `epsilon.json` and, with matplotlib, `epsilon.svg`.

    Args:
        rows: Result of `measure_epsilons`.
        dtype: Precision of the forward passes.
        output_dir: Directory to write to; it is made if it is missing.
        **settings: Further plain values for the JSON file.
    """
    from rich.console import Console

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "epsilon.json").write_text(json.dumps(summary(rows, dtype) | settings, indent=2) + "\n")
    Console(file=sys.stdout).print(table(rows, dtype))
    for name in ESTIMATORS:
        sys.stdout.write(advice(rows, name, DEFAULT_EPSILON[dtype]) + "\n")
    try:
        plot(rows, folder / "epsilon.svg")
    except ImportError:
        sys.stdout.write("no plot, because matplotlib is not installed: pip install 'wandazeta[report]'\n")
    sys.stdout.write(f"diagnosis: {folder.absolute()}\n")


def summary(rows: Sequence[EpsilonRow], dtype: torch.dtype) -> dict[str, Any]:
    """Return the rows, the recommended epsilons and the default one in plain values.

    Args:
        rows: Result of `measure_epsilons`.
        dtype: Precision of the forward passes.
    """
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "default": DEFAULT_EPSILON[dtype],
        "recommended": {name: recommended_epsilon(rows, name).epsilon for name in ESTIMATORS},
        "rows": [row.as_dict() for row in rows],
    }


def table(rows: Sequence[EpsilonRow], dtype: torch.dtype) -> "Table":
    """Return a rich table with a line for each epsilon, in which the recommended ones are marked.

    Args:
        rows: Result of `measure_epsilons`.
        dtype: Precision of the forward passes.
    """
    from rich.table import Table

    name_of_dtype = str(dtype).removeprefix("torch.")
    result = Table(
        title=f"Correlation of measured slopes with exact derivatives, {name_of_dtype}", caption="* recommended"
    )
    result.add_column("epsilon", justify="right")
    columns = []
    for name in ESTIMATORS:
        result.add_column(name, justify="right")
        best = recommended_epsilon(rows, name)
        columns.append([f"{row.correlation:.3f}{'*' if row == best else ' '}" for row in rows if row.estimator == name])
    epsilons = dict.fromkeys(row.epsilon for row in rows)
    for epsilon, *cells in zip(epsilons, *columns, strict=True):
        result.add_row(f"{epsilon:g}", *cells)
    return result


def advice(rows: Sequence[EpsilonRow], estimator: str, default: float) -> str:
    """Return a line that says which epsilon to use with an estimator.

    Args:
        rows: Result of `measure_epsilons`.
        estimator: `two_sided` or `one_sided`.
        default: Default epsilon.
    """
    best = recommended_epsilon(rows, estimator)
    line = f"{estimator}: epsilon={best.epsilon:g} (correlation {best.correlation:.3f}; the default is {default:g})"
    if best.correlation < _GOOD_CORRELATION:
        line += "; no distance measures well: use a higher precision, or the estimator ForwardMode"
    return line


def plot(rows: Sequence[EpsilonRow], path: Path) -> None:
    """Plot the correlations over epsilon.

    Args:
        rows: Result of `measure_epsilons`.
        path: File to write, in the format of its suffix.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for name in ESTIMATORS:
        mine = [row for row in rows if row.estimator == name]
        axes.semilogx([row.epsilon for row in mine], [row.correlation for row in mine], "o-", label=name)
    axes.set(xlabel="epsilon", ylabel="correlation with the exact derivative", ylim=(-0.1, 1.05))
    axes.legend(loc="lower center")
    figure.savefig(path)


def _correlation(slopes: Tensor, exact: Tensor) -> float:
    product = (slopes * exact).sum()
    lengths = sqrt(float(slopes.square().sum())) * sqrt(float(exact.square().sum()))
    return float(product) / lengths if lengths else 0.0
