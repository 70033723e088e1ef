"""Query schedules: the number of queries of each step."""

from abc import ABC, abstractmethod
from math import ceil, floor, log

from torch import Tensor
from typing_extensions import override

from wandazeta.utilities.arguments import check_at_least
from wandazeta.zeroth_order.aggregation import ProjectedGradients


class QuerySchedule(ABC):
    """Base class of query schedules: the number of queries of a step, by its epoch and by the slopes of earlier steps.

    A schedule that depends on slopes keeps its state in a tensor of the caller, which belongs into checkpoints.
    """

    num_states = 0
    """Number of values of the state."""

    @property
    @abstractmethod
    def min_queries(self) -> int:
        """The fewest queries of any step."""

    @property
    @abstractmethod
    def max_queries(self) -> int:
        """The most queries of any step."""

    @abstractmethod
    def num_queries(self, epoch: int, states: Tensor | None = None) -> int:
        """Return the number of queries of the next step.

        Args:
            epoch: Epoch of the step, counted from 0.
            states: State of the schedule, shape `(num_states,)`, fp64, zeros before the first step. Schedules without
                a state do not need it.
        """

    def observe_(self, states: Tensor, slopes: ProjectedGradients) -> None:
        """Update the state in place with the slopes of a step.

        Args:
            states: State of the schedule.
            slopes: Slopes of all ranks, at least one.
        """
        assert self.num_states == 0, "schedules with a state override this method"


class ConstantSchedule(QuerySchedule):
    """The same number of queries in every step.

    Args:
        num_queries: Queries of a step.

    Raises:
        ValueError: If it is below 1.
    """

    def __init__(self, num_queries: int = 1) -> None:
        check_at_least("num_queries", num_queries, 1)
        self._num_queries = num_queries

    @property
    @override
    def min_queries(self) -> int:
        return self._num_queries

    @property
    @override
    def max_queries(self) -> int:
        return self._num_queries

    @override
    def num_queries(self, epoch: int, states: Tensor | None = None) -> int:
        return self._num_queries

    def __repr__(self) -> str:
        return f"ConstantSchedule(num_queries={self._num_queries})"


class AdaZetaSchedule(QuerySchedule):
    """More queries as training goes on: `Q = min(max(⌊alpha · epoch^beta⌋, 1), max_queries)` (arXiv 2406.18060).

    Args:
        alpha: Queries after one epoch, before rounding down.
        beta: Exponent of the growth; sub-linear below 1, as in the paper.
        max_queries: Upper bound of the queries of a step.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> schedule = AdaZetaSchedule.from_target(final_queries=20, num_epochs=160)
        >>> [schedule.num_queries(epoch) for epoch in (0, 1, 10, 40, 100)]
        [1, 1, 3, 8, 14]
    """

    def __init__(self, alpha: float = 0.85, beta: float = 0.6, max_queries: int = 15) -> None:
        if alpha <= 0 or beta < 0:
            raise ValueError(f"Expected arguments `alpha` > 0 and `beta` >= 0, but got {alpha} and {beta}.")
        check_at_least("max_queries", max_queries, 1)
        self.alpha = alpha
        self.beta = beta
        self._max_queries = max_queries

    @classmethod
    def from_target(
        cls, final_queries: int = 20, num_epochs: int = 160, alpha: float = 0.85, max_queries: int = 15
    ) -> "AdaZetaSchedule":
        """Derive `beta` as AdaZeta's released code does: `ln(final_queries / alpha) / ln(num_epochs)`.

        Args:
            final_queries: Number of queries that the unbounded schedule reaches at epoch `num_epochs`.
            num_epochs: Length of the run in epochs, at least 2.
            alpha: Queries after one epoch, before rounding down.
            max_queries: Upper bound of the queries of a step.
        """
        check_at_least("num_epochs", num_epochs, 2)
        if alpha <= 0 or final_queries < alpha:
            raise ValueError(
                f"Expected arguments `alpha` > 0 and `final_queries` >= `alpha`, but got {alpha} and {final_queries}."
            )
        return cls(alpha, log(final_queries / alpha) / log(num_epochs), max_queries)

    @property
    @override
    def min_queries(self) -> int:
        return self.num_queries(0)

    @property
    @override
    def max_queries(self) -> int:
        return self._max_queries

    @override
    def num_queries(self, epoch: int, states: Tensor | None = None) -> int:
        # the tolerance lets a schedule from `from_target` reach its target in spite of rounding
        return min(max(floor(self.alpha * epoch**self.beta + 1e-9), 1), self._max_queries)

    def __repr__(self) -> str:
        return f"AdaZetaSchedule(alpha={self.alpha}, beta={self.beta:.4f}, max_queries={self._max_queries})"


class VarianceSchedule(QuerySchedule):
    """More queries as the slopes become smaller: `Q = ⌈min_queries · v_max / v⌉`, at most `max_queries`.

    v is the running mean of the squared slopes. The mean of a squared slope over z is the squared length of the batch's
    gradient, the signal that a query measures. Noise that does not become smaller with the gradient (rounding, steps
    whose length an update rule normalises) is averaged out as 1/Q, so the signal-to-noise ratio of a step is
    proportional to Q · v. The schedule keeps it at its value for v_max, the largest v so far. During the first `window`
    steps, in which the mean is not yet reliable, Q is `min_queries`.

    Args:
        min_queries: Queries while the slopes are largest; by default 4, or `max_queries` if that is smaller.
        max_queries: Upper bound of the queries of a step; by default 16, or `min_queries` if that is larger.
        window: Number of steps that the running mean covers.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch
        >>> schedule, states = VarianceSchedule(min_queries=2, max_queries=16, window=1), torch.zeros(3).double()
        >>> for slope in (4.0, 2.0, 1.0):
        ...     schedule.observe_(states, ProjectedGradients((0, 1), (slope, -slope), 0))
        ...     print(schedule.num_queries(0, states))
        2
        8
        16
    """

    num_states = 3  # number of steps, running mean before its bias correction, largest corrected mean

    def __init__(self, min_queries: int | None = None, max_queries: int | None = None, window: int = 100) -> None:
        if min_queries is None:
            min_queries = 4 if max_queries is None else min(4, max_queries)
        if max_queries is None:
            max_queries = max(16, min_queries)
        check_at_least("min_queries", min_queries, 1)
        check_at_least("max_queries", max_queries, min_queries)
        check_at_least("window", window, 1)
        self._min_queries = min_queries
        self._max_queries = max_queries
        self.window = window

    @property
    @override
    def min_queries(self) -> int:
        return self._min_queries

    @property
    @override
    def max_queries(self) -> int:
        return self._max_queries

    @override
    def num_queries(self, epoch: int, states: Tensor | None = None) -> int:
        assert states is not None
        steps, mean, largest = states.tolist()
        if steps < self.window:
            return self._min_queries
        mean = self._corrected(steps, mean)
        # compared before dividing, as slopes can be zero
        if self._min_queries * largest >= self._max_queries * mean:
            return self._max_queries
        # the tolerance keeps rounding from adding a query where the ratio is whole
        return ceil(self._min_queries * largest / mean - 1e-9)

    @override
    def observe_(self, states: Tensor, slopes: ProjectedGradients) -> None:
        steps, mean, largest = states.tolist()
        square = sum(value * value for value in slopes.values) / len(slopes.values)
        steps, mean = steps + 1, mean + (square - mean) / self.window
        if steps >= self.window:
            largest = max(largest, self._corrected(steps, mean))
        states.copy_(states.new_tensor([steps, mean, largest]))

    def _corrected(self, steps: float, mean: float) -> float:
        """Return the running mean without the bias of its start at zero."""
        return mean / (1 - (1 - 1 / self.window) ** steps)

    def __repr__(self) -> str:
        return (
            f"VarianceSchedule(min_queries={self._min_queries}, max_queries={self._max_queries}, window={self.window})"
        )
