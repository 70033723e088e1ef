"""How many queries a step spends."""

from math import floor, log
from typing import Protocol

from torch import Tensor

from wandazeta.utilities.arguments import check_at_least
from wandazeta.zeroth_order.estimators import ProjectedGradients


class QuerySchedule(Protocol):
    """Number of queries of a step, by its epoch and by what the steps before it measured."""

    num_states: int

    @property
    def min_queries(self) -> int:
        """The fewest queries any step will have."""

    @property
    def max_queries(self) -> int:
        """The most queries any step will have."""

    def num_queries(self, epoch: int, states: Tensor) -> int:
        """Queries of a step.

        Args:
            epoch: Epoch of the step, counted from 0.
            states: What the schedule remembers, shape `(num_states,)`, fp64, zeros before the first step.
        """
        ...

    def observe_(self, states: Tensor, slopes: ProjectedGradients) -> None:
        """Take the slopes of a step into account, in place.

        Args:
            states: What the schedule remembers.
            slopes: Slopes of all ranks, at least one.
        """
        ...


class EpochSchedule:
    """A number of queries that the epoch alone decides."""

    num_states = 0

    def observe_(self, states: Tensor, slopes: ProjectedGradients) -> None:
        """Remember nothing."""


class ConstantSchedule(EpochSchedule):
    """The same number of queries in every step.

    Args:
        num_queries: Queries a step.
    """

    def __init__(self, num_queries: int = 1) -> None:
        check_at_least("num_queries", num_queries, 1)
        self._num_queries = num_queries

    @property
    def min_queries(self) -> int:
        """The fewest queries any step will have."""
        return self._num_queries

    @property
    def max_queries(self) -> int:
        """The most queries any step will have."""
        return self._num_queries

    def num_queries(self, epoch: int, states: Tensor | None = None) -> int:
        """Queries of every step in an epoch, counted from 0."""
        return self._num_queries

    def __repr__(self) -> str:
        return f"ConstantSchedule(num_queries={self._num_queries})"


class AdaZetaSchedule(EpochSchedule):
    """More queries as training goes on: `Q = min(max(⌊alpha · epoch^beta⌋, 1), max_queries)` (arXiv 2406.18060).

    Args:
        alpha: Queries after one epoch, before rounding down.
        beta: Exponent of the growth; sub-linear below 1, as in the paper.
        max_queries: Upper bound of the queries a step.

    Example:
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
        """Derive `beta` as the released code does: `ln(final_queries / alpha) / ln(num_epochs)`.

        Args:
            final_queries: Number that the unbounded schedule reaches at epoch `num_epochs`.
            num_epochs: Length of the run in epochs, at least 2.
            alpha: Queries after one epoch, before rounding down.
            max_queries: Upper bound of the queries a step.
        """
        check_at_least("num_epochs", num_epochs, 2)
        if alpha <= 0 or final_queries < alpha:
            raise ValueError(
                f"Expected arguments `alpha` > 0 and `final_queries` >= `alpha`, but got {alpha} and {final_queries}."
            )
        return cls(alpha, log(final_queries / alpha) / log(num_epochs), max_queries)

    @property
    def min_queries(self) -> int:
        """The fewest queries any step will have: those of epoch 0."""
        return self.num_queries(0)

    @property
    def max_queries(self) -> int:
        """The most queries any step will have."""
        return self._max_queries

    def num_queries(self, epoch: int, states: Tensor | None = None) -> int:
        """Queries of every step in an epoch, counted from 0."""
        # the tolerance lets a schedule made for a target reach it in spite of rounding
        return min(max(floor(self.alpha * epoch**self.beta + 1e-9), 1), self._max_queries)

    def __repr__(self) -> str:
        return f"AdaZetaSchedule(alpha={self.alpha}, beta={self.beta:.4f}, max_queries={self._max_queries})"
