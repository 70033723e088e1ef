import csv
import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from helpers.fit_config import wandazeta, write_fit_config, write_inputs
from lightning.fabric.plugins import TorchCheckpointIO

from wandazeta.callbacks.run_record import RankLog, RunRecord
from wandazeta.cli.main import command_line, main

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run that prunes a tiny model and fine-tunes it, as a YAML file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["wandazeta"])
    return write_fit_config(tmp_path)


def theta(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name: tensor for name, tensor in state.items() if "theta" in name}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_fit_goes_on_where_it_stopped_and_the_rest_of_the_commands_follow(config, tmp_path, capsys, caplog):
    main(["fit", "-c", str(config)])
    last = tmp_path / "run/checkpoints/last.ckpt"
    first = theta(last)
    assert first
    written = times(tmp_path / "run/pruning")
    assert written
    # again: complete, so nothing moves
    main(["fit", "-c", str(config)])
    assert all(torch.equal(tensor, first[name]) for name, tensor in theta(last).items())
    # longer: equal to a run that never stopped
    main(["fit", "-c", str(config), "--trainer.max_steps", "10"])
    resumed = theta(last)
    assert times(tmp_path / "run/pruning") == written
    last.unlink()
    main(["fit", "-c", str(config), "--trainer.max_steps", "10"])
    whole = theta(last)
    assert any(not torch.equal(tensor, first[name]) for name, tensor in whole.items())
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    rows = list(csv.DictReader((tmp_path / "run/log/metrics.csv").open()))
    assert any(row.get("train/loss") for row in rows)

    for command in ("validate", "test", "predict"):
        capsys.readouterr()
        main([command, "-c", str(config)])
        shown = capsys.readouterr().out
        assert command == "predict" or "accuracy" in shown
    predictions = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    assert [line["index"] for line in predictions] == list(range(8))
    assert all(line["text"].endswith(" is") and line["answer"] in (" bad", " good") for line in predictions)
    assert f"Predictions of 8 examples: {tmp_path}/run/predictions.jsonl" in caplog.text
    for folder in ("", "validate", "test", "predict"):
        assert (tmp_path / "run/log" / folder / "config.yaml").exists()
    # what the other commands wrote there is no obstacle to going on
    main(["fit", "-c", str(tmp_path / "run/log/config.yaml")])


@pytest.mark.parametrize("given", [(), ("--ckpt_path", "last")], ids=["where training starts", "where it ended"])
def test_diagnose_leaves_the_checkpoints_of_a_training_as_they_are(config, tmp_path, monkeypatch, given):
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"].append({"class_path": "OnExceptionCheckpoint", "init_args": {"dirpath": "run"}})
    config.write_text(yaml.safe_dump(settings))
    main(["fit", "-c", str(config)])
    folder, loaded = tmp_path / "run/checkpoints", []
    before, load = times(folder), TorchCheckpointIO.load_checkpoint

    def noting(self, path, *arguments, **options):
        loaded.append(Path(path).name)
        return load(self, path, *arguments, **options)

    monkeypatch.setattr(TorchCheckpointIO, "load_checkpoint", noting)
    arguments = ["--trainer.max_steps", "12", "--num_queries", "2", "--epsilons", "[1e-3]"]
    main(["diagnose", "-c", str(config), *given, *arguments])
    assert loaded == (["last.ckpt"] if given else [])
    assert times(folder) == before
    assert not list(tmp_path.glob("run/*.ckpt"))


@pytest.mark.slow
def test_several_ranks_write_the_predictions_of_one(tmp_path):
    write_inputs(tmp_path)
    settings = {
        "model": {"class_path": "LanguageModel", "init_args": {"model_name_or_path": "model"}},
        "data": {
            "class_path": "TextDataModule",
            "init_args": {"source": "text.txt", "sequence_length": 16, "batch_size": 2, "eval_windows": 7},
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    (tmp_path / "predict.yaml").write_text(yaml.safe_dump(settings))
    found = []
    for name, options in (("one", ()), ("two", ("--trainer.devices", "2", "--trainer.strategy", "ddp"))):
        result = wandazeta(tmp_path, "predict", "-c", "predict.yaml", "--run_dir", name, *options)
        assert result.returncode == 0, result.stderr
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
    one, two = found
    assert [line["index"] for line in two] == list(range(7))
    for first, second in zip(one, two, strict=True):
        assert first["text"] == second["text"]
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


def test_evaluation_refuses_a_model_that_was_not_pruned(config, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["test", "-c", str(config)])
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")


def test_prune_writes_a_model_that_transformers_reads(config, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    main(["prune", "-c", str(config), "--output_dir", "exported"])
    assert str(tmp_path / "exported") in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert ((weight.unflatten(1, (-1, 4)) != 0).sum(dim=2) <= 2).all()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "exported")("a")["input_ids"]) == 1
    # the exported directory is a model like any other
    text = {"class_path": "TextDataModule", "init_args": {"source": "text.txt", "sequence_length": 16}}
    settings = {
        "model": {"class_path": "LanguageModel", "init_args": {"model_name_or_path": "exported"}},
        "data": text,
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    (tmp_path / "validate.yaml").write_text(yaml.safe_dump(settings))
    capsys.readouterr()
    config.unlink()
    main(["validate", "-c", "validate.yaml"])
    assert "perplexity" in capsys.readouterr().out
    assert not config.exists(), "without a logger the configuration does not go into the working directory"


def test_pack_writes_an_extra_file_and_is_for_2of4_alone(config, tmp_path, capsys):
    from safetensors.torch import load_file

    from wandazeta.pruning.export.packed import load_packed

    arguments = ["prune", "-c", str(config), "--output_dir", "exported", "--pack", "true"]
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--prune.sparsity_pattern", "4:8"])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: Expected argument `pack` to be False unless sparsity_pattern='2:4'")
    assert not (tmp_path / "run/pruning").exists()

    main(arguments)
    plain, packed = (tmp_path / "exported" / name for name in ("model.safetensors", "sparsity/model.2of4.safetensors"))
    assert packed.stat().st_size < plain.stat().st_size
    weights, unpacked = load_file(plain), load_packed(packed)
    assert unpacked.keys() == weights.keys()
    assert all(torch.equal(unpacked[name], weights[name]) for name in weights)


def test_bad_input_ends_with_one_line(config, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    for override, message in (
        (["--prune.exclude_modules", "[no_such_layer]"], "no_such_layer"),
        (["--prune.sparsity_pattern", "2:5"], "2:5"),
        (["--prune.output_dir", "empty.jsonl/pruning"], "`output_dir`"),
        (["--model.init_args.loading.pad_token", "no_such_token"], "`pad_token`"),
        (["--data.init_args.source", "empty.jsonl"], "all of it is empty"),
        (["--data.init_args.options", "['', ' good']"], "tokenises to nothing"),
        (["--data.init_args.num_test", "1000"], "`num_test` to be at most"),
        (["--data.init_args.calibration.init_args.num_calibration_samples", "100000"], "`num_calibration_samples`"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            main(["fit", "-c", str(config), *override])
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: "), last
        assert message in last


def test_fit_in_spawned_processes(tmp_path):
    write_fit_config(tmp_path, strategy="ddp_spawn", devices=2, max_steps=2)
    done = wandazeta(tmp_path, "fit", "-c", "config.yaml")
    assert done.returncode == 0, done.stderr
    assert theta(tmp_path / "run/checkpoints/last.ckpt")
    for rank in range(2):
        assert f"rank {rank} of 2" in (tmp_path / f"run/log/logs/rank-{rank}.log").read_text()


def test_everything_that_the_command_line_adds_can_be_pickled(config):
    with RankLog() as log:
        run = command_line(["-c", str(config)], run=False, log=log).trainer
    names = {type(callback).__name__ for callback in run.callbacks}
    assert names >= {"RankWatchdog", "RunRecord", "RankConsistencyCheck", "SLURMRequeue", "WandaPPPruneCallback"}
    for part in (*run.callbacks, *run.loggers, run.strategy.checkpoint_io):
        assert pickle.dumps(part), part
    copy = pickle.loads(pickle.dumps(run))
    assert [type(callback) for callback in copy.callbacks] == [type(callback) for callback in run.callbacks]
    (record,) = (callback for callback in copy.callbacks if isinstance(callback, RunRecord))
    record._log.__exit__(None, None, None)
