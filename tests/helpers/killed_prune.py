"""Prunes and exports by `wandazeta prune` twice: undisturbed, and killed again and again by SIGKILL on the way.

This process imports everything once and each run is a fork of it, so that many kills fit into a test. Kills come at
random instants: in the middle of blocks that are drawn from the whole run, every second one while the block before is
written, and the last one while the model is exported. What was seen at each kill is left in `kills.json`.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

NUM_BLOCKS = 20
# no kill is meant for the last blocks: the run would be through before one that comes late
SPARED = 6
PATIENCE_S = 60

settings = json.loads(Path(sys.argv[1]).read_text())
root, draw = Path(settings["root"]), random.Random(settings["seed"])
sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot  # noqa: E402, F401 (else every fork imports it anew)
import torch  # noqa: E402
from helpers.prune_config import write_prune_config  # noqa: E402

from wandazeta.cli.main import main  # noqa: E402
from wandazeta.pruning import pruner  # noqa: E402
from wandazeta.utilities.files import TEMPORARY_NAME  # noqa: E402

torch.set_num_threads(1)
sys.argv = ["wandazeta"]
# seconds and memory are the only figures that may differ between two runs
pruner.time = SimpleNamespace(perf_counter=lambda: 0.0)
pruner.peak_memory = lambda device: 0


def start(folder, fsync_seconds=0):
    """Start a run, on a disk that takes some time for each file and each rename."""
    child = os.fork()
    if child == 0:
        code, fsync = 1, os.fsync
        os.fsync = lambda file: (time.sleep(fsync_seconds), fsync(file))
        try:
            os.chdir(folder)
            main(["prune", "-c", "../config.yaml", "--output_dir", "model", "--pack", "true"])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def end(child):
    """Wait for the end of a run; a failure ends the test."""
    assert os.waitpid(child, 0)[1] == 0


def is_running(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def blocks(folder):
    """When each finished block was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "progress").glob("block_*.safetensors")}


def wait_until(true, child):
    """Wait for something to be true; False if the run ends before."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        if not is_running(child):
            return False
        time.sleep(0.001)
    return True


def kill(child):
    """End a process by SIGKILL; False if it was at its end before."""
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), status
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def undisturbed(folder):
    """A run to the end: seconds of a block and of the export."""
    folder.mkdir()
    child = start(folder)
    assert wait_until((folder / ".model.new").exists, child)
    exports = time.monotonic()
    end(child)
    seconds = time.monotonic() - exports
    written = sorted(blocks(folder).values())
    return (written[-1] - written[0]) / (len(written) - 1) / 1e9, seconds


def killed(folder, block_seconds, export_seconds):
    """As many kills as asked for, then a run to the end."""
    folder.mkdir()
    kills, finished = [], {}
    wanted = sorted(draw.sample(range(NUM_BLOCKS - SPARED), settings["kills"] - 1))
    temporary = folder / "progress" / TEMPORARY_NAME
    for count, number in enumerate(wanted):
        # at least one block more than at the last kill, which may have come late
        number = max(number, len(finished) + 1)
        # the two files of a block take as long as the next block
        child = start(folder, block_seconds / 4)
        assert wait_until(lambda number=number: len(blocks(folder)) >= number, child)
        time.sleep(draw.uniform(0, 1.5 * block_seconds))
        assert count % 2 or wait_until(temporary.exists, child)
        assert kill(child), "it had ended: nothing was tested"
        found = blocks(folder)
        kept = all(found.get(name) == written for name, written in finished.items())
        kills.append({"finished": len(found), "kept": kept, "writing": temporary.exists(), "exporting": False})
        finished = found
    for _ in range(10):
        child = start(folder)
        hit = wait_until((folder / ".model.new").exists, child)
        time.sleep(draw.uniform(0, 0.7 * export_seconds))
        if kill(child) and hit:
            break
        # it was through already: as if it had not begun
        (folder / "model").rename(folder.with_name(f"missed-{child}"))
    found = blocks(folder)
    kept = all(found.get(name) == written for name, written in finished.items())
    kills.append({"finished": len(found), "kept": kept, "writing": False, "exporting": hit})
    end(start(folder))
    kept = blocks(folder) == found
    (root / "kills.json").write_text(json.dumps({"kills": kills, "kept": kept}))


write_prune_config(root, NUM_BLOCKS)
killed(root / "killed", *undisturbed(root / "undisturbed"))
