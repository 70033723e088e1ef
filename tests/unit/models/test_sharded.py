"""Shards of weights under FSDP2, on three ranks of which the last has the smallest part."""

import pytest
import torch
from helpers.causal_lms import tiny_lm
from helpers.processes import fork_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from wandazeta.models.sharded import (
    is_sharded,
    local_shard,
    shard_like,
    shard_model,
    sum_over_shards,
    unshard_like,
    whole,
)

TOKENS = torch.arange(10, 20)[None]


def work(rank, size):
    model = tiny_lm()
    shard_model(model, init_device_mesh("cpu", (size,)))
    # 300 rows
    weight = model.get_input_embeddings().weight
    assert is_sharded(weight)
    order = torch.arange(weight.numel()).view(weight.shape)
    part = shard_like(order, weight)
    assert part.shape == local_shard(weight).shape
    with torch.no_grad():
        logits = model(TOKENS).logits
        local_shard(model.model.layers[1].mlp.up_proj.weight).fill_(rank)
    return {
        "first": part[0, 0],
        "order": unshard_like(part, weight),
        "sum": torch.tensor(sum_over_shards(torch.tensor(rank + 1), weight)),
        "logits": logits,
        "filled": whole(model.model.layers[1].mlp.up_proj.weight.detach()),
        "again": whole(weight.detach()),
    }


def test_parts_belong_to_shards_and_come_together_again(tmp_path):
    model = tiny_lm()
    weight = model.get_input_embeddings().weight.detach()
    with torch.no_grad():
        logits = model(TOKENS).logits
    for rank, result in enumerate(fork_ranks(work, tmp_path, size=3)):
        assert int(result["first"]) == rank * 100 * weight.shape[1]
        assert torch.equal(result["order"], torch.arange(weight.numel()).view(weight.shape))
        assert int(result["sum"]) == 6
        assert torch.equal(result["logits"], logits)
        assert torch.equal(result["again"], weight)
        # 48 rows, a write to a shard is one to the weight
        assert torch.equal(result["filled"][:, 0], torch.arange(3.0).repeat_interleave(16))


def test_whole_weights_are_their_own_shards():
    weight = nn.Parameter(torch.ones(2, 3))
    assert not is_sharded(weight)
    assert local_shard(weight).data_ptr() == whole(weight).data_ptr() == weight.data_ptr()
    mask = torch.eye(2, 3).bool()
    assert torch.equal(unshard_like(shard_like(mask, weight), weight), mask)
    assert sum_over_shards(mask.sum(), weight) == 2


def mixed(rank, size):
    model = tiny_lm()
    model.model.layers[0].mlp.up_proj.bfloat16()
    with pytest.raises(ValueError, match=r"one precision for FSDP2, but LlamaDecoderLayer has bfloat16, float32"):
        shard_model(model, init_device_mesh("cpu", (size,)))
    model.requires_grad_(False)
    shard_model(model, init_device_mesh("cpu", (size,)))
    return torch.ones(())


def test_trained_weights_of_two_precisions_are_refused(tmp_path):
    fork_ranks(mixed, tmp_path, size=1)
