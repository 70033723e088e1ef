"""What a run leaves behind: one report and one bar on the terminal, a log of each rank, configuration, environment."""

import csv
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.fit_config import wandazeta, write_fit_config

from wandazeta.callbacks.run_record import RankLog
from wandazeta.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 6


def talkative(config, **options):
    """Add the callback that speaks by every means."""
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"].append({"class_path": "helpers.talkative.Talkative", "init_args": options})
    config.write_text(yaml.safe_dump(settings))


def logger(name):
    return {"class_path": "CSVLogger", "init_args": {"save_dir": "run", "name": name, "version": ""}}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A run of two ranks with two loggers, in a folder that `rank_fails` copies."""
    folder = tmp_path_factory.mktemp("two")
    bar = {"class_path": "TQDMProgressBar"}
    config = write_fit_config(
        folder, strategy="ddp", devices=2, enable_progress_bar=True, logger=[logger("log"), logger("second")]
    )
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"].append(bar)
    config.write_text(yaml.safe_dump(settings))
    talkative(config)
    done = wandazeta(folder, "fit", "-c", "config.yaml")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def log_of(folder, rank):
    return (folder / "run/log/logs" / f"rank-{rank}.log").read_text()


@pytest.mark.slow
def test_the_terminal_is_rank_zeros_but_for_errors(two_ranks):
    _, shown = two_ranks
    assert shown.count("Pruned by wanda++") == 1
    assert shown.count("2/2 blocks") == 1
    assert shown.count("Epoch 0:   0%") == 1
    assert "Loading weights" not in shown
    for said in ("warning of", "transformers of", "library of", "info of"):
        assert shown.count(f"{said} 0") == 1
        assert f"{said} 1" not in shown
    for rank in range(2):
        assert shown.count(f"error of {rank}") == 1
    assert "GLOBAL_RANK: 1" not in shown


@pytest.mark.slow
def test_every_rank_has_a_log_with_times(two_ranks):
    folder, _ = two_ranks
    for rank in range(2):
        log = log_of(folder, rank)
        assert f"rank {rank} of 2" in log
        # from before the folder was known, too
        assert "Seed set to 0" in log
        for said in ("warning of", "transformers of", "library of", "error of"):
            times = re.findall(rf"^(\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d+) .*{said} {rank}$", log, flags=re.MULTILINE)
            assert len(times) == 1, said
            assert f"{said} {1 - rank}" not in log
    assert "info of 0" in log_of(folder, 0)
    assert "Trainer.fit` stopped" in log_of(folder, 0)


@pytest.mark.slow
def test_each_logger_has_the_metrics_once(two_ranks):
    folder, _ = two_ranks
    for name in ("log", "second"):
        assert len(list((folder / "run").rglob("metrics.csv"))) == 2
        rows = list(csv.DictReader((folder / "run" / name / "metrics.csv").open()))
        assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(STEPS))


@pytest.mark.slow
def test_metrics_of_the_same_folder_are_kept_when_it_runs_again(two_ranks, tmp_path):
    shutil.copytree(two_ranks[0], tmp_path, dirs_exist_ok=True)
    first = (tmp_path / "run/log/metrics.csv").read_text()
    for number in (1, 2):
        done = wandazeta(tmp_path, "fit", "-c", "config.yaml", "--trainer.max_steps", str(STEPS + number))
        assert done.returncode == 0, done.stderr
        for name in ("log", "second"):
            files = sorted(path.name for path in (tmp_path / "run" / name).glob("metrics*.csv"))
            assert files == [*(f"metrics-{earlier + 1}.csv" for earlier in range(number)), "metrics.csv"]
    assert (tmp_path / "run/log/metrics-1.csv").read_text() == first
    rows = list(csv.DictReader((tmp_path / "run/log/metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [STEPS + 1]


@pytest.mark.slow
def test_configuration_and_environment_are_those_of_all_ranks(two_ranks):
    folder, _ = two_ranks
    environment = json.loads((folder / "run/log/environment.json").read_text())
    assert (environment["world_size"], environment["strategy"]) == (2, "DDPStrategy")
    saved = yaml.safe_load((folder / "run/log/config.yaml").read_text())
    assert (saved["trainer"]["devices"], saved["trainer"]["max_steps"]) == (2, STEPS)
    assert not (folder / "run/second/config.yaml").exists()


@pytest.mark.slow
def test_the_log_of_a_rank_that_fails_has_the_traceback(two_ranks, tmp_path):
    shutil.copytree(two_ranks[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "run/checkpoints/last.ckpt").unlink()
    talkative(tmp_path / "config.yaml", failing_rank=1)
    done = wandazeta(tmp_path, "fit", "-c", "config.yaml")
    assert done.returncode != 0
    assert "RuntimeError: failure of 1" in done.stderr
    assert "Traceback (most recent call last)" in log_of(tmp_path, 1)
    assert "RuntimeError: failure of 1" in log_of(tmp_path, 1)
    assert "failure of 1" not in log_of(tmp_path, 0)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/wandazeta", "fit", "-c", str(tmp_path / "config.yaml")])
    return write_fit_config(tmp_path)


def theta():
    return torch.load("run/checkpoints/last.ckpt", weights_only=True)["state_dict"]["adapters.theta"]


def test_the_environment_names_software_hardware_and_command_but_nobody(config, monkeypatch):
    for name, value in {"USER": "somebody", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "tuning"}.items():
        monkeypatch.setenv(name, value)
    main(["fit", "-c", str(config), "--trainer.max_steps", "2"])
    text = Path("run/log/environment.json").read_text()
    environment = json.loads(text)
    assert environment["command"] == "wandazeta fit -c config.yaml"
    assert {"python", "wandazeta", "torch", "transformers", "lightning", "datasets"} <= environment["versions"].keys()
    assert environment["hardware"].keys() == {"cpu", "cores", "threads", "gpu", "gpus"}
    assert (environment["world_size"], environment["strategy"]) == (1, "SingleDeviceStrategy")
    assert environment["slurm_job_id"] == 17
    assert "somebody" not in text
    assert str(Path.home()) not in text


def test_the_saved_configuration_is_the_same_run_again(config, tmp_path):
    main(["fit", "-c", str(config), "--model.init_args.learning_rate", "2e-3", "--seed_everything", "3"])
    first, pruned = theta(), sorted(path.read_bytes() for path in Path("run/pruning").glob("*.safetensors"))
    Path("run").rename("first")
    config.unlink()
    main(["fit", "-c", "first/log/config.yaml"])
    assert torch.equal(theta(), first)
    assert sorted(path.read_bytes() for path in Path("run/pruning").glob("*.safetensors")) == pruned
    assert Path("run/log/config.yaml").read_text() == Path("first/log/config.yaml").read_text()


def test_without_a_logger_the_record_has_a_folder_of_its_own(config):
    main(["fit", "-c", str(config), "--trainer.logger", "false", "--run_dir", "here"])
    assert sorted(path.name for path in Path("here/log").iterdir()) == [
        "config.yaml",
        "environment.json",
        "logs",
    ]
    assert "rank 0 of 1" in Path("here/log/logs/rank-0.log").read_text()


def test_prune_and_diagnose_leave_a_record_that_can_be_used_again(config):
    main(["prune", "-c", str(config), "--output_dir", "exported"])
    weights = Path("exported/model.safetensors").read_bytes()
    assert Path("run/log/prune/environment.json").exists()
    assert "rank 0 of 1" in Path("run/log/prune/logs/rank-0.log").read_text()
    Path("run").rename("pruned")
    shutil.rmtree("exported")
    main(["prune", "-c", "pruned/log/prune/config.yaml"])
    assert Path("exported/model.safetensors").read_bytes() == weights

    main(["diagnose", "-c", str(config), "--output_dir", "first", "--num_batches", "1", "--num_queries", "2"])
    assert yaml.safe_load(Path("run/log/diagnose/config.yaml").read_text())["num_queries"] == 2
    Path("run/log/diagnose").rename("diagnosed")
    main(["diagnose", "-c", "diagnosed/config.yaml", "--output_dir", "second"])
    assert Path("second/epsilon.json").read_text() == Path("first/epsilon.json").read_text()


def test_the_log_is_there_while_it_prunes_and_says_what_went_wrong(config, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "-c", str(config), "--prune.exclude_modules", "[no_such_layer]"])
    assert "Traceback" not in capsys.readouterr().err
    log = Path("run/log/logs/rank-0.log").read_text()
    assert "ERROR wandazeta.callbacks.run_record: ended by ValueError" in log
    assert "Traceback (most recent call last)" in log
    assert "no_such_layer" in log


def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0.log").symlink_to("/dev/full")
    with RankLog() as log:
        log.open(tmp_path, 0, 1)
        logging.getLogger("some.library").error("a line")
    assert "Logging error" not in capsys.readouterr().err


def test_tensorboard_takes_one_line(config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["logger"] = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "board"}}
    config.write_text(yaml.safe_dump(settings))
    main(["fit", "-c", str(config)])
    (folder,) = {path.parent for path in Path("board").rglob("events.*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(STEPS))
    assert (folder / "config.yaml").exists()
    assert (folder / "logs/rank-0.log").exists()
