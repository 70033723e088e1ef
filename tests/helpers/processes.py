"""Run the helpers' programs in processes of their own."""

import json
import os
import socket
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def leave_process_group():
    """Stop gloo's threads: one that still runs when the interpreter ends now and then aborts the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def start(program, settings, root, **environment):
    """Start `helpers/<program>.py` with settings; its output goes to a file."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    settings_file = root / "settings.json"
    settings_file.write_text(json.dumps({**settings, "root": str(root)}))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK")}
    environment = kept | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)} | environment
    script = Path(__file__).with_name(f"{program}.py")
    log = (root / "log.txt").open("w")
    return subprocess.Popen(
        [sys.executable, str(script), str(settings_file)], env=environment, stdout=log, stderr=subprocess.STDOUT
    )


def run(program, settings, root, timeout=300, **environment):
    """Run to the end and return what every rank left."""
    process = start(program, settings, root, **environment)
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
    assert code == 0, (Path(root) / "log.txt").read_text()[-4000:]
    ranks = sorted(Path(root).glob("result-*.pt"))
    return [torch.load(rank, weights_only=True) for rank in ranks]


def fork_ranks(work, folder, size=2):
    """Do a piece of work as several ranks of a gloo group, each a fork of this process; returns what each returned.

    Back-propagation is not for forks: torch refuses it where this process has done any.
    """
    store = Path(folder) / f"store-{os.urandom(4).hex()}"
    # also of a key that is waited for: where a rank failed, the others follow
    limit = timedelta(seconds=120)
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit
                )
                # one that had nothing to wait for would leave while others still connect to it
                dist.barrier()
                torch.save(work(rank, size), store.with_suffix(f".{rank}"))
                leave_process_group()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * size
    return [torch.load(store.with_suffix(f".{rank}"), weights_only=True) for rank in range(size)]
