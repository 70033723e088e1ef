"""Requeueing a SLURM job."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from wandazeta.utilities.signals import requeue_slurm_job


def requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """The signal by which SLURM announces that the job is to be requeued; none without SLURM or requeueing."""
    # the strategy of a single device has none
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


class SLURMRequeue(Callback):
    """Requeues a preempted SLURM job so that `ckpt_path="last"` goes on after the step that was being made.

    Lightning's handler writes a checkpoint of its own name, which "last" passes by; and it does so wherever the signal
    finds each rank, though all must take part: one that is just waiting for the others' gradients or losses then waits
    for ever. Here the signal is noted down, the ranks tell each other at the end of every training step, one number
    each, and all write `last.ckpt` of the run's ModelCheckpoint. A step of several accumulated batches ends with the
    last of them. A signal during a validation is answered after the next step, so the grace time has to be longer than
    a validation. Without SLURM nothing is changed. `wandazeta` adds this callback to every run.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._handler: Any = None
        self._received = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._signal = requeue_signal(trainer)
        if self._signal is not None:
            self._received = False
            self._handler = signal.signal(self._signal, self._note)
            if trainer.checkpoint_callback is None:
                rank_zero_warn("There is no ModelCheckpoint: a preempted job will train from the start again.")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # the gradients of half a step are in no checkpoint
        if self._signal is None or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        received = torch.tensor(float(self._received), device=pl_module.device)
        if float(trainer.strategy.reduce(received, reduce_op="sum")) == 0:
            return
        # its own may still be on the way to a rank
        signal.signal(self._signal, signal.SIG_IGN)
        self._signal = None
        self._requeue(trainer)

    def _requeue(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint):
            # as it names its own, and known to it, or it would not write over this one
            name = f"{checkpoint.CHECKPOINT_NAME_LAST}{checkpoint.FILE_EXTENSION}"
            checkpoint.last_model_path = str(Path(checkpoint.dirpath or trainer.default_root_dir) / name)
            trainer.save_checkpoint(checkpoint.last_model_path)
        if trainer.is_global_zero:
            rank_zero_info(f"Preempted after step {trainer.global_step}: {requeue_slurm_job()}.")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._signal is not None:
            signal.signal(self._signal, self._handler)
            self._signal = None
