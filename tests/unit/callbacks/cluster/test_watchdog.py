"""Which ranks the watchdog reports as lost."""

import pytest
import torch.distributed as dist
from helpers.processes import fork_ranks

from wandazeta.callbacks.cluster import watchdog
from wandazeta.callbacks.cluster.watchdog import Heartbeat
from wandazeta.lightning_compat import default_store


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    # the forked ranks inherit it
    monkeypatch.setattr(watchdog, "PERIOD_S", 0.2)


def until_told(store):
    store.get("done")


def tell(store):
    store.set("done", "1")


def store_of_group():
    return dist.PrefixStore("test", default_store())


def test_no_single_rank_is_named_while_several_have_not_started(tmp_path):
    def work(rank, size):
        store = store_of_group()
        if rank > 0:
            until_told(store)
            return ""
        heartbeat = Heartbeat(0, rank, size, [])
        heartbeat.start()
        line = heartbeat.find_lost_rank()
        heartbeat.stop()
        tell(store)
        return line

    assert fork_ranks(work, tmp_path, 3)[0].startswith("one of the ranks [1, 2] was lost before it started")


def test_the_only_rank_that_has_not_started_or_is_silent_is_named(tmp_path):
    def work(rank, size, silent):
        store = store_of_group()
        heartbeat = Heartbeat(0, rank, size, [])
        if rank == 1:
            if silent:
                heartbeat._store.add("beat/1", 1)
            until_told(store)
            return ""
        heartbeat.start()
        line = heartbeat.find_lost_rank()
        heartbeat.stop()
        tell(store)
        return line

    for silent in (True, False):
        lines = fork_ranks(lambda rank, size, silent=silent: work(rank, size, silent), tmp_path)
        assert lines[0].startswith("rank 1 is lost")


def test_rank_zero_does_not_wait_forever_for_a_silent_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "MAX_SILENT_PERIODS", 3)

    def work(rank, size):
        store = store_of_group()
        heartbeat = Heartbeat(0, rank, size, [])
        if rank == 1:  # has started, and neither beats nor leaves
            heartbeat._store.add("beat/1", 1)
            until_told(store)
            return ""
        if rank == 2:
            heartbeat.start()
            heartbeat.leave()
            return ""
        heartbeat.start()

        def end(line):
            raise SystemExit(line)

        monkeypatch.setattr(heartbeat, "end_process", end)
        with pytest.raises(SystemExit) as ended:
            heartbeat.leave()
        heartbeat.stop()
        tell(store)
        return str(ended.value)

    assert fork_ranks(work, tmp_path, 3)[0].startswith("rank 1 is lost")


def test_an_error_of_the_store_does_not_hide_the_error_of_the_run(tmp_path):
    def work(rank, size):
        heartbeat = Heartbeat(0, rank, size, [])

        class Gone:
            def add(self, *_):
                raise dist.DistError("gone")

            compare_set = add

        heartbeat._store = Gone()
        heartbeat.fail()
        return "ended"

    assert fork_ranks(work, tmp_path) == ["ended", "ended"]
