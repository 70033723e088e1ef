"""Adjust and check the trainer's strategy for models whose weights are frozen, or trained in place."""

from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy


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
