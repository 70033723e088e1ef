"""End all ranks of a run when one of them is lost."""

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
from typing_extensions import override

from wandazeta.lightning_compat import default_store, launched_processes

PERIOD_S = 2.0
# periods without a heartbeat after which a rank is lost: 40 s, because long work under Python's lock is healthy
MAX_SILENT_PERIODS = 20
# periods that a rank has to end by itself once another one has failed
_GRACE_PERIODS = 3
# heartbeat of a rank that has left, above any count
_LEFT = 2**40
_REMEDY = "start the same command again, finished work is kept"
# numbers the runs of a process; all ranks create their callbacks in the same order
_runs = count()


class RankWatchdog(Callback):
    """Ends all ranks within a minute, with an error that names the rank, when one is killed or its machine fails.

    Without it, gloo reports "Connection closed by peer", NCCL waits for many minutes, and neither names the rank.

    A thread on every rank increments a heartbeat in the process group's store and watches that of the neighbouring
    rank; a rank whose heartbeat stands still for 40 seconds is lost. When a collective fails earlier, the ranks look
    for the missing one at once. A rank that finishes, or fails with an error of its own, announces it and is not
    reported as lost.

    It works from `setup` to `teardown`, so also while a callback prunes in its `setup`. Put it before all other
    callbacks. With a single rank it does nothing. `wandazeta` adds it to every run.
    """

    def __init__(self) -> None:
        self._heartbeat: Heartbeat | None = None

    def _get_heartbeat(self, trainer: Trainer) -> "Heartbeat | None":
        if self._heartbeat is None and trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            children = launched_processes(trainer)
            self._heartbeat = Heartbeat(next(_runs), trainer.global_rank, trainer.world_size, children)
        return self._heartbeat

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        heartbeat = self._get_heartbeat(trainer)
        if heartbeat is not None:
            heartbeat.start()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._heartbeat is not None:
            self._heartbeat.leave()
            self._heartbeat = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # created here if the error came before `setup`
        heartbeat = self._get_heartbeat(trainer)
        if heartbeat is None:
            return
        if _is_collective_error(exception):
            if threading.current_thread() is threading.main_thread():
                # a launcher that noticed first sends it, and Lightning's handler would try to reach the other ranks
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            message = heartbeat.find_lost_rank()
            if message is not None:
                heartbeat.end_process(message)
        heartbeat.fail()
        self._heartbeat = None


def _is_collective_error(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class Heartbeat:
    """Heartbeat of one rank, and its watch over the neighbour's.

    Args:
        run: Number of the run in this process.
        rank: This rank.
        size: Number of ranks.
        children: Processes of the following ranks, if this process started them.
    """

    def __init__(self, run: int, rank: int, size: int, children: "list[Popen[bytes]]") -> None:
        self._rank, self._size, self._children = rank, size, children
        self._neighbour = (rank - 1) % size
        # a connection of its own: on a shared one a thread would wait for the request of another
        self._store = dist.PrefixStore(f"rank_watchdog/{run}", default_store().clone())  # type: ignore[attr-defined]
        self._num_answers = self._neighbour_beat = 0
        self._verdict = ""
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        # two threads: rank 0 holds the store, and while it is stopped a request does not return
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._watch)]

    def start(self) -> None:
        """Start the heartbeat and the watch."""
        self._store.add(f"beat/{self._rank}", 1)
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Announce that this rank has finished; rank 0, which may hold the store, waits until all ranks have."""
        self._announce_leaving()
        with contextlib.suppress(dist.DistError):
            before = self._beats()
            while self._rank == 0 and not self._all_left(MAX_SILENT_PERIODS * PERIOD_S):
                after = self._beats()
                silent = self._silent_rank(before, after)
                if silent is not None:
                    self.end_process(self._agree_on_verdict(_lost(silent)))
                before = after
        self.stop()

    def fail(self) -> None:
        """Announce that this rank ends with an error of its own; rank 0 waits until the others know."""
        with contextlib.suppress(dist.DistError):
            self._agree_on_verdict(f"rank {self._rank} failed, see its own error; {_REMEDY}")
        self._announce_leaving()
        with contextlib.suppress(dist.DistError):
            if self._rank == 0:
                self._all_left(2 * PERIOD_S)
        self.stop()

    def find_lost_rank(self) -> str | None:
        """Look for a lost rank after a collective has failed.

        Returns:
            The error message, or None if no other rank is lost.
        """
        deadline = time.monotonic() + 2.5 * PERIOD_S
        try:
            before = self._beats()
            while not self._verdict and time.monotonic() < deadline:
                self._verdict = self._agree_on_verdict(self._killed_child())
                time.sleep(0.05)
            after = self._beats()
            silent = self._silent_rank(before, after)
            not_started = [rank for rank in range(self._size) if after[rank] == 0]
            if silent is None and len(not_started) == 1:
                silent = not_started[0]
            if silent is not None:
                return self._verdict or self._agree_on_verdict(_lost(silent))
            if not_started:
                # most of them are still loading, and one is lost
                message = f"one of the ranks {not_started} was lost before it started; {_REMEDY}"
                return self._verdict or self._agree_on_verdict(message)
            return self._verdict or None
        except dist.DistError:
            return self._verdict or _lost(0)

    def end_process(self, message: str) -> NoReturn:
        """End this process and those that it started, as Lightning's own observer of its processes does."""
        # both threads may come here, and one of them waits
        self._ending.acquire()
        sys.stdout.flush()
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
        if self._rank == 0 and self._size > 2:
            # the other ranks have to read the verdict in the store
            time.sleep(2 * PERIOD_S)
        for child in self._children:
            child.kill()
        os._exit(1)

    def _silent_rank(self, before: list[int], after: list[int]) -> int | None:
        """Return the first other rank that has started, has not left and has no new heartbeat."""
        others = (rank for rank in range(self._size) if rank != self._rank)
        return next((rank for rank in others if 0 < before[rank] == after[rank] < _LEFT), None)

    def _all_left(self, seconds: float) -> bool:
        """Wait until all ranks have left, and return whether they have.

        It counts polls instead of reading a clock, because a scheduler may stop a whole job for a while.
        """
        for _ in range(int(seconds / 0.05)):
            if self._store.add("left", 0) >= self._size:
                return True
            time.sleep(0.05)
        return False

    def _announce_leaving(self) -> None:
        with contextlib.suppress(dist.DistError):
            self._store.add(f"beat/{self._rank}", _LEFT)
            self._store.add("left", 1)

    def stop(self) -> None:
        """Stop the heartbeat and the watch."""
        self._stopped.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(PERIOD_S)

    def _agree_on_verdict(self, message: str) -> str:
        """Publish an error message unless a rank has published one, and return the published one."""
        return self._store.compare_set("verdict", "", message).decode()

    def _beats(self) -> list[int]:
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self._size)]

    def _killed_child(self) -> str:
        for place, child in enumerate(self._children):
            code = child.poll()
            if code is not None and code < 0:
                return f"rank {self._rank + 1 + place} was killed by {signal.Signals(-code).name}; {_REMEDY}"
        return ""

    def _exchange(self) -> None:
        """Send this rank's heartbeat and fetch the neighbour's, until stopped."""
        while not self._stopped.wait(PERIOD_S):
            # a store that is gone does not answer, which `_watch` notices
            with contextlib.suppress(dist.DistError):
                self._store.add(f"beat/{self._rank}", 1)
                self._neighbour_beat = self._store.add(f"beat/{self._neighbour}", 0)
                self._verdict = self._verdict or self._agree_on_verdict("")
                self._num_answers += 1

    def _watch(self) -> None:
        """End the process when the store, the neighbour or another rank is lost, until stopped."""
        # periods are counted instead of seconds: while a whole job is stopped, no time passes
        num_answers = beat = unanswered = silent = periods_since_verdict = 0
        while not self._stopped.wait(PERIOD_S):
            unanswered = unanswered + 1 if self._num_answers == num_answers else 0
            # a rank that has not started is still loading its data
            silent = silent + 1 if self._neighbour_beat == beat and 0 < beat < _LEFT else 0
            periods_since_verdict += bool(self._verdict)
            num_answers, beat = self._num_answers, self._neighbour_beat
            if periods_since_verdict > _GRACE_PERIODS:
                self.end_process(self._verdict)
            if unanswered == MAX_SILENT_PERIODS:
                self.end_process(_lost(0))
            if silent == MAX_SILENT_PERIODS:
                self._verdict = self._agree_on_verdict(_lost(self._neighbour))
                self.end_process(self._verdict)


def _lost(rank: int) -> str:
    return f"rank {rank} is lost: it was killed, or its machine does not answer; {_REMEDY}"
