"""Settings of Lightning's strategies that the modules depend on."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from wandazeta.lightning_compat import avoid_inference_mode, is_fitting, saves_shards, tensor_parallel_size
from wandazeta.models.blocks import block_lists
from wandazeta.models.encoder import EncoderClassifier
from wandazeta.models.sharded import shard_model
from wandazeta.models.zero3 import limit_gathered_blocks, loading_sharded


def uses_zero3(strategy: Any) -> bool:
    """Whether a strategy shards the weights by DeepSpeed ZeRO stage 3."""
    return isinstance(strategy, DeepSpeedStrategy) and _zero_options(strategy).get("stage") == 3


@contextmanager
def loading_sharded_by(strategy: Any, dtype: str) -> Iterator[None]:
    """Let transformers load a model so that every rank keeps only its shard of every weight.

    Args:
        strategy: Strategy of the trainer.
        dtype: Precision of the weights.

    Raises:
        ValueError: If the strategy is not DeepSpeed with stage 3, or has another precision.
    """
    if not uses_zero3(strategy):
        raise ValueError(
            "Expected DeepSpeed with stage 3 for `shard_on_load`, but got "
            f"{type(strategy).__name__}; add `-c configs/trainer/deepspeed_stage3.yaml`, or leave `shard_on_load` out"
        )
    precision = str(strategy.precision_plugin.precision)
    expected = {"bf16": "bfloat16", "16": "float16"}.get(precision.partition("-")[0], "float32")
    if dtype != expected:
        raise ValueError(
            f"Expected argument `dtype` to be {expected} for `shard_on_load` with `precision: {precision}`, but got "
            f"{dtype!r}; change either"
        )
    with loading_sharded(strategy.config, expected):
        yield


def limit_gathered_weights(strategy: Any, model: nn.Module) -> None:
    """Let DeepSpeed ZeRO stage 3 gather at most two blocks at a time, unless its options say more.

    Args:
        strategy: Strategy of the trainer; no other one is changed.
        model: A model that runs forward passes alone.
    """
    if uses_zero3(strategy):
        blocks = [block for blocks in block_lists(model).values() for block in blocks]
        limit_gathered_blocks(_zero_options(strategy), blocks)


def configure_deepspeed(strategy: Any, save_frozen: bool = False) -> None:
    """Exclude frozen weights from DeepSpeed's checkpoints, and set the batch size that it would read from the loader.

    Args:
        strategy: The trainer's strategy; any other than DeepSpeed is not changed.
        save_frozen: Save frozen weights, too.
    """
    if hasattr(strategy, "exclude_frozen_parameters"):
        strategy.exclude_frozen_parameters |= not save_frozen
        # only logged; Lightning would read it from the loader's batch sampler, which loaders of whole batches lack
        (strategy.config or {}).setdefault("train_micro_batch_size_per_gpu", 1)


def check_fsdp2(trainer: Trainer) -> None:
    """Check the options of `ModelParallelStrategy` that do not depend on the module; any other strategy passes.

    Args:
        trainer: The trainer.

    Raises:
        ValueError: If the strategy divides layers over the ranks, or a fit would write checkpoints in shards.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    size = tensor_parallel_size(strategy)
    if size != 1:
        raise ValueError(
            f"Expected argument `tensor_parallel_size` of ModelParallelStrategy to be 1, but got {size}; set "
            "`data_parallel_size` to the number of all processes, over which the weights are sharded"
        )
    if is_fitting(trainer) and saves_shards(strategy):
        raise ValueError(
            "Expected argument `save_distributed_checkpoint` of ModelParallelStrategy to be False, but got True; a run "
            "that is killed while the ranks write their shards could not be resumed, a single file is written at once"
        )


def shard_by_fsdp2(trainer: Trainer, model: nn.Module) -> DeviceMesh | None:
    """Shard a model as `ModelParallelStrategy` expects of a module; for any other strategy nothing is changed.

    Args:
        trainer: The trainer, with its ranks.
        model: The whole model, changed in place.

    Returns:
        The ranks that hold shards, or None for another strategy.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return None
    mesh = trainer.strategy.device_mesh["data_parallel"]
    compute_dtype = torch.bfloat16 if str(trainer.precision) == "bf16-mixed" else None
    heads = [model.head] if isinstance(model, EncoderClassifier) else []
    shard_model(model, mesh, compute_dtype, heads)
    avoid_inference_mode(trainer)
    return mesh


def needs_stateful_optimizer(strategy: Any) -> bool:
    """Whether a strategy works with an optimizer that has states better than with one without.

    DeepSpeed ZeRO warns of optimizers that it does not know, such as SGD, and under `ModelParallelStrategy` Lightning
    2.6.6 cannot restore one without states.
    """
    return isinstance(strategy, (DeepSpeedStrategy, ModelParallelStrategy))


def refuse_float16_training(trainer: Trainer, trained_dtypes: Iterable[torch.dtype]) -> None:
    """Raise an error for back-propagation that float16 cannot represent; DeepSpeed has master weights and loss scaling.

    Without them small gradients are zero, and AdamW, whose epsilon of 1e-8 is zero in float16, divides by zero.

    Args:
        trainer: The trainer.
        trained_dtypes: Precisions of the trained parameters.

    Raises:
        ValueError: If the trainer or a trained parameter is in float16.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return
    if str(trainer.precision) == "16-true":
        raise ValueError(
            "Expected argument `precision` to be 32-true, bf16-true, bf16-mixed or 16-mixed for back-propagation, but "
            "got '16-true', whose gradients are lost in float16; use 16-mixed, which scales the loss"
        )
    if torch.float16 in trained_dtypes:
        raise ValueError(
            "Expected trained weights in float32 or bfloat16 for back-propagation, but got float16, in which the "
            "updates of AdamW are not finite; set `loading.dtype: float32`, and `precision: 16-mixed` for speed"
        )


def refuse_sharded_weights(strategy: Any) -> None:
    """Raise an error for strategies that shard the model's weights or train copies of them.

    Raises:
        ValueError: If the strategy is one of them.
    """
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
        raise ValueError(
            f"Expected a strategy that neither shards nor copies the weights for `Weights`, but got "
            f"{type(strategy).__name__}; use one device or DDP, or train adapters"
        )


def _zero_options(strategy: DeepSpeedStrategy) -> dict[str, Any]:
    options: dict[str, Any] = (strategy.config or {}).get("zero_optimization", {})
    return options
