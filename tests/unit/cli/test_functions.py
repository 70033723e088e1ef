"""The commands that are functions: options, errors and what they read."""

import inspect
import json
import shutil
import subprocess
import sys
from pkgutil import resolve_name

import pytest
from helpers.fit_config import write_inputs
from helpers.tokenizer import byte_tokenizer

import wandazeta
from wandazeta import __main__
from wandazeta.cli import functions
from wandazeta.cli.help import is_function
from wandazeta.pruning.pattern import SparsityPattern

RECOVER = "recover pruned --teacher model --text text.txt --output_dir out --sequence_length 16"


@pytest.mark.parametrize("command", ["prune", "evaluate"])
def test_options_and_defaults_are_those_of_the_function(command):
    expected = inspect.signature(getattr(wandazeta, command)).parameters
    found = vars(functions.parse([command, "name"]))
    assert found.pop("model") == "name"
    assert found.pop("text") == []
    assert found.pop("text_column") == "text"
    assert found == {
        name: parameter.default for name, parameter in expected.items() if name not in ("model", "tokenizer", "texts")
    }


def test_values_have_the_types_of_the_function():
    options = ["--text", "a.txt", "b.csv", "--sparsity", "0.5", "--exclude_modules", "q_proj,.*down", "--pack", "true"]
    found = functions.parse(["prune", "name", *options, "--num_samples", "8", "--output_dir", "out"])
    assert found.text == ["a.txt", "b.csv"]
    assert (found.sparsity, found.exclude_modules, found.pack) == (0.5, ["q_proj", ".*down"], True)
    assert (found.num_samples, found.output_dir) == (8, "out")
    found = functions.parse(["evaluate", "name", "--tasks=a,b", "--limit", "0.1", "--num_fewshot", "2"])
    assert (found.tasks, found.limit, found.num_fewshot) == (["a", "b"], 0.1, 2)


@pytest.mark.parametrize("command", list(functions.COMMANDS))
def test_help_has_an_example_and_all_options_and_needs_no_torch(command):
    program = f"""
import sys
from wandazeta.cli import functions
from wandazeta.cli.help import is_function
try:
    functions.main([{command!r}, "--help"])
finally:
    assert not {{"torch", "lightning", "transformers"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert f"example:\n  wandazeta {command} " in done.stdout
    if command in functions.FUNCTIONS:
        for name in inspect.signature(resolve_name(functions.FUNCTIONS[command])).parameters:
            assert f"--{name} " in done.stdout or name in ("model", "tokenizer", "texts")


@pytest.mark.parametrize(
    ("args", "handled"),
    [
        (["prune", "name", "--text", "a.txt"], True),
        (["prune", "--help"], True),
        (["prune"], True),
        (["prune", "-c", "a.yaml"], False),
        (["prune", "--config=a.yaml", "--output_dir", "out"], False),
        (["prune", "--prune", "{}", "--model.model_name_or_path", "name"], False),
        (["evaluate", "name"], True),
        (["recover", "name", "--teacher", "dense"], True),
        (["export-adapters", "run", "out"], True),
        (["fit", "-c", "a.yaml"], False),
        (["--help"], False),
        ([], False),
    ],
)
def test_commands_with_a_configuration_are_those_of_lightning(args, handled):
    assert is_function(args) == handled


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    # what tells a pruned model, and the tokens of another one
    (shutil.copytree(tmp_path / "model", tmp_path / "pruned") / "sparsity").mkdir()
    for name in ("sparsity/masks.safetensors", "prune_report.json"):
        (tmp_path / "pruned" / name).touch()
    byte_tokenizer((" north",)).save_pretrained(tmp_path / "other")
    return tmp_path


def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["wandazeta", *map(str, args)])
    __main__.main()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("prune model --sparsty 0.5", "`--sparsty`; did you mean `--sparsity`"),
        ("prune model --output-dir out", "`--output-dir`; did you mean `--output_dir`"),
        ("prune", "the following arguments are required: model"),
        ("prune model --sparsity half", "argument `sparsity` to be a number, but got 'half'"),
        ("prune model --num_samples 1.5", "argument `num_samples` to be a whole number, but got '1.5'"),
        ("prune model --pack 2", "argument `pack` to be true or false, but got '2'"),
        ("prune model --compute_dtype fp8", "argument `compute_dtype` to be one of auto, model, bfloat16"),
        ("prune model --text text.txt", "argument `output_dir` to be a directory"),
        ("prune model --output_dir out", "Expected calibration texts, but got none"),
        ("prune model --text no.txt --output_dir out", "argument `text` to name existing files, but got 'no.txt'"),
        ("prune model --text reviews.jsonl --text_column body --output_dir out", "Expected a column 'body' in line 1"),
        ("prune nowhere/at/all --text text.txt --output_dir out", "there is no such directory"),
        ("prune model --text text.txt --output_dir model", "holds other files"),
        ("prune model --sparsity 0.7 --pattern 2:4 --output_dir out", "`sparsity` to be left out with pattern='2:4'"),
        ("prune model --sparsity 50 --output_dir out", "argument `sparsity` to be between 0 and 1"),
        ("prune model --method wander --output_dir out", "argument `method` to be one of"),
        ("evaluate model", "Expected texts or `tasks`, but got neither"),
        ("evaluate model --limit", "argument --limit: expected one argument"),
        ("recover pruned --text text.txt --output_dir out", "the following arguments are required: teacher"),
        (RECOVER.replace("pruned", "model"), "that `wandazeta prune` wrote, but 'model' has no sparsity/masks"),
        (RECOVER.replace("--teacher model", "--teacher other"), "`teacher` to be a model with the same tokens"),
        (RECOVER.replace("--teacher model", "--teacher no/such/model"), "there is no such directory"),
        (RECOVER.replace("--output_dir out", "--output_dir model"), "holds other files"),
        (RECOVER.replace("--text text.txt", ""), "Expected text that fills a window"),
        (f"{RECOVER} --batch_size 999 --tokens 999999", "Expected text for a step of `batch_size` 999 windows"),
        (f"{RECOVER} --tokens 100", "`tokens` to be an integer of at least 128, but got 100"),
        (f"{RECOVER} --learning_rate 0", "`learning_rate` to be above 0"),
        (f"{RECOVER} --lora_rank 0", "`lora_rank` to be an integer larger than 0"),
    ],
)
def test_wrong_usage_is_told_in_one_line(folder, monkeypatch, capsys, args, message):
    before = set(folder.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *args.split())
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert len(shown.splitlines()) == 1
    assert message in shown
    assert set(folder.rglob("*")) == before


def test_recover_is_for_one_process(folder, monkeypatch, capsys):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *RECOVER.split())
    assert "Expected one process to recover a model, but got 2" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_texts_come_from_files_of_several_kinds(folder, monkeypatch, capsys):
    (folder / "more.csv").write_text("body,number\nfirst text,1\nsecond text,2\n")
    seen = {}

    def noting(model, tokenizer, texts, **options):
        seen.update(texts=texts, options=options)
        raise KeyboardInterrupt("stopped while pruning: start the same again to go on")

    monkeypatch.setattr(wandazeta, "prune", noting, raising=False)
    (folder / "text.jsonl").write_text(json.dumps({"body": "third text"}) + "\n")
    options = ["--text_column", "body", "--sparsity", "0.5", "--output_dir", "out"]
    with pytest.raises(SystemExit, match="130"):
        run(monkeypatch, "prune", "model", "--text", "more.csv", "text.jsonl", *options)
    assert capsys.readouterr().err == "stopped while pruning: start the same again to go on\n"
    assert seen["texts"] == ["first text", "second text", "third text"]
    assert SparsityPattern(seen["options"]["pattern"], seen["options"]["sparsity"]).label == "50%"
