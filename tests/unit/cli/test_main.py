import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from helpers.fit_config import write_inputs
from helpers.tiny_model import save_tiny_llama
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from wandazeta import __version__, presets
from wandazeta.callbacks import KeepSparsity, RankConsistencyCheck, RankWatchdog, RunProgressBar, WandaPPPruneCallback
from wandazeta.cli.main import PruningTrainer, command_line, main
from wandazeta.datamodules import TextDataModule
from wandazeta.modules import ZerothOrderModule
from wandazeta.pruning import RGS

ROOT = Path(__file__).parents[3]
MODEL = ["--model", "LanguageModel", "--model.model_name_or_path", "nowhere/at/all"]
DATA = ["--data", "TextDataModule"]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["wandazeta"])


def failing(capsys, *args):
    with pytest.raises(SystemExit) as exit_info:
        main(list(args))
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    for command in ("fit", "prune", "diagnose", "validate", "test", "predict"):
        assert command in shown


def test_options_have_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["prune", "--help"])
    assert "Directory to write: weights, tokenizer, masks" in capsys.readouterr().out
    for option, text in (
        ("--model.help=ZerothOrderModule", "Number of queries of a step"),
        ("--data.help=PromptedClassificationDataModule", "The answers in the order of the classes"),
        ("--data.help=TextDataModule", "Windows for calibration, drawn from the training split"),
        ("--prune.help", "Pruning method: a name"),
        ("--trainer.callbacks.help=WandaPPPruneCallback", "Pruning method: a name"),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(["fit", option])
        # wrapped to the terminal's width
        assert text in " ".join(capsys.readouterr().out.split())


def test_wrong_values_are_one_line(capsys):
    for option, message in (
        ([], "error: Expected argument `model_name_or_path`"),
        (["--data.sequence_length", "0"], "error: Expected argument `sequence_length`"),
        (["--trainer.devices", "0"], "error: "),
    ):
        shown = failing(capsys, "validate", *MODEL, *DATA, *option)
        assert shown.splitlines()[-1].startswith(message)
        assert "Traceback" not in shown


def test_unknown_options_are_refused(capsys):
    assert "not_an_option" in failing(capsys, "validate", *MODEL, *DATA, "--data.not_an_option", "1")


def test_the_traceback_is_there_for_the_asking(monkeypatch):
    monkeypatch.setenv("WANDAZETA_DEBUG", "1")
    with pytest.raises(ValueError, match="Expected argument `model_name_or_path`"):
        main(["validate", *MODEL, *DATA])


@pytest.mark.parametrize("command", ["fit", "validate", "diagnose"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere.ckpt", "does not exist"),
        ("folder", "is another folder"),
        ("empty", "cannot be read as one"),
        ("notes.txt", "cannot be read as one"),
        ("cut.ckpt", "cannot be read as one"),
        ("tensor.ckpt", "cannot be read as one"),
    ],
)
def test_a_checkpoint_that_is_none_is_refused_before_the_model_is_loaded(tmp_path, capsys, command, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "notes.txt").write_text("what was planned for the afternoon")
    torch.save(torch.ones(1000), tmp_path / "tensor.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "tensor.ckpt").read_bytes()[:2000])
    shown = failing(capsys, command, *MODEL, *DATA, "--ckpt_path", name)
    last = shown.strip().splitlines()[-1]
    assert last.startswith("error: Expected argument `ckpt_path` to be last, best, null or the path of a checkpoint")
    assert f"but got '{name}', which {reason}" in last
    assert "Traceback" not in shown


@pytest.mark.parametrize("name", ["last", "https://somewhere/last.ckpt", "file.ckpt", "old.ckpt", "deepspeed.ckpt"])
def test_what_may_be_a_checkpoint_is_left_to_its_reader(tmp_path, capsys, name):
    torch.save({"state_dict": {}}, tmp_path / "file.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "deepspeed.ckpt/checkpoint").mkdir(parents=True)
    # the model is what it looks at next
    trained = ("--model", "ZerothOrderModule", *MODEL[2:])
    assert "Expected argument `model_name_or_path`" in failing(capsys, "fit", *trained, *DATA, "--ckpt_path", name)


@pytest.mark.parametrize("below", ["", "/deeper/down"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("diagnose", ["--output_dir"]),
        ("fit", ["--run_dir"]),
        ("fit", ["--trainer.default_root_dir"]),
        ("fit", ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir"]),
        ("fit", ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.dirpath"]),
    ],
)
def test_a_file_where_a_folder_is_wanted_is_told_before_the_model_is_loaded(tmp_path, capsys, command, option, below):
    (tmp_path / "taken").touch()
    shown = failing(capsys, command, *MODEL, *DATA, *option, f"taken{below}")
    argument = option[-1].removeprefix("--").replace("trainer.logger.", "").replace("trainer.callbacks.", "")
    last = shown.strip().splitlines()[-1]
    assert last.startswith(f"error: Expected argument `{argument}` to be a folder or a path where one can be created")
    assert f"'{tmp_path}/taken' is a file" in last
    assert "Traceback" not in shown


def test_diagnose_looks_at_its_folder_before_it_measures(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match="Expected argument `output_dir`"):
        PruningTrainer(accelerator="cpu", logger=False).diagnose(BoringModel(), output_dir=str(tmp_path / "taken"))


def test_prune_wants_its_callback_before_the_model_is_loaded(capsys):
    assert "Expected a `prune:` group or a WandaPPPruneCallback" in failing(capsys, "prune", *MODEL, *DATA)


PLAIN = """
model:
  class_path: {module}
  init_args:
    model_name_or_path: model
data:
  class_path: PromptedClassificationDataModule
  init_args: {{source: reviews.jsonl, template: "{{text}} is", batch_size: 4, num_train: 40, num_val: 8, num_test: 8}}
trainer:
  accelerator: cpu
  max_steps: 6
  enable_progress_bar: false
"""
EVALUATIONS = ("validate", "test", "predict")


@pytest.fixture
def plain(tmp_path):
    """Writes a config of nothing but model, data and steps; the folder of the run is the working directory."""
    write_inputs(tmp_path)

    def write(module):
        (tmp_path / "plain.yaml").write_text(PLAIN.format(module=module))
        return ["-c", "plain.yaml"]

    return write


def test_a_plain_config_goes_on_where_it_stopped_and_says_so(tmp_path, plain, caplog):
    config = plain("FirstOrderModule")

    def fit(*arguments):
        caplog.clear()
        main(["fit", *arguments])
        return next(message for message in caplog.messages if message.startswith("The training "))

    last = f"'{tmp_path}/checkpoints/last.ckpt'"
    assert fit(*config) == "The training starts at step 0 of 6."
    assert fit(*config, "--trainer.max_steps", "10") == f"The training goes on at step 6 of 10, from {last}."
    # the configuration that the run has written
    assert fit("-c", "log/config.yaml", "--trainer.max_steps", "12") == (
        f"The training goes on at step 10 of 12, from {last}."
    )
    assert f"nothing left to do after step 12 in {last}" in fit("-c", "log/config.yaml")
    assert torch.load("checkpoints/last.ckpt", weights_only=True)["global_step"] == 12
    assert fit(*config, "--ckpt_path", "null") == "The training starts at step 0 of 6."


@pytest.mark.parametrize("command", EVALUATIONS)
@pytest.mark.parametrize("module", ["FirstOrderModule", "ZerothOrderModule", "LanguageModel"])
def test_an_untrained_module_is_evaluated_only_if_asked_for(tmp_path, plain, capsys, module, command):
    config = plain(module)
    if module != "LanguageModel":
        last = failing(capsys, command, *config).strip().splitlines()[-1]
        assert last.startswith(f"error: Expected a checkpoint of {module} in 'checkpoints', but there is none")
        assert "`--ckpt_path null`" in last
    main([command, *config, *(() if module == "LanguageModel" else ("--ckpt_path", "null"))])


def test_the_newest_checkpoint_is_found_beside_callbacks_that_keep_the_best(tmp_path, plain, caplog):
    best = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "train/loss", "every_n_train_steps": 2}}
    (tmp_path / "best.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [best]}}))
    config = [*plain("FirstOrderModule"), "-c", "best.yaml"]
    main(["fit", *config])
    assert len(list(tmp_path.glob("checkpoints/*.ckpt"))) == 2
    caplog.clear()
    main(["fit", *config, "--trainer.max_steps", "10"])
    assert "goes on at step 6 of 10" in caplog.text
    main(["test", *config])
    assert "last.ckpt" in caplog.text


def test_without_running_it_gives_model_data_module_and_trainer(tmp_path):
    model, text = save_tiny_llama(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("a paragraph")
    before = sorted(tmp_path.rglob("*"))
    cli = command_line(
        [
            *("--model", "ZerothOrderModule", "--model.model_name_or_path", str(model)),
            *(*DATA, "--data.source", str(text), "--data.sequence_length", "16"),
            *("--trainer.accelerator", "cpu", "--trainer.max_steps", "7"),
            *("--prune.method", "RGS", "--prune.method.alpha", "5"),
        ],
        run=False,
    )
    assert isinstance(cli.model, ZerothOrderModule)
    assert isinstance(cli.datamodule, TextDataModule)
    assert cli.datamodule.sequence_length == 16
    assert isinstance(cli.trainer, PruningTrainer)
    assert cli.trainer.max_steps == 7
    (pruning,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, WandaPPPruneCallback))
    assert pruning.options.method == RGS(alpha=5.0)
    # nothing ran
    assert cli.trainer.global_step == 0
    assert cli.trainer.state.fn is None
    assert pruning.report is None
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("given", ["null", "true"])
def test_the_default_logger_is_csv_even_beside_tensorboard(tmp_path, monkeypatch, given):
    connector = "lightning.pytorch.trainer.connectors.logger_connector.logger_connector"
    monkeypatch.setattr(f"{connector}._TENSORBOARD_AVAILABLE", True)
    model = save_tiny_llama(tmp_path / "model")
    arguments = ["--model", "LanguageModel", "--model.model_name_or_path", str(model), "--trainer.accelerator", "cpu"]
    cli = command_line([*arguments, *("--trainer.logger", given, "--trainer.default_root_dir", "here")], run=False)
    assert type(cli.trainer.logger) is CSVLogger
    assert Path(cli.trainer.logger.log_dir) == Path("here/log")


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=300)


def test_the_checkout_runs_the_same_program():
    result = run(ROOT / "main.py", "--version")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"wandazeta {__version__}"


def test_the_checkout_says_when_the_package_is_not_installed():
    # without site-packages: an interpreter that has nothing
    result = run("-S", ROOT / "main.py", "fit")
    assert result.returncode != 0
    assert result.stderr.strip().splitlines() == [
        "error: wandazeta is not installed; run `pip install -e .` in the checkout"
    ]


def test_the_process_group_is_left_however_the_run_ends(tmp_path, monkeypatch):
    import torch.distributed as dist

    def joining(args, log):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        raise ValueError("something does not fit")

    monkeypatch.setattr("wandazeta.cli.main.command_line", joining)
    with pytest.raises(SystemExit, match="2"):
        main([])
    # left open, gloo's threads abort the process when the interpreter ends under them
    assert not dist.is_initialized()


@pytest.mark.parametrize("form", ["in a list", "alone"])
def test_prune_takes_a_subclass_of_its_callback_and_one_without_a_list(tmp_path, capsys, monkeypatch, form):
    (tmp_path / "mine.py").write_text(
        "from wandazeta.callbacks import WandaPPPruneCallback\n\nclass Mine(WandaPPPruneCallback):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = {"class_path": "mine.Mine"}
    config = tmp_path / "trainer.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [given] if form == "in a list" else given}}))
    # the callback is taken, so that the model is looked at
    assert "Expected argument `model_name_or_path`" in failing(capsys, "prune", "-c", str(config), *MODEL, *DATA)


@pytest.fixture
def built(tmp_path):
    """Builds a run without running it: `built("--run_dir", "here")`."""
    model = save_tiny_llama(tmp_path / "model")

    def build(*options):
        model_options = ("--model", "LanguageModel", "--model.model_name_or_path", str(model))
        return command_line([*model_options, "--trainer.accelerator", "cpu", *options], run=False)

    return build


def found(cli, kind):
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, kind)]


@pytest.mark.parametrize("option", ["--run_dir", "--trainer.default_root_dir"])
def test_one_option_decides_where_everything_goes(built, tmp_path, option):
    trainer = (cli := built(option, "here", "--prune", "{}", "--checkpoint_every", "7")).trainer
    assert Path(trainer.default_root_dir) == Path("here")
    assert Path(trainer.logger.log_dir) == Path("here/log")
    (checkpoint,) = found(cli, ModelCheckpoint)
    assert Path(checkpoint.dirpath).absolute() == tmp_path / "here/checkpoints"
    assert (checkpoint.save_last, checkpoint._every_n_train_steps) == (True, 7)
    (pruning,) = found(cli, WandaPPPruneCallback)
    assert Path(pruning.output_dir) == Path("here/pruning")


def test_without_options_a_run_has_the_working_directory_and_prunes_nothing(built, tmp_path):
    cli = built()
    assert Path(cli.trainer.logger.log_dir) == Path("log")
    assert Path(found(cli, ModelCheckpoint)[0].dirpath).absolute() == tmp_path / "checkpoints"
    assert not found(cli, WandaPPPruneCallback)


def test_callbacks_and_loggers_of_the_trainer_keep_their_folders(built, tmp_path):
    checkpoint = ("--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.dirpath", "there")
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs")
    cli = built("--run_dir", "here", *checkpoint, *logger, "--prune.output_dir", "progress")
    # none of the given ones has `save_last`
    assert [Path(callback.dirpath).name for callback in found(cli, ModelCheckpoint)] == ["there", "checkpoints"]
    cli = built(
        "--run_dir",
        "here",
        *checkpoint,
        "--trainer.callbacks.save_last",
        "true",
        *logger,
        "--prune.output_dir",
        "progress",
    )
    assert [Path(callback.dirpath).name for callback in found(cli, ModelCheckpoint)] == ["there"]
    assert cli.trainer.logger.save_dir == "logs"
    assert found(cli, WandaPPPruneCallback)[0].output_dir == "progress"
    assert not found(built("--trainer.enable_checkpointing", "false"), ModelCheckpoint)


def test_the_bar_is_that_of_the_run_unless_there_is_another_or_none(built):
    assert [type(bar) for bar in found(built(), ProgressBar)] == [RunProgressBar]
    assert [type(bar) for bar in found(built("--trainer.callbacks", "TQDMProgressBar"), ProgressBar)] == [
        TQDMProgressBar
    ]
    assert not found(built("--trainer.enable_progress_bar", "false"), ProgressBar)


def test_two_folders_for_one_run_are_refused(capsys):
    shown = failing(capsys, "fit", *MODEL, *DATA, "--run_dir", "here", "--trainer.default_root_dir", "there")
    assert "Expected argument `trainer.default_root_dir` to be left out with `run_dir`" in shown
    assert "`checkpoint_every`" in failing(capsys, "fit", *MODEL, *DATA, "--checkpoint_every", "0")


def test_a_pruning_comes_before_the_other_callbacks_and_after_the_checks_of_ranks(built):
    cli = built("--prune", "{}", "--trainer.callbacks", "KeepSparsity")
    kinds = [type(callback) for callback in cli.trainer.callbacks]
    place = kinds.index(WandaPPPruneCallback)
    assert kinds.index(RankWatchdog) < kinds.index(RankConsistencyCheck) < place < kinds.index(KeepSparsity)


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_read_by_its_name_and_can_be_overridden(built, name):
    (pruning,) = found(built("-c", f"preset:{name}", "--prune.seed", "3"), WandaPPPruneCallback)
    settings = yaml.safe_load(presets.path(name).read_text())["prune"]
    assert pruning.num_calibration_samples == settings["num_calibration_samples"]
    assert pruning.options.seed == 3


def test_an_unknown_preset_is_refused_with_the_known_ones(capsys):
    assert "to be one of best, paper, but got 'bset'" in failing(capsys, "fit", "-c", "preset:bset", *MODEL)


def test_a_run_does_not_list_absent_hardware_or_draw_bars_of_files(plain, capsys, caplog):
    main(["validate", *plain("LanguageModel")])
    captured = capsys.readouterr()
    shown = captured.out + captured.err + caplog.text
    assert "val/perplexity" in shown or "val/accuracy" in shown
    for noise in ("GPU available", "TPU available", "Loading weights", "Tip:", "no last checkpoint"):
        assert noise not in shown


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("failed", [False, True])
def test_ranks_leave_their_process_group_unless_one_may_be_lost(monkeypatch, tmp_path, backend, failed):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: backend)

    def command(*args, **kwargs):
        if failed:
            raise ValueError("an error of the user")

    monkeypatch.setattr("wandazeta.cli.main.command_line", command)
    try:
        with pytest.raises(SystemExit) if failed else nullcontext():
            main([])
        # NCCL would wait for a rank that is lost
        assert torch.distributed.is_initialized() == (failed and backend == "nccl")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
