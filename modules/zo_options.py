"""Choices of the zeroth-order step that go together or do not."""

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from wandazeta.utilities.arguments import check_range
from wandazeta.zeroth_order import (
    AGGREGATIONS,
    DISTRIBUTIONS,
    Estimator,
    ForwardMode,
    OneSided,
    QuerySchedule,
    TwoSided,
)

# What `wandazeta diagnose` finds best on SmolLM2-135M for the worse of two starts of the adapters
# (benchmarks/results/epsilon.json); in fp16, not measured, rounding is far below bf16's and curvature as in fp32
EPSILON = {torch.float32: 1e-3, torch.float16: 3e-3, torch.bfloat16: 3e-3}
# a loss is rounded to about eps of itself: from a quarter of it down, rounding is a good part of every slope
_NOISY = {dtype: torch.finfo(dtype).eps / 4 for dtype in EPSILON}

ESTIMATORS = ("two_sided", "one_sided", "forward_mode")


def make_estimator(name: str, epsilon: float) -> Estimator:
    """Return the estimator of a name.

    Args:
        name: One of `ESTIMATORS`.
        epsilon: Distance of the perturbed vectors, where there are any.
    """
    if name == "forward_mode":
        return ForwardMode()
    return TwoSided(epsilon) if name == "two_sided" else OneSided(epsilon)


def check_zo_options(
    schedule: QuerySchedule,
    estimator: str,
    directions: str,
    aggregation: str,
    epsilon: float | None,
    max_forwards: int | None,
) -> None:
    """Check what does not need the model.

    Raises:
        ValueError: If an option is unknown or out of range, or does not go with another.
    """
    for name, value, known in (
        ("estimator", estimator, ESTIMATORS),
        ("directions", directions, DISTRIBUTIONS),
        ("aggregation", aggregation, AGGREGATIONS),
    ):
        check_range(name, value, value in known, f"one of {', '.join(known)}")
    check_range("epsilon", epsilon, epsilon is None or epsilon > 0, "above 0")
    if epsilon is not None and estimator == "forward_mode":
        rank_zero_warn(f"epsilon={epsilon} has no effect: forward-mode derivatives are exact")
    if aggregation == "fzoo" and schedule.min_queries < 2:
        raise ValueError(
            "Expected argument `schedule` to have at least 2 queries in every step, as the deviation that "
            f'aggregation="fzoo" divides by needs them, but got {schedule}'
        )
    first = make_estimator(estimator, epsilon or 1.0).num_forwards(schedule.min_queries)
    check_range(
        "max_forwards", max_forwards, max_forwards is None or max_forwards >= first, f"at least the {first} of a step"
    )


def check_weights_options(
    estimator: str, directions: str, aggregation: str, parts: str, num_classes: int | None
) -> None:
    """Check what goes with the model's own weights, of which the step knows coordinates along its directions alone.

    Raises:
        ValueError: If an option needs the directions themselves, or a new head would stay as it is.
    """
    if parts == "biases" and num_classes is not None:
        raise ValueError(
            "Expected argument `parts` to be all or biases_and_head for a model with `num_classes`, but got 'biases', "
            "which leaves the new head at zero"
        )
    for name, value, known in (
        ("estimator", estimator, ("two_sided", "one_sided")),
        ("directions", directions, ("gaussian",)),
        ("aggregation", aggregation, ("mean", "fzoo")),
    ):
        if value not in known:
            raise ValueError(
                f"Expected argument `{name}` to be {' or '.join(known)} where `Weights` are trained, but got "
                f"{value!r}; choose that, or train adapters"
            )


def warn_of_waste(
    estimator: Estimator,
    schedule: QuerySchedule,
    parallel: Literal["queries", "data"],
    world_size: int,
    epsilon: float | None,
    dtype: torch.dtype,
) -> None:
    """Warn where ranks have nothing to do, and where rounding would drown what is measured."""
    if parallel == "queries" and estimator.num_points(schedule.max_queries) < world_size:
        rank_zero_warn(f"{schedule.max_queries} queries on {world_size} ranks: some ranks have nothing to do")
    if epsilon is not None and epsilon < _NOISY[dtype]:
        rank_zero_warn(
            f"epsilon={epsilon} is small for {dtype}: much of the loss differences will be rounding; "
            f"{EPSILON[dtype]} is the default, `wandazeta diagnose` measures"
        )


def compute_dtype(precision: str, backbone: nn.Module) -> torch.dtype:
    """Precision of a forward of the backbone under a trainer's precision."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    if precision.startswith("16"):
        return torch.float16
    # ZeRO-3 keeps the dtype of what it shards
    dtype = next(p.dtype for p in backbone.parameters() if p.is_floating_point())
    return dtype if dtype in EPSILON else torch.float32


class NonFiniteLossError(ValueError):
    """Training has diverged, or its data or precision make losses that are not finite."""


def check_finite_steps(nonfinite_steps: int, most: int, step: int) -> None:
    """Stop a run whose losses are not finite for good.

    Args:
        nonfinite_steps: Steps in a row without any finite query.
        most: How many there may not be.
        step: The last of them.

    Raises:
        NonFiniteLossError: If there are that many.
    """
    if nonfinite_steps >= most:
        raise NonFiniteLossError(
            f"Expected finite losses, but for {nonfinite_steps} steps (up to step {step}) every query was "
            "nan or infinite; lower `learning_rate` or `epsilon`, and check the data and the precision"
        )
