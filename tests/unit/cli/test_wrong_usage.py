"""Wrong usages of the command line: each is told in at most three lines, with what is wrong and what to do."""

import copy
import logging
import sys

import pytest
import torch
import yaml
from helpers.fit_config import wandazeta, write_inputs
from helpers.small_disk import small_disk

from wandazeta.cli.main import main

# Python hides them outside of tests
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MODEL = ("--model", "LanguageModel", "--model.model_name_or_path", "model")
TRAINED = ("--model", "ZerothOrderModule", "--model.model_name_or_path", "model")
DATA = ("--data", "TextDataModule", "--data.source", "text.txt", "--data.sequence_length", "16")
CPU = ("--trainer.accelerator", "cpu")
PRUNE = ("prune", "-c", "ok.yaml", "--output_dir", "out")

SETTINGS = {
    "model": {"class_path": "LanguageModel", "init_args": {"model_name_or_path": "model"}},
    "data": {"class_path": "TextDataModule", "init_args": {"source": "text.txt", "sequence_length": 16}},
    "prune": {"method": "wanda", "num_calibration_samples": 4},
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
}

FILES = {
    # in `prune: {…}` and so on, what the file has instead of the settings above
    "option.yaml": ("prune", {"sparsty": 0.5}),
    "data.yaml": ("data", {"class_path": "TextDataModule", "init_args": {"sequence_lenght": 16}}),
    "nested.yaml": ("prune", {"method": {"class_path": "WandaPP", "init_args": {"alhpa": 3}}}),
    "trainer.yaml": ("trainer", {"max_step": 3}),
    "group.yaml": ("modle", {}),
    "class.yaml": ("model", {"class_path": "LanguageModle", "init_args": {"model_name_or_path": "model"}}),
    "method.yaml": ("prune", {"method": {"class_path": "WandaPPP"}}),
    "callback.yaml": ("trainer", {"callbacks": [{"class_path": "EarlyStoping"}]}),
    "precision.yaml": ("trainer", {"precision": "bf61"}),
    "type.yaml": ("data", {"class_path": "TextDataModule", "init_args": {"sequence_length": "long"}}),
    "no_class.yaml": ("model", {"init_args": {"model_name_or_path": "model"}}),
    "no_callback_class.yaml": ("trainer", {"callbacks": [{"init_args": {}}]}),
}
TEXTS = {
    "indent.yaml": "model:\n  class_path: LanguageModel\n   init_args:\n    model_name_or_path: model\n",
    "tab.yaml": "model:\n\tclass_path: LanguageModel\n",
    "list.yaml": "- model\n",
    "cpu.yaml": "trainer:\n  accelerator: cpu\n",
}

# arguments, and what the message has to contain
CASES = {
    # names
    "option": ((*PRUNE, "--prune.sparsty", "0.5"), "`sparsty`; did you mean `sparsity`?"),
    "option of the data": (("fit", *MODEL, *DATA, "--data.sequence_lenght", "3"), "did you mean `sequence_length`?"),
    "option of the model": (("fit", *MODEL, *DATA, "--model.model_name", "x"), "did you mean `model_name_or_path`?"),
    "option of a method": (
        (*PRUNE, "--prune.method", "WandaPP", "--prune.method.alhpa", "3"),
        "WandaPP in `prune.method`, but got `alhpa`; did you mean `alpha`?",
    ),
    "option of an option": (("fit", *MODEL, *DATA, "--model.loading.dtpe", "float32"), "did you mean `dtype`?"),
    "option of the run": (("fit", *MODEL, *DATA, "--run_dri", "x"), "`--run_dri`; did you mean `--run_dir`?"),
    "option without its group": ((*PRUNE, "--sparsity", "0.5"), "did you mean `--prune.sparsity`?"),
    "group": (("fit", *DATA, "--modle.model_name_or_path", "model"), "did you mean `--model.model_name_or_path`?"),
    "dash for underscore": ((*PRUNE[:3], "--output-dir", "out"), "did you mean `--output_dir`?"),
    "something else": (("fit", *MODEL, *DATA, "stray"), "but got `stray`"),
    "command": (("fti", *MODEL), "did you mean `fit`?"),
    "no command": ((), "one of fit, validate, test, predict, prune, diagnose, but got none"),
    "options before the command": ((*MODEL, "fit"), "the command comes first"),
    "class": (("fit", "--model", "LanguageModle", *DATA), "'LanguageModle'; did you mean `LanguageModel`?"),
    "class of a part": ((*("fit", *TRAINED), "--model.trainable", "LoRAAdaptrs"), "did you mean `LoRAAdapters`?"),
    "method": ((*PRUNE, "--prune.method", "wnada"), "one of magnitude, wanda, rgs, ro, wanda++, sparsegpt"),
    "precision": (("fit", *MODEL, *DATA, "--trainer.precision", "bf61"), "'bf61'; did you mean `bf16`?"),
    "preset": (("fit", "-c", "preset:bset", *MODEL), "one of best, paper"),
    # values
    "type": (
        ("fit", *MODEL, *DATA, "--checkpoint_every", "many"),
        "`checkpoint_every` to be an integer, but got 'many'",
    ),
    "type of the data": (("fit", *MODEL, *DATA, "--data.batch_size", "x"), "`data.batch_size` to be an integer"),
    "no value": (("fit", *MODEL, *DATA, "--run_dir"), "a value for `--run_dir`"),
    "percent": (
        (*PRUNE, "--prune.sparsity", "50", "--prune.sparsity_pattern", "unstructured"),
        "`sparsity` to be between 0 and 1",
    ),
    "sparsity of a pattern": (
        (*PRUNE, "--prune.sparsity", "0.7", "--prune.sparsity_pattern", "2:4"),
        "which fixes it to 0.5, but got 0.7",
    ),
    "pattern": ((*PRUNE, "--prune.sparsity_pattern", "4:2"), "but got '4:2'"),
    # what is missing
    "no class": (("fit", "--model.model_name_or_path", "model", *DATA), "for example `--model LanguageModel`"),
    "no class of the data": (("fit", *MODEL, "--data.source", "text.txt"), "for example `--data TextDataModule`"),
    "no model": (("fit", *DATA), "Expected argument `model`, but it is missing"),
    "no name of the model": (
        ("fit", "--model", "LanguageModel", *DATA),
        "`model.model_name_or_path`, but it is missing",
    ),
    "no callback": (("prune", *MODEL, *DATA), "add `-c preset:best`"),
    "no data to fit": (("fit", *TRAINED, *CPU), "`data`, because ZerothOrderModule has no data of its own"),
    "no data to test": (("test", *MODEL, *CPU), "`--data TextDataModule --data.source my_text.txt`"),
    "no data to prune with": (("prune", *MODEL, *CPU, "--prune.method", "wanda"), "Expected calibration data"),
    "nothing to train": (("fit", *MODEL, *DATA, *CPU), "such as ZerothOrderModule, but got LanguageModel"),
    "config": (("fit", "-c", "nowhere.yaml"), "'nowhere.yaml', which does not exist"),
    "config with another ending": (("fit", "-c", "ok.yml"), "did you mean `ok.yaml`?"),
    "folder for a config": (("fit", "-c", "model"), "'model', which is a folder"),
    "model": ((*PRUNE, "--model.model_name_or_path", "no/such/model"), "there is no such directory"),
    "folder without a model": ((*PRUNE, "--model.model_name_or_path", "."), "this directory holds no model"),
    "hub": ((*PRUNE, "--model.model_name_or_path", "someone/model"), "the hub cannot be reached"),
    "hub of the data": ((*PRUNE, "--data.source", "someone/texts"), "Could not read `source` 'someone/texts'"),
    "text": ((*PRUNE, "--data.source", "nowhere.txt"), "but got 'nowhere.txt', which matches none"),
    "checkpoint": (("test", *MODEL, *DATA, "--ckpt_path", "nowhere.ckpt"), "'nowhere.ckpt', which does not exist"),
    # the machine
    "GPU": (("fit", *TRAINED, *DATA, "--trainer.accelerator", "gpu"), "got 'gpu', which it does not have"),
    "GPU to prune on": ((*PRUNE, "--prune.device", "cuda"), "`device` to be one of this machine, but got 'cuda'"),
    "indices of CPUs": (("test", *MODEL, *DATA, *CPU, "--trainer.devices", "[0,1]"), "got [0, 1]; use 2"),
    "peft": (
        ("fit", "--model", "FirstOrderModule", *TRAINED[2:], *DATA, *CPU, "--model.trainable", "PeftLoRA"),
        "run `pip install peft`",
    ),
    "deepspeed": (("fit", *TRAINED, *DATA, "--trainer.strategy", "deepspeed_stage_2"), "`pip install deepspeed`"),
    # in files
    "option in a file": (("fit", "-c", "option.yaml"), "`prune`, but got `sparsty` in 'option.yaml'; did you mean"),
    "option in one of two files": (("fit", "-c", "option.yaml", "-c", "ok.yaml"), "in 'option.yaml'"),
    "option to prune in a file": (("prune", "-c", "option.yaml"), "did you mean `sparsity`?"),
    "option of the data in a file": (("test", "-c", "data.yaml"), "`sequence_lenght` in 'data.yaml'; did you mean"),
    "option of a method in a file": (("prune", "-c", "nested.yaml"), "`alhpa` in 'nested.yaml'; did you mean `alpha`?"),
    "option of the trainer in a file": (
        ("fit", "-c", "trainer.yaml"),
        "'trainer.yaml'; did you mean `trainer.max_steps`",
    ),
    "group in a file": (("fit", "-c", "group.yaml"), "'group.yaml', but got `modle`; did you mean `model`?"),
    "class in a file": (("fit", "-c", "class.yaml"), "'LanguageModle' in 'class.yaml'; did you mean `LanguageModel`?"),
    "method in a file": (("prune", "-c", "method.yaml"), "'WandaPPP' in 'method.yaml'; did you mean `WandaPP`?"),
    "callback in a file": (("fit", "-c", "callback.yaml"), "did you mean `EarlyStopping`?"),
    "precision in a file": (("fit", "-c", "precision.yaml"), "'bf61' in 'precision.yaml'; did you mean `bf16`?"),
    "type in a file": (
        ("test", "-c", "type.yaml"),
        "`data.sequence_length` to be an integer, but got 'long' in 'type.yaml'",
    ),
    "no class in a file": (("fit", "-c", "no_class.yaml"), "`model_name_or_path` in 'no_class.yaml'; for example"),
    "no class of a callback in a file": (("fit", "-c", "no_callback_class.yaml"), "every entry of `trainer.callbacks`"),
    "indentation": (("fit", "-c", "indent.yaml"), "'indent.yaml' with an error in line 3, column 13"),
    "tab": (("fit", "-c", "tab.yaml"), "'tab.yaml' with an error in line 2, column 1"),
    "list in a file": (("fit", "-c", "list.yaml"), "'list.yaml', which holds no options by name"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs and configuration files that all cases read."""
    root = tmp_path_factory.mktemp("usage")
    write_inputs(root)
    (root / "ok.yaml").write_text(yaml.safe_dump(SETTINGS))
    for name, (group, content) in FILES.items():
        settings = copy.deepcopy(SETTINGS)
        settings[group] = content if group in ("model", "data", "modle") else settings[group] | content
        (root / name).write_text(yaml.safe_dump(settings))
    for name, text in TEXTS.items():
        (root / name).write_text(text)
    return root


def unreachable(*arguments):
    raise OSError("Name or service not known")


@pytest.fixture
def bare_machine(monkeypatch):
    """A machine without a GPU, without a hub, and without the packages of the extras."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("sys.argv", ["wandazeta"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", unreachable)
    # every repeated request would wait
    monkeypatch.setattr("time.sleep", unreachable)
    for package in ("peft", "deepspeed"):
        monkeypatch.setitem(sys.modules, package, None)


def told(capsys, caplog, arguments, code=2):
    """Run the command line, and return the lines of its error and the records of the terminal."""
    caplog.clear()
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    assert exit_info.value.code == code
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return capsys.readouterr().err.strip().splitlines() + [record.getMessage() for record in warned]


@pytest.mark.parametrize("name", CASES)
def test_wrong_usage_is_told_in_three_lines(folder, bare_machine, monkeypatch, capsys, caplog, name):
    monkeypatch.chdir(folder)
    arguments, expected = CASES[name]
    lines = told(capsys, caplog, arguments)
    assert len(lines) <= 3, lines
    (error,) = (line for line in lines if line.startswith("error: "))
    assert expected in error
    for noise in ("usage:", "Union", "<class", "NestedArg", "Parser key", "Traceback", "Given value"):
        assert noise not in "\n".join(lines)


def test_a_full_disk_is_told_in_three_lines(folder, monkeypatch, capsys, caplog, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["wandazeta"])
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        (disk / "ballast").write_bytes(bytes(1000 * 1024))
        lines = told(capsys, caplog, (*PRUNE[:3], "--output_dir", str(disk / "out"), "--run_dir", str(tmp_path)))
    assert len(lines) <= 3, lines
    assert "error: " in lines[-1]
    assert str(disk) in lines[-1]


def test_a_config_before_the_command_is_read_as_one_behind_it(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["wandazeta"])
    (tmp_path / "plain.yaml").write_text(
        yaml.safe_dump({name: SETTINGS[name] for name in ("model", "data", "trainer")})
    )
    main(["-c", f"{tmp_path}/plain.yaml", "--config=cpu.yaml", "validate", "--run_dir", str(tmp_path)])
    assert "val/perplexity" in capsys.readouterr().out


def test_a_process_shows_nothing_but_its_error(folder):
    done = wandazeta(folder, *CASES["option in a file"][0])
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) <= 3
    assert "did you mean `sparsity`?" in done.stderr
    assert not done.stdout


def test_the_whole_error_is_there_for_the_asking(folder, monkeypatch, capsys, caplog):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDAZETA_DEBUG", "1")
    monkeypatch.setattr("sys.argv", ["wandazeta"])
    assert "usage:" in "\n".join(told(capsys, caplog, CASES["option"][0]))
