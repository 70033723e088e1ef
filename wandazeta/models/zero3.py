"""Models whose parameters DeepSpeed ZeRO stage 3 shards over the ranks: load them, gather weights, bound the memory.

A sharded parameter is empty (`numel() == 0`) except while a module that uses it runs, or while it is gathered.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["full_shape", "gathered", "is_zero3_sharded", "limit_gathered_blocks", "loading_sharded"]


def is_zero3_sharded(weight: Tensor) -> bool:
    """Whether DeepSpeed ZeRO stage 3 manages a parameter, which then is empty unless it is gathered."""
    return hasattr(weight, "ds_id")


def full_shape(weight: Tensor) -> torch.Size:
    """Return the shape of a weight, that of the gathered one if it is sharded."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


@contextmanager
def gathered(weights: Iterable[Tensor]) -> Iterator[None]:
    """Temporarily gather ZeRO-3 parameters on every rank; weights that are not sharded are left alone.

    All ranks have to enter the context with the same weights in the same order. Changes to sharded weights are lost
    when it ends.

    Args:
        weights: The weights.
    """
    sharded = [weight for weight in weights if is_zero3_sharded(weight)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


@contextmanager
def loading_sharded(config: dict[str, Any], dtype: str) -> Iterator[None]:
    """Let `from_pretrained` of transformers keep only this rank's shard of every weight.

    Args:
        config: Configuration of DeepSpeed with `zero_optimization` of stage 3.
        dtype: Precision of the weights: float32, bfloat16 or float16.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    config = config | {"bf16": {"enabled": dtype == "bfloat16"}, "fp16": {"enabled": dtype == "float16"}}
    # transformers keeps a weak reference to the last one and shards as long as it is alive
    alive = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1} | config)
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()


def limit_gathered_blocks(options: dict[str, Any], blocks: Iterable[nn.Module]) -> None:
    """Let DeepSpeed gather at most two blocks at a time, the running and the next one, unless the options say more.

    DeepSpeed's default of 1e9 values is for the backward pass, which uses the last blocks again; forward passes alone
    do not.

    Args:
        options: `zero_optimization` of DeepSpeed's configuration, changed in place.
        blocks: The blocks of the model.
    """
    largest = max(sum(full_shape(parameter).numel() for parameter in block.parameters()) for block in blocks)
    options.setdefault("stage3_max_live_parameters", 2 * largest)
    options.setdefault("stage3_prefetch_bucket_size", largest)
    options.setdefault("stage3_max_reuse_distance", 0)
