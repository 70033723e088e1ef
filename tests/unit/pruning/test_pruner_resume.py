"""Going on with what a progress holds."""

import pytest
import torch
from helpers.architectures import build
from helpers.prune_model import Memory, equal, prune, tiny

from wandazeta.pruning.pruner import PruningInterrupted


@pytest.mark.parametrize("method", ["wanda++", "tuned-ro"])
@pytest.mark.parametrize("stop", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_resumed_is_bit_identical(name, stop, method):
    undisturbed, _, wanted = tiny(name, method=method)
    progress, asked = Memory(), []

    def should_stop():
        asked.append(1)
        return len(asked) == stop + 1

    with pytest.raises(PruningInterrupted) as interrupt:
        tiny(name, method=method, run={"progress": progress, "should_stop": should_stop})
    assert interrupt.value.block_index == stop
    assert sorted(progress.results) == list(range(stop + 1))
    resumed, _, report = tiny(name, method=method, run={"progress": progress})
    assert equal(resumed, undisturbed)
    assert [b.loss_after for b in report.blocks] == [b.loss_after for b in wanted.blocks]


def test_complete_progress_needs_neither_data_nor_forward():
    progress, seen = Memory(), []
    wanted, _, report = tiny(run={"progress": progress})
    model, blocks = build("llama")
    run = {
        "progress": progress,
        "block_name": blocks,
        "on_block": lambda record, count: seen.append((record.index, count)),
    }
    again = prune(model, batches=[], run=run)
    assert equal(model, wanted)
    assert again == report
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_finished_blocks_are_read_once(monkeypatch):
    progress, loaded, done = Memory(), [], []
    with pytest.raises(PruningInterrupted):
        tiny(run={"progress": progress, "should_stop": lambda: done.append(1) or len(done) == 2})
    load = progress.load
    monkeypatch.setattr(progress, "load", lambda index: loaded.append(index) or load(index))
    tiny(run={"progress": progress})
    assert loaded == [0, 1]


def test_a_lost_block_in_the_middle_is_made_again():
    progress = Memory()
    wanted, _, _ = tiny(run={"progress": progress})
    lost = progress.results.pop(1)
    again, _, _ = tiny(run={"progress": progress})
    assert equal(again, wanted)
    for name, weight in lost.weights.items():
        assert torch.equal(progress.results[1].weights[name], weight)


def test_results_hold_weights_and_masks_in_the_weights_layout():
    progress = Memory()
    _, blocks, _ = tiny("gpt2", run={"progress": progress})
    for index, block in enumerate(blocks):
        result = progress.results[index]
        assert result.weights.keys() == result.masks.keys()
        for name, mask in result.masks.items():
            assert torch.equal(result.weights[name], block.get_parameter(name))
            assert torch.equal(mask, block.get_parameter(name) != 0)
            assert mask.is_contiguous()
            assert not result.weights[name][~mask].signbit().any()


def test_progress_of_another_model_is_refused():
    progress = Memory()
    tiny("gpt2", run={"progress": progress})
    with pytest.raises(ValueError, match=r"remove the progress"):
        tiny("llama", run={"progress": progress})
