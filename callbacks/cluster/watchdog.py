"""Ending all ranks of a run once one of them is lost."""

import contextlib
import os
import signal
import sys
import threading
import time
from itertools import count
from subprocess import Popen
from typing import NoReturn

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.distributed_c10d import _get_default_store
from typing_extensions import override

_PERIOD_S = 2.0
# silent looks after which a rank is lost: 40 s, for what holds Python's lock for long is healthy
_LOOKS = 20
# looks that a rank has to end by itself once another has failed
_GRACE = 3
# above any count of beats: the rank has left
_LEFT = 2**40
_AGAIN = "start the same command again, what is finished is kept"
# the ranks' callbacks come to their runs in the same order
_runs = count()


class RankWatchdog(Callback):
    """Ends all ranks within a minute, and names the rank, when one was killed or its machine went away.

    Without it gloo says "Connection closed by peer", NCCL waits for many minutes, and neither names the rank. Every
    rank counts up a number in the process group's store from a thread and watches its neighbour's: one that stands
    still for 40 seconds is lost. Where a collective fails before that, the ranks find out at once who is gone. A rank
    that leaves, at its end or with an error of its own, says so and is not taken for lost. It works from `setup` to
    `teardown`, so while a callback prunes, too; put it before all others. With a single rank nothing is done.
    `wandazeta` adds this callback to every run.
    """

    def __init__(self) -> None:
        self._watch: _Watch | None = None

    def _start(self, trainer: Trainer) -> "_Watch | None":
        if self._watch is None and trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            # what Lightning's launcher has started, if it is the one that did
            children: list[Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
            self._watch = _Watch(next(_runs), trainer.global_rank, trainer.world_size, children)
        return self._watch

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        watch = self._start(trainer)
        if watch is not None:
            watch.begin()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._watch is not None:
            self._watch.leave()
            self._watch = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # not begun where the error came before `setup`
        watch = self._start(trainer)
        if watch is None:
            return
        if _is_of_collective(exception):
            if threading.current_thread() is threading.main_thread():
                # of a launcher that has noticed, too: Lightning's handler would try to tell the others
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            line = watch.find()
            if line is not None:
                watch.end(line)
        watch.fail()
        self._watch = None


def _is_of_collective(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class _Watch:
    """One rank's part: its beats, and its looks at the neighbour's.

    Args:
        run: Number of the run in this process.
        rank: This rank.
        size: Number of ranks.
        children: Processes of the ranks that follow this one, where it has started them.
    """

    def __init__(self, run: int, rank: int, size: int, children: "list[Popen[bytes]]") -> None:
        self._rank, self._size, self._children = rank, size, children
        self._neighbour = (rank - 1) % size
        # a connection of its own: one that is shared waits while the other thread does
        own = _get_default_store().clone()  # type: ignore[attr-defined]
        self._store = dist.PrefixStore(f"end_together/{run}", own)
        self._num_answers = self._beat = 0
        self._verdict = ""
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        # two, for the store is in rank 0: while that is stopped whoever asks it waits
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._look)]

    def begin(self) -> None:
        """Start to beat and to look."""
        self._store.add(f"beat/{self._rank}", 1)
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Say that this rank has come to its end; rank 0, which may hold the store, waits for the others'."""
        self._say_left()
        with contextlib.suppress(dist.DistError):
            before = self._beats()
            while self._rank == 0 and not self._all_left(_LOOKS * _PERIOD_S):
                after = self._beats()
                silent = self._silent(before, after)
                if silent is not None:
                    self.end(self._judge(_lost(silent)))
                before = after
        self._stop()

    def fail(self) -> None:
        """Say that this rank ends with an error of its own; rank 0 waits until the others know."""
        with contextlib.suppress(dist.DistError):
            self._judge(f"rank {self._rank} ended with an error, which it has told where it ran; {_AGAIN}")
        self._say_left()
        with contextlib.suppress(dist.DistError):
            if self._rank == 0:
                self._all_left(2 * _PERIOD_S)
        self._stop()

    def find(self) -> str | None:
        """Look for a rank that is gone, after a collective has failed.

        Returns:
            What is wrong, if another rank is.
        """
        deadline = time.monotonic() + 2.5 * _PERIOD_S
        try:
            before = self._beats()
            while not self._verdict and time.monotonic() < deadline:
                self._verdict = self._judge(self._killed_child())
                time.sleep(0.05)
            after = self._beats()
            silent = self._silent(before, after)
            waiting = [rank for rank in range(self._size) if after[rank] == 0]
            if silent is None and len(waiting) == 1:
                silent = waiting[0]
            if silent is not None:
                return self._verdict or self._judge(_lost(silent))
            if waiting:
                # most of them are still loading, and one is lost
                return self._verdict or self._judge(f"one of the ranks {waiting} is lost before it began; {_AGAIN}")
            return self._verdict or None
        except dist.DistError:
            return self._verdict or _lost(0)

    def end(self, line: str) -> NoReturn:
        """End this process, and those that it has started as Lightning's own observer of them does."""
        # of two threads that come here one goes on
        self._ending.acquire()
        sys.stdout.flush()
        sys.stderr.write(f"error: {line}\n")
        sys.stderr.flush()
        if self._rank == 0 and self._size > 2:
            # the others have to read it in the store
            time.sleep(2 * _PERIOD_S)
        for child in self._children:
            child.kill()
        os._exit(1)

    def _silent(self, before: list[int], after: list[int]) -> int | None:
        """The first other rank that has begun, has not left and has not beaten in between."""
        others = (rank for rank in range(self._size) if rank != self._rank)
        return next((rank for rank in others if 0 < before[rank] == after[rank] < _LEFT), None)

    def _all_left(self, seconds: float) -> bool:
        """Wait for all ranks to leave, at most so long; looks are counted, as a whole job may be stopped meanwhile."""
        for _ in range(int(seconds / 0.05)):
            if self._store.add("left", 0) >= self._size:
                return True
            time.sleep(0.05)
        return False

    def _say_left(self) -> None:
        with contextlib.suppress(dist.DistError):
            self._store.add(f"beat/{self._rank}", _LEFT)
            self._store.add("left", 1)

    def _stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_PERIOD_S)

    def _judge(self, line: str) -> str:
        """Say what is wrong, and return what was said first by any rank."""
        return self._store.compare_set("verdict", "", line).decode()

    def _beats(self) -> list[int]:
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self._size)]

    def _killed_child(self) -> str:
        for place, child in enumerate(self._children):
            code = child.poll()
            if code is not None and code < 0:
                return f"rank {self._rank + 1 + place} was killed by {signal.Signals(-code).name}; {_AGAIN}"
        return ""

    def _talk(self) -> None:
        while not self._stopped.wait(_PERIOD_S):
            # where the store is gone there are no answers, which is noticed below
            with contextlib.suppress(dist.DistError):
                self._store.add(f"beat/{self._rank}", 1)
                self._beat = self._store.add(f"beat/{self._neighbour}", 0)
                self._verdict = self._verdict or self._judge("")
                self._num_answers += 1

    def _look(self) -> None:
        # looks are counted and not seconds: where a whole job is stopped for a while, nobody looks
        num_answers = beat = unanswered = silent = judged = 0
        while not self._stopped.wait(_PERIOD_S):
            unanswered = unanswered + 1 if self._num_answers == num_answers else 0
            # a rank that has not begun is still loading its data
            silent = silent + 1 if self._beat == beat and 0 < beat < _LEFT else 0
            judged += bool(self._verdict)
            num_answers, beat = self._num_answers, self._beat
            if judged > _GRACE:
                self.end(self._verdict)
            if unanswered == _LOOKS:
                self.end(_lost(0))
            if silent == _LOOKS:
                self._verdict = self._judge(_lost(self._neighbour))
                self.end(self._verdict)


def _lost(rank: int) -> str:
    return f"rank {rank} is lost: it was killed, or its machine does not answer; {_AGAIN}"
