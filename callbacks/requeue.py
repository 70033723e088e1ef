"""Requeueing a SLURM job on several ranks."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from typing_extensions import override


def requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """The signal by which SLURM announces that the job is to be requeued; none without SLURM or requeueing."""
    # the strategy of a single device has none
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


class RequeueTogether(Callback):
    """Lets all ranks handle SLURM's requeue signal at the end of the same training step.

    Lightning's handler writes a checkpoint, which all ranks must take part in, wherever the signal finds each rank: one
    that is just waiting for the others' gradients or losses then waits for ever. Here the signal is noted down, the
    ranks tell each other at the end of every step, one number each, and call Lightning's handler together. Without
    SLURM, or with a single rank, nothing is changed. `wandazeta` adds this callback to every run.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._handler: Callable[[int, FrameType | None], Any] | int | None = None
        self._received = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():
            self._signal = requeue_signal(trainer)
        if self._signal is not None:
            self._received = False
            self._handler = signal.signal(self._signal, self._note)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._signal is None:
            return
        received = torch.tensor(float(self._received), device=pl_module.device)
        if float(trainer.strategy.reduce(received, reduce_op="sum")) == 0:
            return
        announced, handler, self._signal = self._signal, self._handler, None
        # its own may still be on the way to a rank
        signal.signal(announced, signal.SIG_IGN)
        if callable(handler):
            handler(announced, None)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._signal is not None:
            signal.signal(self._signal, self._handler)
            self._signal = None
