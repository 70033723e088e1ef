"""Deferred signals, and requeueing of SLURM jobs."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = frozenset(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
"""Signals that ask a process to stop."""


class DeferredSignals:
    """Context manager that records signals instead of letting their handlers run in the middle of some work.

    By default it defers every signal that has a handler in Python, and raises those that arrived again when the context
    ends, so that their handlers run then. With `deliver=False` the caller asks for `received` and decides what to do;
    a second Ctrl+C then raises KeyboardInterrupt at once. Outside the main thread, where Python allows no handlers, it
    does nothing.

    Args:
        signals: Signals to defer; by default all that have a handler in Python.
        deliver: Raise the deferred signals again when the context ends.

    Examples:
        >>> with DeferredSignals([signal.SIGTERM], deliver=False) as signals:
        ...     signal.raise_signal(signal.SIGTERM)
        >>> signals.received
        <Signals.SIGTERM: 15>
    """

    def __init__(self, signals: Iterable[signal.Signals] | None = None, deliver: bool = True) -> None:
        self._signals = None if signals is None else set(signals)
        self._deliver = deliver
        self._previous: dict[int, Any] = {}
        self._received: list[int] = []

    @property
    def received(self) -> signal.Signals | None:
        """The last signal that arrived, or None."""
        return signal.Signals(self._received[-1]) if self._received else None

    def _record(self, signum: int, frame: FrameType | None) -> None:
        if self._received and signum == signal.SIGINT and not self._deliver:
            raise KeyboardInterrupt
        self._received.append(signum)

    def __enter__(self) -> "DeferredSignals":
        self._received.clear()
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in self._signals or signal.valid_signals()}
            if self._signals is None:
                self._previous = {number: handler for number, handler in self._previous.items() if callable(handler)}
            for number in self._previous:
                signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python, so Python cannot install it again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        if self._deliver:
            for number in self._received:
                signal.raise_signal(number)


def requeue_slurm_job() -> str:
    """Ask SLURM to run this job again.

    Returns:
        A line for the log that says whether it worked.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not re.fullmatch(r"[0-9][0-9_-]*", job):
        return "nothing was requeued, because the environment has no SLURM job id"
    try:
        code = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except OSError as error:
        return f"`scontrol requeue {job}` could not be run: {error}"
    return f"`scontrol requeue {job}` " + ("done" if code == 0 else f"failed with code {code}")
