"""A rank that is killed or stopped: all ranks end soon and name it, and the next run resumes to the same bits."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers.two_ranks import COMMAND, SOON_S, assert_same, pids, run, start, trained, write_fit_config

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The configuration, and an undisturbed run of it in `undisturbed`."""
    root = tmp_path_factory.mktemp("lost_ranks")
    write_fit_config(root)
    run(root / "undisturbed")
    return root


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


MIDDLES = {"pruning": "progress/block_0002.safetensors", "fitting": "checkpoints/last.ckpt"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("middle", MIDDLES)
def test_a_killed_rank_is_named_and_the_next_run_goes_on(prepared, middle, rank):
    folder = prepared / f"{middle}-{rank}"
    process = start(folder)
    wait_for(folder / MIDDLES[middle], process)
    os.kill(pids(process)[rank], signal.SIGKILL)
    output = process.communicate(timeout=SOON_S)[0]
    assert process.returncode not in (0, None)
    what = "is lost: it was killed" if rank == 0 else "was killed by SIGKILL"
    assert f"error: rank {rank} {what}" in output
    assert output.count("error:") == 1
    assert "Traceback" not in output
    assert not (folder / "progress" / "complete.json").exists() or middle == "fitting"
    if middle == "fitting":
        trained(folder)
    run(folder)
    assert_same(folder, prepared / "undisturbed")


def test_under_torchrun_a_killed_rank_is_named_too(prepared):
    rank, folder = 1, prepared / "torchrun"
    command = [*TORCHRUN, "-m", *COMMAND[2:]]
    process = start(folder, command)
    wait_for(folder / MIDDLES["fitting"], process)
    os.kill(pids(process)[rank], signal.SIGKILL)
    output = process.communicate(timeout=SOON_S)[0]
    assert process.returncode not in (0, None)
    assert f"error: rank {rank} is lost: it was killed" in output
    assert output.count("error: ") == 1
    run(folder, command)
    assert_same(folder, prepared / "undisturbed")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_is_lost_too(prepared, rank):
    """As one whose machine is gone: its connections stay open, and collectives wait for it."""
    folder = prepared / f"still-{rank}"
    process = start(folder)
    wait_for(folder / MIDDLES["fitting"], process)
    ranks = pids(process)
    os.kill(ranks[rank], signal.SIGSTOP)
    try:
        deadline = time.monotonic() + SOON_S
        while has_ended(ranks[1 - rank]) is False:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[rank], signal.SIGKILL)
    output = process.communicate(timeout=SOON_S)[0]
    assert f"error: rank {rank} is lost: it was killed, or its machine does not answer" in output
    assert output.count("error: ") == 1
    trained(folder)


def has_ended(pid):
    try:
        # in parentheses the name; a process that has ended is a zombie while its parent does not look
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_ranks_that_stand_still_for_a_while_go_on(prepared):
    folder = prepared / "pause"
    process = start(folder)
    wait_for(folder / MIDDLES["pruning"], process)
    for rank in pids(process):
        os.kill(rank, signal.SIGSTOP)
        time.sleep(6)
        os.kill(rank, signal.SIGCONT)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert_same(folder, prepared / "undisturbed")
