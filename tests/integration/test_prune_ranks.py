"""Two ranks: one prunes, the other loads what it wrote, and both stop when one is asked to."""

import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.pruning import Tiny, callback, loader, trainer
from safetensors.torch import load_file

SCRIPT = """
    import os, signal, sys

    sys.path.insert(0, sys.argv[1])
    from helpers.pruning import Tiny, callback, loader, trainer
    from helpers.processes import leave_process_group
    from safetensors.torch import save_file
    from wandazeta.callbacks.pruning.progress import ProgressFolder

    folder, case, rank = sys.argv[2], sys.argv[3], os.environ["LOCAL_RANK"]
    if case == "stop":
        save = ProgressFolder.save

        def saving(self, index, result):
            if index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            save(self, index, result)

        ProgressFolder.save = saving
    # rank 1 starts from other weights, as a module without a seed would
    module = Tiny(seed=0) if rank == "0" else Tiny(seed=7)
    pruning = callback(folder + "/pruned", **({"exclude_modules": ["upp"]} if case == "fail" else {}))
    trainer(pruning, strategy="ddp", devices=2).fit(module, loader())
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, f"{folder}/{rank}.safetensors")
    leave_process_group()
"""


def run(repository, folder, case):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    # as torchrun does it, so that each rank's exit code is seen
    shared["TORCHELASTIC_RUN_ID"] = "test"
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(repository / "tests"), str(folder), case]
    ranks = []
    for rank in ("0", "1"):
        env = {**shared, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    return [process.returncode for process in ranks], errors


@pytest.mark.slow
def test_both_ranks_have_what_one_rank_has(repository, tmp_path):
    codes, errors = run(repository, tmp_path, "prune")
    assert codes == [0, 0], errors
    single = Tiny()
    trainer(callback(tmp_path / "single")).fit(single, loader())
    for rank in ("0", "1"):
        state = load_file(tmp_path / f"{rank}.safetensors")
        assert all(torch.equal(state[name], weight) for name, weight in single.state_dict().items()), rank


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "code", "messages"),
    [
        ("stop", 128 + signal.SIGTERM, ("Stopped by SIGTERM while pruning", "")),
        ("fail", 1, ("did you mean `up`", "Pruning failed on rank 0: Expected argument `exclude_modules`")),
    ],
)
def test_both_ranks_stop_together(repository, tmp_path, case, code, messages):
    codes, errors = run(repository, tmp_path, case)
    assert codes[0] == code
    assert codes[1] != 0
    assert all(message in error for message, error in zip(messages, errors, strict=True)), errors
    blocks = list((tmp_path / "pruned").glob("block_*.safetensors")) if case == "stop" else []
    assert len(blocks) == (2 if case == "stop" else 0)
