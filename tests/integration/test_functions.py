"""The commands that are functions, as processes: killed and resumed, on two ranks, and beside the harness's own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from helpers import left_threads
from helpers.fit_config import wandazeta, write_inputs
from helpers.two_ranks import clean_environment
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
# several seconds in all, so that a kill comes between two blocks
PRUNE = ["prune", "model", "--text", "text.txt", "--sequence_length", "16", "--num_samples", "16"]
PATIENCE_S = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    write_inputs(root, num_blocks=6)
    return root


def succeeding(folder, *args):
    done = wandazeta(folder, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pruned(folder):
    """What a run that nothing disturbs writes."""
    shown = succeeding(folder, *PRUNE, "--output_dir", "whole")
    assert f"pruned model: {folder / 'whole'}" in shown
    return folder / "whole"


def blocks(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "progress").glob("block_*.safetensors")}


def test_a_killed_run_goes_on_at_the_next_block(folder, pruned):
    out, finished = folder / "killed", {}
    for wanted in (1, 3):
        command = [sys.executable, "-m", "wandazeta", *PRUNE, "--output_dir", "killed"]
        process = subprocess.Popen(command, cwd=folder, env=clean_environment(), stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + PATIENCE_S
        while len(blocks(out)) < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        found = blocks(out)
        assert {path.name for path in out.iterdir()} == {"progress"}
        assert {name: found.get(name) for name in finished} == finished
        finished = found
    succeeding(folder, *PRUNE, "--output_dir", "killed")
    for name in ("model.safetensors", "sparsity/masks.safetensors", "sparsity/key.json", "config.json"):
        assert (out / name).read_bytes() == (pruned / name).read_bytes(), name
    assert {path.name for path in out.iterdir()} == {path.name for path in pruned.iterdir()}


def torchrun(folder, *args):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = clean_environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, left_threads.__file__, *args],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def masks_of(directory):
    return load_file(directory / "sparsity/masks.safetensors")


def agreement(directory, other):
    first, second = masks_of(directory), masks_of(other)
    assert first.keys() == second.keys()
    same = sum(int((first[name] == second[name]).sum()) for name in first)
    return same / sum(mask.numel() for mask in first.values())


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_processes_share_the_samples_and_one_writes(folder, launcher):
    wanda = [*PRUNE, "--method", "wanda", "--sparsity", "0.5"]
    if not (folder / "one").exists():
        succeeding(folder, *wanda, "--output_dir", "one")
    if launcher == "torchrun":
        done = torchrun(folder, *wanda, "--output_dir", "torchrun")
        assert done.returncode == 0, done.stderr
        shown = done.stdout
    else:
        shown = "".join(as_srun(folder, *wanda, "--output_dir", "srun"))
    assert shown.count("pruned model: ") == 1
    assert agreement(folder / launcher, folder / "one") >= 0.9999
    report = json.loads((folder / launcher / "prune_report.json").read_text())
    assert report["num_samples"] == 16
    weights = load_file(folder / launcher / "model.safetensors")
    assert all(torch.equal(weights[name] == 0, ~mask) for name, mask in masks_of(folder / launcher).items())


def as_srun(folder, *args):
    """Start two processes with the variables that srun sets; returns what each wrote."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in range(2):
        environment = clean_environment() | shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        command = [sys.executable, "-m", "wandazeta", *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    shown = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], shown
    return shown


def test_the_pruned_model_is_measured_beside_the_dense_one(folder, pruned):
    shown = succeeding(folder, "evaluate", "whole", "--baseline", "model", "--text", "text.txt", "--batch_size", "4")
    assert max(map(len, shown.splitlines())) <= 80
    record = json.loads((pruned / "evaluation.json").read_text())
    for found, sparsity in ((record, 0.5), (record["baseline"], 0.0)):
        assert found["sparsity"] == sparsity
        assert found["sample"]["continuation"]
        assert f"{found['perplexity']:.2f}" in shown
    assert (record["model"], record["baseline"]["model"]) == ("whole", "model")
    page = (pruned / "prune_report.html").read_text()
    assert f"{record['perplexity']:,.2f}" in page


@pytest.mark.samples
def test_tasks_are_those_of_the_harness(folder):
    pytest.importorskip("lm_eval")
    tasks, options = "sample_reviews,sample_wikipedia", ["--limit", "12", "--num_fewshot", "1", "--batch_size", "4"]
    shown = succeeding(folder, "evaluate", "model", "--tasks", tasks, *options, "--output_file", "tasks.json")
    assert "sample_reviews, acc" in shown
    assert max(map(len, shown.splitlines())) <= 80
    import wandazeta.data.tasks

    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", "pretrained=model"]
    command += ["--tasks", tasks, *options, "--include_path", str(wandazeta.data.tasks.FOLDER), "--device", "cpu"]
    subprocess.run(
        [*command, "--output_path", "harness"],
        cwd=folder,
        env=clean_environment() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        timeout=300,
        check=True,
    )
    (file,) = (folder / "harness").rglob("results_*.json")
    expected, found = (json.loads(path.read_text()) for path in (file, folder / "tasks.json"))
    for task in tasks.split(","):
        numbers = {name: x for name, x in expected["results"][task].items() if isinstance(x, float)}
        assert len(numbers) >= 2
        for name, number in numbers.items():
            assert found["tasks"][task][name] == pytest.approx(number, rel=1e-6), (task, name)


def test_ctrl_c_ends_with_one_line(folder):
    command = [sys.executable, "-m", "wandazeta", *PRUNE, "--output_dir", "stopped"]
    process = subprocess.Popen(command, cwd=folder, env=clean_environment(), stderr=subprocess.PIPE, text=True)
    while not blocks(folder / "stopped") and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    shown = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 130
    assert shown.splitlines()[-1] == (
        "stopped while pruning: finished blocks are in 'stopped'; start the same again to go on"
    )
    assert "Traceback" not in shown
