"""A model whose weights are sharded over the ranks: DeepSpeed's ZeRO stage 3."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from wandazeta.models.blocks import find_blocks
from wandazeta.models.zero3 import full_shape


@contextmanager
def loading_in_shares(strategy: Any, dtype: str) -> Iterator[None]:
    """Let transformers load a model so that every rank keeps its share of each weight and never holds all of them.

    Args:
        strategy: The trainer's.
        dtype: Precision that the weights are to have.

    Raises:
        ValueError: If the strategy is not stage 3 of DeepSpeed, or its precision is another one.
    """
    if not shards_weights(strategy):
        raise ValueError(
            "Expected DeepSpeed with stage 3 for `shard_on_load`, but got "
            f"{type(strategy).__name__}; take configs/trainer/deepspeed_stage3.yaml, or leave `shard_on_load` out"
        )
    precision = str(strategy.precision_plugin.precision)
    there = {"bf16": "bfloat16", "16": "float16"}.get(precision.partition("-")[0], "float32")
    if dtype != there:
        raise ValueError(
            f"Expected argument `dtype` to be {there}, which `precision: {precision}` shards, but got {dtype!r}"
        )
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    config = strategy.config | {"bf16": {"enabled": there == "bfloat16"}, "fp16": {"enabled": there == "float16"}}
    # transformers looks for it behind our backs, for as long as it lives
    alive = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1} | config)
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()


def shards_weights(strategy: Any) -> bool:
    """Whether a strategy keeps every weight in shares."""
    return isinstance(strategy, DeepSpeedStrategy) and _zero_options(strategy).get("stage") == 3


def hold_two_blocks(strategy: Any, model: nn.Module) -> None:
    """Tell DeepSpeed to keep no more gathered than the block at work and the next one, unless its options say more.

    Its own bound is 1e9 values, for a backward pass that comes back to them; forward passes alone do not.
    """
    if not shards_weights(strategy):
        return
    _, blocks = find_blocks(model)
    largest = max(sum(full_shape(p).numel() for p in block.parameters()) for block in blocks)
    options = _zero_options(strategy)
    options.setdefault("stage3_max_live_parameters", 2 * largest)
    options.setdefault("stage3_prefetch_bucket_size", largest)
    options.setdefault("stage3_max_reuse_distance", 0)


def _zero_options(strategy: DeepSpeedStrategy) -> dict[str, Any]:
    options: dict[str, Any] = (strategy.config or {}).get("zero_optimization", {})
    return options
