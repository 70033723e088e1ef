"""Finished blocks are saved while the next one is pruned, and whatever ends a pruning, each of them has been."""

import threading
import time

import pytest
from helpers.architectures import build
from helpers.processes import fork_ranks
from helpers.prune_model import Memory, equal, prune, tiny

from wandazeta.pruning.pruner import PruningInterrupted
from wandazeta.utilities.ranks import Ranks


class Slow(Memory):
    """Takes some time to save a block, and fails at one."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.fails_at = fails_at

    def save(self, index, result):
        time.sleep(0.1)
        if index == self.fails_at:
            raise OSError(28, "No space left on device", "a block")
        super().save(index, result)


def watched(on_run):
    """A model that calls a function with the index of every block that runs."""
    model, blocks = build("llama")
    for index, block in enumerate(model.get_submodule(blocks)):
        block.register_forward_pre_hook(lambda *_, index=index: on_run(index))
    return model


def test_a_block_is_saved_while_the_next_one_is_pruned():
    began = [threading.Event() for _ in range(3)]
    pruned, met = [], []

    class Meeting(Memory):
        def save(self, index, result):
            if index < 2:
                met.append(began[index + 1].wait(60))
            super().save(index, result)

    def on_run(index):
        # not while the inputs of all blocks are captured
        if index <= len(pruned):
            began[index].set()

    def on_block(record, num_blocks):
        pruned.append(record.index)
        # one is on its way, and no more
        assert len(progress.results) in (record.index, record.index + 1)

    progress = Meeting()
    model = watched(on_run)
    prune(model, run={"progress": progress, "on_block": on_block}, rounds=1)
    assert met == [True, True]
    assert sorted(progress.results) == [0, 1, 2]
    assert equal(model, tiny(rounds=1)[0])


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_an_error_of_the_disk_ends_the_pruning_at_the_next_block(fails_at):
    progress, pruned = Slow(fails_at), []
    run = {"progress": progress, "on_block": lambda record, num_blocks: pruned.append(record.index)}
    with pytest.raises(OSError, match=r"No space left on device: 'a block'"):
        tiny(rounds=1, run=run)
    assert sorted(progress.results) == list(range(fails_at))
    assert pruned == list(range(fails_at + 1))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_a_block_waits_until_the_one_before_is_saved(error):
    progress, pruned = Slow(), []

    def on_run(index):
        if pruned == [0]:
            raise error

    with pytest.raises(error):
        prune(
            watched(on_run),
            rounds=1,
            run={"progress": progress, "on_block": lambda record, num_blocks: pruned.append(record.index)},
        )
    assert sorted(progress.results) == [0]


def test_a_pruning_that_was_asked_to_stop_has_saved_its_last_block():
    progress = Slow()
    with pytest.raises(PruningInterrupted):
        tiny(rounds=1, run={"progress": progress, "should_stop": lambda: True})
    assert sorted(progress.results) == [0]


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_full_disk_of_rank_0_ends_all_ranks_at_the_same_block(tmp_path, fails_at):
    def work(rank, size):
        pruned = []
        run = {"progress": Slow(fails_at), "on_block": lambda record, num_blocks: pruned.append(record.index)}
        with pytest.raises((OSError, ValueError)) as error:
            tiny(method="wanda", run=run | {"ranks": Ranks(rank, size)})
        return str(error.value), pruned

    of_disk = "[Errno 28] No space left on device: 'a block'"
    pruned = list(range(fails_at + 1))
    assert fork_ranks(work, tmp_path) == [(of_disk, pruned), (f"Failed on rank 0: {of_disk}", pruned)]
