"""Who is taken for lost, and who is not."""

import pytest
import torch.distributed as dist
from helpers.processes import fork_ranks

from wandazeta.callbacks.cluster import watchdog as end_together
from wandazeta.callbacks.cluster.watchdog import _Watch


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    # forks take them over
    monkeypatch.setattr(end_together, "_PERIOD_S", 0.2)


def until_told(store):
    store.get("done")


def tell(store):
    store.set("done", "1")


def store_of_group():
    return dist.PrefixStore("test", dist.distributed_c10d._get_default_store())


def test_a_rank_that_has_not_begun_is_not_taken_for_lost_while_others_have_not_either(tmp_path):
    def work(rank, size):
        store = store_of_group()
        if rank > 0:
            until_told(store)
            return ""
        watch = _Watch(0, rank, size, [])
        watch.begin()
        line = watch.find()
        watch._stop()
        tell(store)
        return line

    assert fork_ranks(work, tmp_path, 3)[0].startswith("one of the ranks [1, 2] is lost before it began")


def test_the_one_rank_that_has_not_begun_and_the_one_that_is_silent_are_named(tmp_path):
    def work(rank, size, silent):
        store = store_of_group()
        watch = _Watch(0, rank, size, [])
        if rank == 1:
            if silent:
                watch._store.add("beat/1", 1)
            until_told(store)
            return ""
        watch.begin()
        line = watch.find()
        watch._stop()
        tell(store)
        return line

    for silent in (True, False):
        lines = fork_ranks(lambda rank, size, silent=silent: work(rank, size, silent), tmp_path)
        assert lines[0].startswith("rank 1 is lost")


def test_the_last_to_leave_does_not_wait_for_ever_for_one_that_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(end_together, "_LOOKS", 3)

    def work(rank, size):
        store = store_of_group()
        watch = _Watch(0, rank, size, [])
        if rank == 1:  # has begun, and neither beats nor leaves
            watch._store.add("beat/1", 1)
            until_told(store)
            return ""
        if rank == 2:
            watch.begin()
            watch.leave()
            return ""
        watch.begin()

        def end(line):
            raise SystemExit(line)

        monkeypatch.setattr(watch, "end", end)
        with pytest.raises(SystemExit) as ended:
            watch.leave()
        watch._stop()
        tell(store)
        return str(ended.value)

    assert fork_ranks(work, tmp_path, 3)[0].startswith("rank 1 is lost")


def test_an_error_of_the_store_does_not_hide_the_runs_own(tmp_path):
    def work(rank, size):
        watch = _Watch(0, rank, size, [])

        class Gone:
            def add(self, *_):
                raise dist.DistError("gone")

            compare_set = add

        watch._store = Gone()
        watch.fail()
        return "ended"

    assert fork_ranks(work, tmp_path) == ["ended", "ended"]
