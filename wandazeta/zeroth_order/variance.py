"""More queries as the slopes get small."""

from math import ceil

from torch import Tensor

from wandazeta.utilities.arguments import check_at_least
from wandazeta.zeroth_order.estimators import ProjectedGradients


class VarianceSchedule:
    """More queries when the signal in the slopes falls: `Q = ⌈min_queries · v_max / v⌉`, at most `max_queries`.

    The mean over z of a squared slope is the squared length of the batch's gradient: v, its running mean, is the signal
    that a query measures. Noise that does not shrink with the gradient (rounding, steps whose length an update
    normalises) is averaged out as 1/Q, so the ratio of signal to noise of a step goes with Q · v, and the schedule
    keeps it where it was at v_max, the largest v so far. In the first `window` steps the mean settles and Q is
    `min_queries`.

    Args:
        min_queries: Queries while the slopes are largest.
        max_queries: Upper bound of the queries a step.
        window: Steps that the running mean reaches back.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> schedule, states = VarianceSchedule(min_queries=2, max_queries=16, window=1), torch.zeros(3).double()
        >>> for slope in (4.0, 2.0, 1.0):
        ...     schedule.observe_(states, ProjectedGradients((0, 1), (slope, -slope), 0))
        ...     print(schedule.num_queries(0, states))
        2
        8
        16
    """

    num_states = 3  # steps seen, running mean before its correction, largest corrected mean

    def __init__(self, min_queries: int = 4, max_queries: int = 16, window: int = 100) -> None:
        check_at_least("min_queries", min_queries, 1)
        check_at_least("max_queries", max_queries, min_queries)
        check_at_least("window", window, 1)
        self._min_queries = min_queries
        self._max_queries = max_queries
        self.window = window

    @property
    def min_queries(self) -> int:
        """The fewest queries any step will have."""
        return self._min_queries

    @property
    def max_queries(self) -> int:
        """The most queries any step will have."""
        return self._max_queries

    def num_queries(self, epoch: int, states: Tensor) -> int:
        """Queries of the next step, as `QuerySchedule.num_queries` says."""
        steps, mean, largest = states.tolist()
        if steps < self.window:
            return self._min_queries
        mean = self._corrected(steps, mean)
        # compared before dividing, as slopes can be zero
        if self._min_queries * largest >= self._max_queries * mean:
            return self._max_queries
        # the tolerance keeps rounding from adding a query where the ratio is whole
        return ceil(self._min_queries * largest / mean - 1e-9)

    def observe_(self, states: Tensor, slopes: ProjectedGradients) -> None:
        """Take the mean square of the slopes of a step into account, as `QuerySchedule.observe_` says."""
        steps, mean, largest = states.tolist()
        square = sum(value * value for value in slopes.values) / len(slopes.values)
        steps, mean = steps + 1, mean + (square - mean) / self.window
        if steps >= self.window:
            largest = max(largest, self._corrected(steps, mean))
        states.copy_(states.new_tensor([steps, mean, largest]))

    def _corrected(self, steps: float, mean: float) -> float:
        return mean / (1 - (1 - 1 / self.window) ** steps)

    def __repr__(self) -> str:
        return (
            f"VarianceSchedule(min_queries={self._min_queries}, max_queries={self._max_queries}, window={self.window})"
        )
