"""Work in a thread beside the caller."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any

import torch

__all__ = ["BackgroundThread"]


class BackgroundThread:
    """A thread that does one piece of work at a time while the caller goes on.

    A piece that fails raises its error at the next `wait`. The end of the context waits for the piece that is being
    done, whatever ended the context; unless that was an error, it raises that of the piece.

    Args:
        device: Device that the work uses; each thread has a current CUDA device of its own.

    Examples:
        >>> with BackgroundThread(torch.device("cpu")) as thread:
        ...     thread.submit(lambda: 6 * 7)
        ...     thread.wait()
        42
    """

    def __init__(self, device: torch.device) -> None:
        start = None
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            start = partial(torch.cuda.set_device, index)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="wandazeta", initializer=start)
        self._pending: Future[Any] | None = None

    def submit(self, work: Callable[[], Any]) -> None:
        """Start a piece of work; the one before has been waited for.

        Args:
            work: What the thread does.
        """
        assert self._pending is None
        self._pending = self._executor.submit(work)

    def wait(self) -> Any:
        """Wait for the piece of work that was started last; returns at once if there is none.

        Returns:
            What the work returned, once; otherwise None.

        Raises:
            BaseException: The error of the work, once.
        """
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def __enter__(self) -> "BackgroundThread":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown()
        if kind is None:
            self.wait()
