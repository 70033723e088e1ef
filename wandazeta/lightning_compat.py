"""Everything that only private names of Lightning, and of torch's part in it, give, in one place.

Each function names the version that it was seen in. `tests/unit/test_lightning_compat.py` fails when a new version
lacks one of the names.
"""

import signal
from collections.abc import Iterable
from subprocess import Popen
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn

__all__ = [
    "attached_trainer",
    "checkpoint_path",
    "default_store",
    "exclude_from_ddp",
    "is_accumulating",
    "launched_processes",
    "requeue_checkpoint",
    "requeue_signal",
    "training_data",
]


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Return the trainer of a module, or None if it has none; the public `trainer` raises an error then.

    Uses `LightningModule._trainer` (lightning 2.6.6).

    Args:
        module: The module.
    """
    trainer: Trainer | None = module._trainer
    return trainer


def checkpoint_path(trainer: Trainer, name: str) -> str | None:
    """Return the file that `last` or `best` stands for in a fit.

    Uses `Trainer._checkpoint_connector._parse_ckpt_path` (lightning 2.6.6).

    Args:
        trainer: The trainer, with its checkpoint callbacks.
        name: `last`, `best` or `hpc`.

    Returns:
        The path, or None if there is no such checkpoint.
    """
    path = trainer._checkpoint_connector._parse_ckpt_path(
        TrainerFn.FITTING, name, model_provided=True, model_connected=False
    )
    return None if path is None else str(path)


def requeue_checkpoint(trainer: Trainer) -> str | None:
    """Return the checkpoint that a requeued SLURM job left in the folder of the run; it is loaded before any other.

    Uses `Trainer._checkpoint_connector._hpc_resume_path` (lightning 2.6.6).

    Args:
        trainer: The trainer.

    Returns:
        The path, or None if there is none.
    """
    return trainer._checkpoint_connector._hpc_resume_path


def requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """Return the signal by which SLURM announces a requeue, or None without SLURM or automatic requeueing.

    Uses `Trainer._accelerator_connector.cluster_environment` (lightning 2.6.6): a strategy for one device has no
    public `cluster_environment`.

    Args:
        trainer: The trainer.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def training_data(trainer: Trainer) -> Any:
    """Return what was given to `fit` as training data: dataloaders, a data module, or the module that makes its own.

    Uses `FitLoop._data_source` (lightning 2.6.6). It is there before `setup`, when `Trainer.train_dataloader` is not.

    Args:
        trainer: The trainer, inside `fit`.
    """
    return trainer.fit_loop._data_source.instance


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether the optimizer step is still to come after this batch, because gradients are accumulated.

    Uses `_TrainingEpochLoop._should_accumulate` (lightning 2.6.6).

    Args:
        trainer: The trainer, in its training loop.
    """
    return trainer.fit_loop.epoch_loop._should_accumulate()


def launched_processes(trainer: Trainer) -> list[Popen[bytes]]:
    """Return the processes of other ranks that Lightning started from this one.

    Uses `_SubprocessScriptLauncher.procs` (lightning 2.6.6); other launchers have no such attribute.

    Args:
        trainer: The trainer, its strategy launched.
    """
    return getattr(trainer.strategy.launcher, "procs", [])


def default_store() -> dist.Store:
    """Return the key-value store of the default process group.

    Uses `torch.distributed.distributed_c10d._get_default_store` (torch 2.13.0).
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def exclude_from_ddp(module: LightningModule, names: Iterable[str]) -> None:
    """Tell DDP not to broadcast some parameters and buffers of a module and not to reduce their gradients.

    Sets `_ddp_params_and_buffers_to_ignore`, which DistributedDataParallel reads (torch 2.13.0).

    Args:
        module: The module that is wrapped.
        names: Dotted names of the parameters and buffers.
    """
    module._ddp_params_and_buffers_to_ignore = list(names)  # type: ignore[assignment]
