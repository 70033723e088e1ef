"""What goes wrong on disk, or is changed between two runs: a clear refusal or a clean redo, never a wrong model."""

import os
import resource
import shutil
from contextlib import contextmanager

import pytest
from helpers.prune_config import write_prune_config
from helpers.pruning import Tiny, callback, loader, same, trainer
from helpers.small_disk import small_disk as small_disk_at
from safetensors.torch import load_file, save_file

from wandazeta.cli import prune as export
from wandazeta.cli.main import main
from wandazeta.models import safetensors_io
from wandazeta.utilities import files

pytestmark = pytest.mark.filterwarnings("ignore")
PRUNE = ["prune", "-c", "../config.yaml", "--output_dir", "exported", "--pack", "true"]
WEIGHTS = ("model.safetensors", "sparsity/masks.safetensors", "sparsity/model.2of4.safetensors")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The configuration, and an undisturbed run of it in `undisturbed`."""
    root = tmp_path_factory.mktemp("faults")
    write_prune_config(root)
    (root / "undisturbed").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "undisturbed")
        patch.setattr("sys.argv", ["wandazeta"])
        main(PRUNE)
    return root


@pytest.fixture
def inputs(prepared, tmp_path, monkeypatch):
    """A copy of the configuration and what it names, which a test may change; `run` beside it is where to run."""
    shutil.copytree(prepared / "model", tmp_path / "model")
    for name in ("text.txt", "config.yaml"):
        shutil.copy(prepared / name, tmp_path)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["wandazeta"])
    return tmp_path


@pytest.fixture
def small_disk(inputs):
    """A file system of a few megabytes at `run`."""
    with small_disk_at(inputs / "run", 4) as disk:
        os.chdir(disk)
        yield disk
        os.chdir("/")


def fill(disk, left):
    """Leave no more than so many bytes."""
    with (disk / "ballast").open("wb") as file:
        file.write(b"\1" * max(0, shutil.disk_usage(disk).free - left))


def refused(arguments, capsys):
    """The one line that a run ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code not in (0, None)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert sum(line.startswith("error: ") for line in error.splitlines()) == 1
    return last


def assert_as_undisturbed(folder, prepared):
    expected = prepared / "undisturbed"
    for name in WEIGHTS:
        assert (folder / "exported" / name).read_bytes() == (expected / "exported" / name).read_bytes(), name
    blocks = sorted(path.name for path in (expected / "progress").glob("block_*.safetensors"))
    assert len(blocks) == 3
    for name in (*blocks, "key.json", "complete.json"):
        assert (folder / "progress" / name).read_bytes() == (expected / "progress" / name).read_bytes(), name


def files_of(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and "log" not in path.parts)
    return {path: path.read_bytes() for path in files}


# -- the disk is full -------------------------------------------------------------------------------------------------


# the key, then two writes a block, the report and the mark of completion
@pytest.mark.parametrize("stop", [0, 4, 8])
def test_a_disk_that_fills_up_while_pruning_is_told_and_the_next_run_goes_on(
    small_disk, prepared, monkeypatch, capsys, stop
):
    open_file, writes = files.open_atomically, []

    def filling(path):
        writes.append(path.name)
        if len(writes) == stop + 1:
            fill(small_disk, left=0)
        return open_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open_atomically", filling)
        patch.setattr(safetensors_io, "open_atomically", filling)
        line = refused(PRUNE, capsys)
    assert "No space left on device" in line
    assert writes[-1] in line
    assert not list(small_disk.rglob(".*"))
    (small_disk / "ballast").unlink()
    main(PRUNE)
    assert_as_undisturbed(small_disk, prepared)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_a_disk_that_fills_up_while_exporting_leaves_nothing_half_written(
    small_disk, prepared, monkeypatch, capsys, share
):
    export_whole = export.export_pretrained
    size = sum(path.stat().st_size for path in (prepared / "undisturbed" / "exported").rglob("*"))

    def filling(*args, **kwargs):
        fill(small_disk, left=int(share * size))
        export_whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(export, "export_pretrained", filling)
        line = refused(PRUNE, capsys)
    assert "No space left on device" in line or "of room" in line
    assert str(small_disk) in line
    assert {path.name for path in small_disk.iterdir()} == {"progress", "ballast", "log"}
    (small_disk / "ballast").unlink()
    main(PRUNE)
    assert_as_undisturbed(small_disk, prepared)


def test_a_disk_without_room_for_the_model_is_refused_before_any_work(inputs, monkeypatch, capsys):
    usage = shutil.disk_usage(inputs)
    # room for the progress, but not for the model
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=100 * 2**10))
    line = refused(PRUNE, capsys)
    assert "`output_dir` to have" in line
    assert "KiB" in line
    assert not list((inputs / "run").rglob("block_*"))


def test_files_that_may_not_grow_are_told_too(inputs, prepared, capsys):
    """As on a full disk, without the right to mount one."""

    @contextmanager
    def largest_file(num_bytes):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    block = prepared / "undisturbed" / "progress" / "block_0000.safetensors"
    with largest_file(block.stat().st_size - 1):
        line = refused(PRUNE, capsys)
    assert "File too large" in line
    assert block.name in line
    main(PRUNE)
    assert_as_undisturbed(inputs / "run", prepared)


# -- files are damaged ------------------------------------------------------------------------------------------------

DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    # what some file systems leave after a power cut
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "other JSON": lambda path: path.write_text("[1]"),
    "gone": lambda path: path.unlink(),
}
FILES = ("key.json", "block_0001.safetensors", "block_0002.cost.json", "report.json", "complete.json")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_the_progress_never_makes_another_model(tmp_path, name, damage):
    def fit(stage="fit"):
        module = Tiny()
        getattr(trainer(callback(tmp_path / "progress")), stage)(module, loader())
        return module

    expected = fit()
    DAMAGES[damage](tmp_path / "progress" / name)
    if name == "key.json":
        with pytest.raises(ValueError, match=r"key\.json.*delete the folder to prune anew") as error:
            fit()
        assert "\n" not in str(error.value)
        return
    if name != "block_0002.cost.json" or damage != "other JSON":  # of figures alone, the default is taken
        with pytest.raises(ValueError, match="run `fit` or `prune`"):
            fit("validate")
    assert same(fit(), expected)
    assert same(fit("validate"), expected)


def test_a_truncated_block_is_made_again_by_the_command(inputs, prepared):
    shutil.copytree(prepared / "undisturbed", inputs / "run", dirs_exist_ok=True)
    path = inputs / "run" / "progress" / "block_0001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    main(PRUNE)
    assert_as_undisturbed(inputs / "run", prepared)


def test_a_truncated_model_is_refused(inputs, capsys):
    path = inputs / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "`model_name_or_path`" in refused(PRUNE, capsys)
    assert not any((inputs / "run").iterdir())


# -- something is changed between two runs ----------------------------------------------------------------------------


def change_text(inputs):
    text = (inputs / "text.txt").read_text()
    (inputs / "text.txt").write_text(text.replace("paragraph", "pamphlets"))


def change_model(inputs):
    path = inputs / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})


ALPHA = ["--trainer.callbacks.init_args.method.init_args.alpha", "5"]
SHORTER = ["--data.init_args.sequence_length", "12"]


@pytest.mark.parametrize(
    ("change", "message", "is_finished"),
    [
        (ALPHA, "`alpha` (100.0 there, 5.0 here)", False),
        (ALPHA, "`alpha` (100.0 there, 5.0 here)", True),
        (SHORTER, "the calibration data;", False),
        (change_text, "the calibration data;", False),
        (change_text, "the calibration data;", True),
        (change_model, "model tensors, first `backbone.model.layers.2.mlp.up_proj.weight`", False),
    ],
    ids=["option", "option after the end", "length", "file", "file after the end", "model"],
)
def test_what_is_changed_is_named_and_nothing_is_touched(inputs, prepared, capsys, change, message, is_finished):
    shutil.copytree(prepared / "undisturbed", inputs / "run", dirs_exist_ok=True)
    if not is_finished:
        for name in ("complete.json", "report.json", "block_0002.safetensors"):
            (inputs / "run" / "progress" / name).unlink()
    before = files_of(inputs / "run")
    overrides = change if isinstance(change, list) else []
    if not overrides:
        change(inputs)
    assert message in refused([*PRUNE, *overrides], capsys)
    assert files_of(inputs / "run") == before
    shutil.copy(prepared / "text.txt", inputs)
    shutil.copy(prepared / "model" / "model.safetensors", inputs / "model")
    main(PRUNE)
    assert_as_undisturbed(inputs / "run", prepared)
