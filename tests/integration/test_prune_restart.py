"""Pruning that is stopped, at any moment and by any means, goes on and gives the same bytes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers.processes import run
from helpers.pruning import Tiny, callback, loader, same, trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from wandazeta.pruning.method.block import BlockPruner
from wandazeta.pruning.progress import folder as progress
from wandazeta.utilities import files


def contents(folder):
    """Everything but the seconds and the memory that a block took."""
    measured = ("report.json", ".cost.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(measured)}


def assert_same_bytes(folder, reference, num_blocks):
    found, expected = contents(folder), contents(reference)
    assert sum(name.startswith("block_") for name in expected) == num_blocks
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert {path.name for path in folder.iterdir()} == {path.name for path in reference.iterdir()}


@pytest.mark.slow
def test_killed_ten_times_in_a_row_the_same_bytes_come_out(tmp_path):
    seed = int.from_bytes(os.urandom(4), "big")
    run("killed_prune", {"seed": seed, "kills": 10}, tmp_path)
    seen = json.loads((tmp_path / "kills.json").read_text())
    assert len(seen["kills"]) == 10
    finished = [kill["finished"] for kill in seen["kills"]]
    assert finished == sorted(set(finished)), f"seed {seed}: a kill without progress before it"
    assert [kill["exporting"] for kill in seen["kills"]] == [False] * 9 + [True]
    assert sum(kill["writing"] for kill in seen["kills"]) >= 3, f"seed {seed}: hardly a kill met the writer"
    assert seen["kept"], f"seed {seed}: a finished block was written again"
    assert all(kill["kept"] for kill in seen["kills"]), f"seed {seed}: a finished block was written again"

    folders = [tmp_path / "undisturbed", tmp_path / "killed"]
    made = [[p for p in f.rglob("*") if p.is_file() and "log" not in p.parts] for f in folders]
    files = [{str(p.relative_to(f)): p.read_bytes() for p in m} for f, m in zip(folders, made, strict=True)]
    assert files[0].keys() == files[1].keys()
    assert {"progress/complete.json", "model/model.safetensors", "model/prune_report.html"} <= files[0].keys()
    different = [name for name, content in files[0].items() if files[1][name] != content]
    assert different == [], f"seed {seed}"


def test_killed_between_any_two_writes_the_same_bytes_come_out(tmp_path, monkeypatch):
    """Stops before each rename, the points at which what is on disk changes."""

    def prune(folder):
        module = Tiny()
        trainer(callback(folder)).fit(module, loader())
        return module

    class KilledError(BaseException):
        pass

    expected = prune(tmp_path / "undisturbed")
    replace, writes = Path.replace, 0
    for stop in range(100):
        folder, left = tmp_path / f"stopped-{stop}", stop

        def stopping(path, target):
            nonlocal left
            if path.name == files.TEMPORARY_NAME:
                if left == 0:
                    raise KilledError(path, path.read_bytes())
                left -= 1
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stopping)
            try:
                prune(folder)
            except KilledError as killed:
                writes += 1
                path, content = killed.args
                path.write_bytes(content[: len(content) // 2])
        assert same(prune(folder), expected)
        assert_same_bytes(folder, tmp_path / "undisturbed", num_blocks=3)
        if writes == stop:
            break
    # the key, two for each block, the report and the mark of completion
    assert writes == 1 + 2 * 3 + 2


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_lets_the_block_finish_and_writes_no_checkpoint(tmp_path, monkeypatch, caplog, signum):
    expected, before = Tiny(), signal.getsignal(signum)
    trainer(callback(tmp_path / "undisturbed")).fit(expected, loader())
    save, finish = progress.ProgressFolder.save, BlockPruner.finish

    def saving(folder, index, result):
        time.sleep(0.1)  # at the signal, the block before is still being written
        save(folder, index, result)

    def finishing(block, *args):
        if block.index == 1:
            os.kill(os.getpid(), signum)
        return finish(block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(progress.ProgressFolder, "save", saving)
        patch.setattr(BlockPruner, "finish", finishing)
        folder = tmp_path / "stopped"
        with pytest.raises(SystemExit) as stop:
            trainer(callback(folder), OnExceptionCheckpoint(tmp_path / "checkpoints"), enable_checkpointing=True).fit(
                Tiny(), loader()
            )
    assert stop.value.code == 128 + signum
    assert f"Stopped by {signum.name} while pruning" in caplog.text
    assert len(list(folder.glob("block_*.safetensors"))) == 2
    assert not (tmp_path / "checkpoints").exists()
    assert signal.getsignal(signum) == before
    module = Tiny()
    trainer(callback(folder)).fit(module, loader())
    assert same(module, expected)
    assert_same_bytes(folder, tmp_path / "undisturbed", num_blocks=3)


@pytest.mark.slow
def test_sigterm_from_outside(repository, tmp_path):
    code = f"""
        import sys
        sys.path.insert(0, {str(repository / "tests")!r})
        from helpers.pruning import Tiny, callback, loader, trainer

        trainer(callback(sys.argv[1])).fit(Tiny(num_blocks=300), loader())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("block_*.safetensors"))) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM while pruning: finished blocks are in" in error
    assert "Traceback" not in error
    assert 3 <= len(list(tmp_path.glob("block_*.safetensors"))) < 300
