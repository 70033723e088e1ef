"""Everything that only private names of Lightning, and of torch's part in it, give, in one place.

Each function names the version that it was seen in. `tests/unit/test_lightning_compat.py` fails when a new version
lacks one of the names.
"""

import signal
from collections.abc import Iterable
from subprocess import Popen
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from wandazeta.protocols import HasStepBudget

__all__ = [
    "attached_trainer",
    "averaged_modules",
    "averages_buffers",
    "avoid_inference_mode",
    "checkpoint_path",
    "copies_module",
    "default_store",
    "exclude_from_ddp",
    "fast_dev_run",
    "is_accumulating",
    "is_fitting",
    "is_logging_step",
    "launched_processes",
    "num_training_steps",
    "requeue_checkpoint",
    "requeue_signal",
    "saves_shards",
    "tensor_parallel_size",
    "training_data",
    "update_bar_metrics",
]


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Return the trainer of a module, or None if it has none; the public `trainer` raises an error then.

    Uses `LightningModule._trainer` (lightning 2.6.6).

    Args:
        module: The module.
    """
    trainer: Trainer | None = module._trainer
    return trainer


def averaged_modules(trainer: Trainer) -> list[LightningModule]:
    """Return the copies of the trained module that WeightAveraging callbacks hold averages in.

    Uses `WeightAveraging._average_model` (lightning 2.6.6).

    Args:
        trainer: The trainer, inside `fit`.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    averaged = [callback._average_model for callback in callbacks if isinstance(callback, WeightAveraging)]
    modules = (model.module for model in averaged if model is not None)
    return [module for module in modules if isinstance(module, LightningModule)]


def averages_buffers(callback: WeightAveraging) -> bool:
    """Return whether a callback averages buffers, in which zeroth-order adapters are.

    Uses `WeightAveraging._use_buffers` (lightning 2.6.6).

    Args:
        callback: The callback.
    """
    return callback._use_buffers


def copies_module(callback: Callback) -> bool:
    """Return whether a callback copies the module in its `setup`, before that of the module.

    Args:
        callback: The callback.
    """
    return isinstance(callback, (WeightAveraging, StochasticWeightAveraging))


def avoid_inference_mode(trainer: Trainer) -> None:
    """Let evaluations run without `torch.inference_mode`, as Lightning itself does under classic FSDP.

    FSDP2 reuses the tensors that weights are gathered into. Those of inference mode cannot be written to outside of it,
    so a `fit` after a `validate` of the same module would fail.

    Sets `inference_mode` of the evaluation loops (lightning 2.6.6), which is not documented; those of a fit never run
    in inference mode.

    Args:
        trainer: The trainer, before its first evaluation.
    """
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False


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


def fast_dev_run(trainer: Trainer) -> int:
    """Return the number of batches that a trainer with `fast_dev_run` runs, 0 for any other.

    Uses `Trainer.fast_dev_run`, which is public but unknown to type checkers (lightning 2.6.6).

    Args:
        trainer: The trainer.
    """
    return int(trainer.fast_dev_run)  # type: ignore[attr-defined]


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


def saves_shards(strategy: ModelParallelStrategy) -> bool:
    """Return whether every rank writes a part of a checkpoint, which then is a folder.

    Uses `ModelParallelStrategy._save_distributed_checkpoint` (lightning 2.6.6).

    Args:
        strategy: The strategy.
    """
    return strategy._save_distributed_checkpoint


def tensor_parallel_size(strategy: ModelParallelStrategy) -> int:
    """Return the number of ranks that share the layers of a model, before the ranks are connected.

    Uses `ModelParallelStrategy._tensor_parallel_size` (lightning 2.6.6), where "auto" stands for all ranks of a node.

    Args:
        strategy: The strategy.
    """
    size = strategy._tensor_parallel_size
    return strategy.num_processes if size == "auto" else int(size)


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


def is_fitting(trainer: Trainer) -> bool:
    """Return whether `fit` was called, also in its validation.

    Uses `Trainer.state.fn` (lightning 2.6.6), which is public but not documented.

    Args:
        trainer: The trainer.
    """
    return trainer.state.fn == TrainerFn.FITTING


def is_logging_step(trainer: Trainer, step: int) -> bool:
    """Return whether `log_every_n_steps` asks for the metrics of a step; 0 asks for none, as in Lightning's own loop.

    Uses `Trainer.log_every_n_steps` (lightning 2.6.6), which is public but not declared.

    Args:
        trainer: The trainer.
        step: Index of the step or batch, from 0.
    """
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return interval > 0 and (step + 1) % interval == 0


def launched_processes(trainer: Trainer) -> list[Popen[bytes]]:
    """Return the processes of other ranks that Lightning started from this one.

    Uses `_SubprocessScriptLauncher.procs` (lightning 2.6.6); other launchers have no such attribute.

    Args:
        trainer: The trainer, its strategy launched.
    """
    return getattr(trainer.strategy.launcher, "procs", [])


def num_training_steps(trainer: Trainer) -> int | None:
    """Return the number of steps after which a fit ends, or None if it has no known end.

    Uses nothing private, but is needed in modules and callbacks.

    Args:
        trainer: The trainer, inside `fit`.
    """
    numbers = [trainer.estimated_stepping_batches]
    if isinstance(trainer.lightning_module, HasStepBudget):
        numbers.append(trainer.lightning_module.step_budget or float("inf"))
    # Lightning has -1 for a dataset without a length
    known = [int(number) for number in numbers if 0 < number < float("inf")]
    return min(known, default=None)


def update_bar_metrics(bar: RichProgressBar, trainer: Trainer, module: LightningModule) -> None:
    """Show the newest metrics beside a progress bar.

    Uses `RichProgressBar._update_metrics` (lightning 2.6.6).

    Args:
        bar: The bar.
        trainer: The trainer, inside `fit`.
        module: The module that logs the metrics.
    """
    bar._update_metrics(trainer, module)


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
