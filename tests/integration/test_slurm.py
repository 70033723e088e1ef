"""The shipped batch scripts on a real SLURM of two nodes: preemption, a node that fails, and the same files in the end.

Both nodes are on this machine, each with a daemon and an address of its own.
"""

import csv
import hashlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import slurm
from helpers.fit_config import fit_settings, write_inputs
from helpers.prune_options import method_arguments
from helpers.two_ranks import SOON_S

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm.obstacle()), reason=slurm.obstacle() or "there is SLURM"),
]
SCRIPTS = Path(__file__).parents[2] / "configs" / "slurm"
STEPS = 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, num_blocks=4)
    return folder


def environment():
    """That of a user who has activated the project's environment, and the helpers beside it."""
    kept = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return kept | {"PYTHONPATH": str(Path(__file__).parents[1])}


def fit_config(inputs, folder, seconds=0.0, requeue_signal="SIGUSR1", strategy="ddp"):
    """Prunes on two ranks and fine-tunes; blocks take so many seconds more."""
    config = fit_settings(inputs, "run")
    config["model"] = {
        "class_path": "helpers.slow_module.SlowZerothOrderModule",
        "init_args": {"model_name_or_path": str(inputs / "model"), "seconds": seconds},
    }
    environment = "lightning.pytorch.plugins.environments.SLURMEnvironment"
    config["trainer"] |= {
        "strategy": strategy,
        "max_steps": STEPS,
        "limit_val_batches": 0,
        "plugins": [{"class_path": environment, "init_args": {"requeue_signal": requeue_signal}}],
    }
    logger = {"save_dir": "run", "name": "log", "version": "", "flush_logs_every_n_steps": 1}
    config["trainer"]["logger"] = {"class_path": "CSVLogger", "init_args": logger}
    config["prune"]["method"]["init_args"]["optimisation"]["rounds"] = 2
    # only a preempted job writes a checkpoint before the end
    config["checkpoint_every"] = STEPS
    folder.mkdir()
    (folder / "runs" / "slurm").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def fit(cluster, folder, nodes=1):
    """Submit a run of two ranks, on one node or on two."""
    script, options = SCRIPTS / ("one_node.sbatch" if nodes == 1 else "many_nodes.sbatch"), [f"--nodes={nodes}"]
    tasks = 2 // nodes
    return cluster.submit(
        script, "-c", "config.yaml", folder=folder, tasks=tasks, options=options, environment=environment()
    )


def log(folder):
    (file,) = (folder / "runs" / "slurm").glob("*.out")
    return file.read_text()


def ended(job):
    return job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")


def through(cluster, number, folder):
    job = cluster.wait(number, ended)
    assert job["JobState"] == "COMPLETED", log(folder)[-4000:]
    return int(job["Restarts"])


def logged(folder):
    """Steps whose loss each file of metrics has, the oldest file first."""
    files = [*sorted(folder.glob("run/log/metrics-*.csv")), *folder.glob("run/log/metrics.csv")]
    return [[int(row["step"]) for row in csv.DictReader(file.open()) if row["train/loss"]] for file in files]


def blocks_of(folder):
    files = sorted(folder.glob("block_*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def result(folder):
    """Bytes of every pruned block, and what was trained."""
    path = folder / "run" / "checkpoints" / "last.ckpt"
    if path.is_dir():  # of DeepSpeed
        checkpoint = torch.load(path / "checkpoint" / "mp_rank_00_model_states.pt", weights_only=False)
        checkpoint["state_dict"] = checkpoint["module"]
    else:
        checkpoint = torch.load(path, weights_only=True)
    state = {name: value for name, value in checkpoint["state_dict"].items() if name != "anchor"}
    return blocks_of(folder / "run" / "pruning"), checkpoint["global_step"], state


def assert_equal(found, wanted):
    assert found[0] == wanted[0]
    assert len(found[0]) == 4
    assert found[1] == wanted[1] == STEPS
    assert found[2].keys() == wanted[2].keys()
    for name, value in found[2].items():
        assert torch.equal(value, wanted[2][name]), name


@pytest.fixture(scope="module")
def undisturbed(cluster, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "undisturbed"
    fit_config(inputs, folder)
    assert through(cluster, fit(cluster, folder), folder) == 0
    return folder


def test_both_tasks_are_ranks_of_one_run(undisturbed):
    logs = {path.stem: path.read_text() for path in undisturbed.rglob("logs/rank-*.log")}
    assert logs.keys() == {"rank-0", "rank-1"}
    for rank in (0, 1):
        assert f"rank {rank} of 2, process " in logs[f"rank-{rank}"]
    _, steps, state = result(undisturbed)
    assert steps == STEPS
    # 4 queries with two sides in every step, whoever ran them
    assert state["progress"].tolist() == [STEPS, 8 * STEPS, STEPS]


@pytest.mark.parametrize("ranks", ["both", "the second"])
def test_a_job_preempted_within_a_step_goes_on_to_the_same_bits(cluster, inputs, undisturbed, tmp_path, ranks):
    folder = tmp_path / "preempted"
    fit_config(inputs, folder, seconds=0.05)
    number = fit(cluster, folder)
    # a step is 4 forwards of 4 slow blocks on each rank: nearly all of the time is spent within one
    cluster.wait(number, lambda job: sum(map(len, logged(folder))) >= 2)
    if ranks == "both":
        cluster.run("scancel", "--signal=USR1", number)
    else:
        # the other one is within the same step, and waits for this one's losses
        os.kill(cluster.tasks(number)[1], signal.SIGUSR1)
    assert through(cluster, number, folder) == 1
    (step,) = (int(found) for found in re.findall(r"Preempted after step (\d+): ", log(folder)))
    assert 0 < step < STEPS
    assert re.findall(r"Restored all states from the checkpoint at .*/checkpoints/last\.ckpt", log(folder))
    # a requeued job trains on until SLURM ends it
    first, second = logged(folder)
    assert first == list(range(len(first)))
    assert len(first) >= step
    assert second == list(range(step, STEPS))
    assert [path.name for path in folder.rglob("*.ckpt")] == ["last.ckpt"]
    assert_equal(result(folder), result(undisturbed))


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_job_preempted_while_it_prunes_goes_on_to_the_same_bytes(cluster, inputs, undisturbed, tmp_path, name):
    folder = tmp_path / "preempted"
    fit_config(inputs, folder, seconds=0.03, requeue_signal=f"SIG{name}")
    number = fit(cluster, folder)
    cluster.wait(number, lambda job: blocks_of(folder / "run" / "pruning"))
    cluster.run("scancel", f"--signal={name}", number)
    cluster.wait(number, lambda job: job["Restarts"] == "1")
    assert 0 < len(blocks_of(folder / "run" / "pruning")) < 4, "it was not preempted in the middle"
    assert not list(folder.rglob("*.ckpt"))
    assert through(cluster, number, folder) == 1
    assert_equal(result(folder), result(undisturbed))


STRATEGIES = ["ddp", {"class_path": "helpers.cpu_deepspeed.CPUDeepSpeedStrategy", "init_args": {"stage": 2}}]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["ddp", "deepspeed"])
def test_two_nodes_are_preempted_and_go_on_to_the_bits_of_one(cluster, inputs, undisturbed, tmp_path, strategy):
    folder = tmp_path / "nodes"
    fit_config(inputs, folder, seconds=0.05, strategy=strategy)
    number = fit(cluster, folder, nodes=2)
    cluster.wait(number, lambda job: sum(map(len, logged(folder))) >= 2)
    assert cluster.job(number)["NumNodes"] == "2"
    cluster.run("scancel", "--signal=USR1", number)
    assert through(cluster, number, folder) == 1
    (step,) = (int(found) for found in re.findall(r"Preempted after step (\d+): ", log(folder)))
    assert logged(folder)[1] == list(range(step, STEPS))
    record = json.loads((folder / "run" / "log" / "environment.json").read_text())
    assert (record["num_nodes"], record["world_size"]) == (2, 2)
    assert_equal(result(folder), result(undisturbed))


def test_a_node_that_fails_is_named_and_the_job_goes_on_when_it_is_back(cluster, inputs, undisturbed, tmp_path):
    folder = tmp_path / "lost"
    fit_config(inputs, folder, seconds=0.05)
    number = fit(cluster, folder, nodes=2)
    cluster.wait(number, lambda job: sum(map(len, logged(folder))) >= 2)
    tasks = cluster.tasks(number)
    cluster.kill_node(slurm.NODES[1], tasks[1])
    survivor = Path(f"/proc/{tasks[0]}")
    cluster.wait(number, lambda job: not survivor.exists(), seconds=SOON_S)
    assert "error: rank 1 is lost: it was killed, or its machine does not answer" in log(folder)
    # what SLURM does by itself once the node has not answered for some minutes; it then requeues the job
    cluster.run("scontrol", "update", f"NodeName={slurm.NODES[1]}", "State=DOWN", "Reason=killed")
    cluster.wait(number, lambda job: job["Restarts"] == "1")
    cluster.start_node(slurm.NODES[1])
    assert through(cluster, number, folder) == 1
    assert_equal(result(folder), result(undisturbed))


def test_two_nodes_prune_from_the_files_to_the_bytes_of_one_node_in_memory(cluster, inputs, undisturbed, tmp_path):
    (tmp_path / "runs" / "slurm").mkdir(parents=True)
    config = yaml.safe_load((undisturbed / "config.yaml").read_text())
    model = {"model_name_or_path": str(inputs / "model"), "loading": {"stream_weights": True}}
    # one device, as the shipped configurations of a pruning have it
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    chosen = {"model": {"class_path": "LanguageModel", "init_args": model}, "trainer": trainer}
    settings = {name: config[name] for name in ("prune", "data")} | chosen
    (tmp_path / "streamed.yaml").write_text(yaml.safe_dump(settings))
    script, options = SCRIPTS / "prune_array.sbatch", ["--array=0", "--nodes=2"]
    number = cluster.submit(
        script, "streamed.yaml", folder=tmp_path, tasks=1, options=options, environment=environment()
    )
    assert through(cluster, f"{number}_0", tmp_path) == 0
    assert log(tmp_path).count("pruned model: ") == 1
    record = json.loads((tmp_path / "runs" / "streamed" / "log" / "prune" / "environment.json").read_text())
    assert (record["num_nodes"], record["world_size"]) == (2, 2)
    assert blocks_of(tmp_path / "runs" / "streamed" / "pruning") == result(undisturbed)[0]


def test_an_array_prunes_side_by_side_and_a_preempted_task_goes_on(cluster, inputs, tmp_path):
    (tmp_path / "runs" / "slurm").mkdir(parents=True)
    data = {"source": str(inputs / "text.txt"), "sequence_length": 16}
    for name, seconds in (("quick", 0.0), ("slow", 0.05)):
        model = {"model_name_or_path": str(inputs / "model"), "seconds": seconds}
        config = {
            "model": {"class_path": "helpers.slow_module.SlowLanguageModel", "init_args": model},
            "data": {"class_path": "TextDataModule", "init_args": data},
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "logger": False,
                "enable_progress_bar": False,
            },
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    small = {"method": method_arguments(rounds=2, samples_per_round=4), "num_calibration_samples": 6}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"prune": small}))
    script = SCRIPTS / "prune_array.sbatch"
    array = cluster.submit(
        script,
        "small.yaml,quick.yaml",
        "small.yaml,slow.yaml",
        folder=tmp_path,
        tasks=1,
        options=["--array=0-1"],
        environment=environment(),
    )
    cluster.wait(f"{array}_1", lambda job: blocks_of(tmp_path / "runs" / "small-slow" / "pruning"))
    cluster.run("scancel", "--signal=USR1", f"{array}_1")
    jobs = [cluster.wait(f"{array}_{task}", ended) for task in (0, 1)]
    logs = {file.name: file.read_text()[-3000:] for file in (tmp_path / "runs" / "slurm").iterdir()}
    assert [job["JobState"] for job in jobs] == ["COMPLETED"] * 2, logs
    assert [job["Restarts"] for job in jobs] == ["0", "1"], logs
    models = [tmp_path / "runs" / f"small-{name}" / "model" / "model.safetensors" for name in ("quick", "slow")]
    assert models[0].read_bytes() == models[1].read_bytes()
