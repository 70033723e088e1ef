"""Putting signals off until the block that is being pruned is on disk."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class DeferredSignals:
    """While the context is open, a signal sets a flag instead of ending the process.

    Lightning registers its own handlers only after `setup`, where the pruning happens, and its handler would write a
    checkpoint of a half-pruned model. A second Ctrl+C ends the process at once: the progress folder survives that.
    Outside the main thread, where Python allows no handlers, nothing is changed.

    Args:
        extra: A further signal to put off, such as the one a cluster announces a requeue with.
    """

    def __init__(self, extra: signal.Signals | None = None) -> None:
        names = ("SIGTERM", "SIGINT", "SIGUSR1")
        self._watched = {getattr(signal, name) for name in names if hasattr(signal, name)}
        if extra is not None:
            self._watched.add(extra)
        self._previous: dict[signal.Signals, object] = {}
        self.received: signal.Signals | None = None
        """The signal that came, if any."""

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(signum)

    def __enter__(self) -> "DeferredSignals":
        if threading.current_thread() is threading.main_thread():
            for signum in self._watched:
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            # None: the handler was not set from Python, so it cannot be put back from Python
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]
        self._previous.clear()


def requeue_slurm_job() -> str:
    """Asks SLURM to run this job again.

    Returns:
        What happened, as a line for the log.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not re.fullmatch(r"[0-9][0-9_-]*", job):
        return "no SLURM job id in the environment, so nothing was requeued"
    try:
        code = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except OSError as error:
        return f"`scontrol requeue {job}` could not be run: {error}"
    return f"`scontrol requeue {job}` " + ("done" if code == 0 else f"failed with code {code}")


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer every signal that has a handler in Python to the end of the context, where its handler runs.

    Otherwise a handler such as Lightning's for SLURM may write a checkpoint between any two instructions. Outside the
    main thread, where no handler runs, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)
