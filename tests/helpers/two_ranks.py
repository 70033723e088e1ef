"""`wandazeta fit` on two ranks that prune a tiny model and train it, as processes that a test can kill."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from helpers.prune_config import write_prune_config

# the time in which a run ends once a rank is lost
SOON_S = 60
COMMAND = [sys.executable, "-m", "wandazeta", "fit", "-c", "../config.yaml"]


def write_fit_config(root, num_blocks=10, steps=150):
    """Write `model/`, `text.txt` and `config.yaml`; the run is to be started in a folder beside them."""
    write_prune_config(root, num_blocks)
    config = yaml.safe_load((root / "config.yaml").read_text())
    config["model"]["class_path"] = "ZerothOrderModule"
    config["data"]["init_args"]["batch_size"] = 2
    checkpoint = {"dirpath": "checkpoints", "every_n_train_steps": 5, "save_top_k": 0, "save_last": True}
    config["trainer"] |= {
        "devices": 2,
        "strategy": "ddp",
        "max_steps": steps,
        "max_epochs": -1,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    config["trainer"]["callbacks"].append({"class_path": "ModelCheckpoint", "init_args": checkpoint})
    (root / "config.yaml").write_text(yaml.safe_dump(config))


def clean_environment():
    """This process' environment without what says which rank it is."""
    ranks = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
    return {name: value for name, value in os.environ.items() if name not in ranks}


def start(folder, command=COMMAND):
    """Start all ranks; the pipe of their output is open for as long as any of them runs."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        command, cwd=folder, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(folder, command=COMMAND):
    """Run to the end."""
    process = start(folder, command)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output


def pids(process):
    """The processes of both ranks, by rank; any may be a child of another that launches them."""
    found, known = {}, [process.pid]
    for pid in known:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            known += map(int, (task / "children").read_text().split())
        environment = dict(
            entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in entry
        )
        # a process that launched the other ranks is rank 0 itself
        found[int(environment.get("LOCAL_RANK", -1))] = pid
    return [found.get(0, process.pid), found[1]]


def trained(folder):
    """What a run has trained."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state
    return state


def assert_same(folder, expected):
    """Compare the pruning byte for byte, and what was trained bit for bit."""
    names = sorted(path.name for path in (expected / "progress").glob("block_*.safetensors"))
    for name in (*names, "key.json", "complete.json"):
        assert (folder / "progress" / name).read_bytes() == (expected / "progress" / name).read_bytes(), name
    ours, theirs = trained(folder), trained(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
