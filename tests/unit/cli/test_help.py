import json
import shlex
import subprocess
import sys

import pytest

from wandazeta import __version__
from wandazeta.cli.help import COMMANDS, PAGES, short_help, without_all
from wandazeta.cli.lightning_cli import WandazetaCLI
from wandazeta.cli.main import command_line

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MODEL = ("--model", "ZerothOrderModule", "--model.model_name_or_path", "NAME")
DATA = ("--data", "TextDataModule")

RUN = """
import json, runpy, sys
sys.argv = ["wandazeta", *json.loads(sys.argv[1])]
try:
    runpy.run_module("wandazeta", run_name="__main__")
except SystemExit as exit:
    assert not exit.code
sys.stderr.write(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


HEAVY = {"torch", "lightning", "transformers", "datasets", "numpy"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in PAGES if command != "prune"),
        ["prune", "-c", "x.yaml", "--help"],
        ["fit", "-c", "x.yaml", "-h"],
    ],
)
def test_help_and_version_answer_at_once_without_anything_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(arguments)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == short_help(arguments)
    assert not {*HEAVY, "jsonargparse"} & set(json.loads(done.stderr))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_function_imports_nothing_heavy(command):
    arguments = json.dumps([command, "--help"])
    done = subprocess.run(
        [sys.executable, "-c", RUN, arguments], capture_output=True, text=True, check=True, timeout=300
    )
    assert "example:" in done.stdout
    assert COMMANDS[command][1:] in " ".join(done.stdout.split())
    assert not HEAVY & set(json.loads(done.stderr))


def test_the_overview_names_every_command_and_the_version_is_that_of_the_package():
    assert all(f"  {command} " in short_help(["--help"]) for command in (*PAGES, *COMMANDS))
    assert short_help(["--version"]) == f"wandazeta {__version__}"


@pytest.mark.parametrize("command", [None, *PAGES])
def test_help_fits_a_terminal_and_names_ten_options_with_an_example(command):
    text = short_help(["--help"] if command is None else [command, "--help"])
    assert max(map(len, text.splitlines())) <= 80
    if command is not None:
        assert 5 <= len(PAGES[command].options) <= 11
        assert "example:" in text
        assert f"`wandazeta {command} --help all`" in text


@pytest.mark.parametrize(
    "arguments",
    [["fit", "--help", "all"], ["fit", "-c", "run.yaml"], ["fit", "--model.help=LanguageModel"], ["fti", "-h"]],
)
def test_the_rest_is_left_to_the_parser(arguments):
    assert short_help(arguments) is None


def test_all_is_an_answer_to_help_alone():
    assert without_all(["fit", "--help", "all"]) == ["fit", "--help"]
    assert without_all(["fit", "--run_dir", "all"]) == ["fit", "--run_dir", "all"]


def test_help_all_prints_every_option(monkeypatch, capsys):
    from wandazeta.__main__ import main

    monkeypatch.setattr("sys.argv", ["wandazeta", "prune", "--help", "all"])
    with pytest.raises(SystemExit, match="0"):
        main()
    shown = capsys.readouterr().out
    assert "--trainer.log_every_n_steps" in shown
    assert "Directory to write: weights, tokenizer, masks" in shown


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Gives arguments to the parser of the commands, without running one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["wandazeta"])
    (tmp_path / "run.yaml").write_text("seed_everything: 1\n")
    for step in ("before_instantiate_classes", "instantiate_classes"):
        monkeypatch.setattr(WandazetaCLI, step, lambda self: None)
    monkeypatch.setattr(WandazetaCLI, "_run_subcommand", lambda self, command: None)
    return command_line


@pytest.mark.parametrize("command", PAGES)
def test_the_example_and_the_options_are_those_of_the_parser(parse, command):
    page = PAGES[command]
    name, *arguments = shlex.split(page.example.replace("\\\n", " "))
    assert name == "wandazeta"
    assert parse(arguments).subcommand == command
    for option, _ in page.options:
        name, value = shlex.split(option)
        cli = parse([command, *MODEL, *DATA, name, value])
        if name.startswith("--") and "." not in name and value != "null":
            assert cli.config[command][name.removeprefix("--")] is not None
