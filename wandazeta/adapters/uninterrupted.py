"""Putting signals off for as long as weights are not what a checkpoint should hold."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put every signal that Python code handles off to the end of the context, where its handler runs.

    A handler such as Lightning's for SLURM writes a checkpoint wherever it comes in between two instructions. Outside
    the main thread, where no handler runs, nothing is changed.
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
        for came in received:
            signal.raise_signal(came)
