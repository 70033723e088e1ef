"""Checkpoint and requeue a preempted SLURM job."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from wandazeta.lightning_compat import is_accumulating, requeue_signal
from wandazeta.utilities.signals import requeue_slurm_job


class SLURMRequeue(Callback):
    """Requeues a preempted SLURM job so that `ckpt_path="last"` resumes after the step that was running.

    It replaces Lightning's signal handler, which writes a checkpoint under a name that `last` does not find, and writes
    it as soon as the signal arrives. All ranks take part in a checkpoint, so a rank that receives the signal while
    another waits for its gradients would wait forever.

    This callback only records the signal. At the end of every training step the ranks exchange one number, and if any
    rank was signalled, all ranks write `last.ckpt` of the run's ModelCheckpoint and rank 0 requeues the job. With
    accumulated gradients a step ends with its last batch. A signal during a validation is handled after the next
    training step, so the grace time must be longer than a validation.

    Without SLURM, or with `auto_requeue=False`, it does nothing. `wandazeta` adds it to every run.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._handler: Any = None
        self._received = False

    def _record(self, signum: int, frame: FrameType | None) -> None:
        self._received = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._signal = requeue_signal(trainer)
        if self._signal is not None:
            self._received = False
            self._handler = signal.signal(self._signal, self._record)
            if trainer.checkpoint_callback is None:
                rank_zero_warn("There is no ModelCheckpoint: a preempted job will start training from the beginning.")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # checkpoints do not hold accumulated gradients
        if self._signal is None or is_accumulating(trainer):
            return
        received = torch.tensor(float(self._received), dtype=torch.float32, device=pl_module.device)
        if float(trainer.strategy.reduce(received, reduce_op="sum")) == 0:
            return
        # this rank's own signal may arrive later than that of another rank
        signal.signal(self._signal, signal.SIG_IGN)
        self._signal = None
        self._requeue(trainer)

    def _requeue(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint):
            # the name that ModelCheckpoint itself uses; it has to know the path, or it would write another file later
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
