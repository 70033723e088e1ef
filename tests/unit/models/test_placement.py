"""Blocks on the compute device; reading ahead, which is for GPUs, is tried on the CPU."""

import threading

import pytest
import torch
from helpers.causal_lms import save_tiny_lm, tiny_lm
from helpers.prune_model import Memory, equal, prune
from torch import nn

from wandazeta.models import placement
from wandazeta.models.loading import LoadingOptions
from wandazeta.models.placement import BlockPlacement
from wandazeta.modules import LanguageModel
from wandazeta.pruning import pruner
from wandazeta.utilities.background import BackgroundThread

CPU = torch.device("cpu")


@pytest.fixture
def reading_ahead(monkeypatch):
    """Lets a GPU be assumed: weights come to the device through buffers, and do not get back by themselves."""

    def place(*args):
        found = BlockPlacement(*args)
        found._reads_ahead = True
        return found

    monkeypatch.setattr(pruner, "BlockPlacement", place)
    return place


def test_the_next_block_is_read_while_one_is_on_the_device(reading_ahead, monkeypatch):
    blocks = [nn.Linear(4, 4, bias=False) for _ in range(3)]
    weights, read = [block.weight.data for block in blocks], [threading.Event() for _ in blocks]

    def reading(parameter):
        read[[block.weight is parameter for block in blocks].index(True)].set()
        return parameter

    monkeypatch.setattr(placement, "materialize", reading)
    with BackgroundThread(CPU) as reader:
        placed = reading_ahead(blocks, CPU, reader)
        for index, block in enumerate(blocks):
            with placed.on_device(index) as homes:
                assert torch.equal(block.weight, weights[index])
                assert homes["weight"].data_ptr() == weights[index].data_ptr() != block.weight.data_ptr()
                assert all(event.wait(60) for event in read[: index + 2])
                block.weight.data.zero_()
                assert not any(event.is_set() for event in read[index + 2 :])
            assert block.weight.data_ptr() == weights[index].data_ptr()
    assert all(weight.any() for weight in weights)


def test_a_block_that_is_on_the_device_stays_there():
    block = nn.Linear(4, 4)
    weight = block.weight.data_ptr()
    with BackgroundThread(CPU) as reader, BlockPlacement([block], CPU, reader).on_device(0) as homes:
        assert homes == {}
        assert block.weight.data_ptr() == weight


@pytest.mark.parametrize("is_streamed", [False, True])
def test_blocks_that_are_read_ahead_are_pruned_to_the_same_bits(tmp_path, reading_ahead, monkeypatch, is_streamed):
    batches = [{"input_ids": row} for row in torch.randint(3, 300, (8, 10)).split(1)]
    path = str(save_tiny_lm(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(pruner, "BlockPlacement", BlockPlacement)
        expected, wanted = tiny_lm(), Memory()
        prune(expected, batches, run={"progress": wanted})
    found = Memory()
    for num_lost in (3, 1):  # then going on
        for index in list(found.results)[-num_lost:]:
            del found.results[index]
        model = LanguageModel(path, LoadingOptions(stream_weights=is_streamed, dtype="float32")).backbone
        prune(model, batches, run={"progress": found})
        assert is_streamed or equal(model, expected)
        for index, result in wanted.results.items():
            for name, weight in result.weights.items():
                assert torch.equal(found.results[index].weights[name], weight)
