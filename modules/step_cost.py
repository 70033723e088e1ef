"""What a step of zeroth-order training costs, reported at the start of a fit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from lightning.pytorch.utilities import rank_zero_info

__all__ = ["StepCost", "duration"]


class StepCost:
    """Reports the forwards of a step before the first one, and seconds and time left after the second one.

    While steps fill the cache of frozen prefixes, they take longer than later ones: their time is reported as such, and
    the time left only after the first step that finds all prefixes.

    Args:
        cached_bytes: Returns the size of the cache.
    """

    def __init__(self, cached_bytes: Callable[[], int]) -> None:
        self._cached_bytes = cached_bytes
        self._num_measured = 0
        self.is_reported = False
        """Whether everything is said."""

    @contextmanager
    def measured(self, num_forwards: int, num_examples: int, num_left: int | None) -> Iterator[None]:
        """Context manager around a step.

        Args:
            num_forwards: Forward passes of the step.
            num_examples: Examples in each.
            num_left: Steps of the run from this one on; None if it has no end.
        """
        if self._num_measured == 0:
            rank_zero_info(f"A step is {num_forwards:,} forwards of {num_examples:,} examples.")
        before, start = self._cached_bytes(), perf_counter()
        yield
        seconds = perf_counter() - start
        self._num_measured += 1
        # the first step also warms up
        if self._num_measured == 1 and num_left != 1:
            return
        more = 0 if num_left is None else num_left - 1
        if self._cached_bytes() > before and more:
            if self._num_measured == 2:
                rank_zero_info(
                    f"A step takes {duration(seconds)} at first, while the layers below the adapters run once for "
                    "each example; later steps are faster."
                )
            return
        self.is_reported = True
        rest = f"; {more:,} more steps take about {duration(more * seconds)}" if more else ""
        rank_zero_info(f"A step takes {duration(seconds)}{rest}.")


def duration(seconds: float) -> str:
    """Write a time with its unit.

    Args:
        seconds: The time.

    Examples:
        >>> duration(0.25), duration(90), duration(9000)
        ('250 ms', '90.0 s', '2.5 h')
    """
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
