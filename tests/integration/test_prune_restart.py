"""Pruning that is stopped, at any moment and by any means, goes on and gives the same bytes."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from helpers.pruning import Tiny, callback, loader, same, trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from wandazeta.callbacks.pruning import progress

# One process imports everything once; each attempt is a fork of it, so that many kills fit into a test.
SERVER = """
    import os, random, signal, sys, time
    from pathlib import Path

    sys.path.insert(0, sys.argv[1])
    import torch
    torch.set_num_threads(1)
    from helpers.pruning import Tiny, callback, loader, trainer
    from safetensors.torch import save_file

    work, attempts, draw = Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))

    def prune(folder):
        pruning = callback(folder, rounds=2, target="dense_stream", learning_rate=1e-4)
        module = Tiny(width=32, num_blocks=24)
        trainer(pruning, limit_train_batches=1).fit(module, loader(shuffle=True))
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, folder / "model.safetensors")

    def start(folder):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                prune(folder)
                code = 0
            finally:
                os._exit(code)
        return child

    begun = time.monotonic()
    assert os.waitpid(start(work / "undisturbed"), 0)[1] == 0
    seconds = time.monotonic() - begun
    for attempt in range(attempts):
        folder = work / f"killed-{attempt}"
        stops = []
        while True:
            child = start(folder)
            if len(stops) == 3:
                assert os.waitpid(child, 0)[1] == 0
                break
            time.sleep(draw.uniform(0, 1.05 * seconds * (1 - len(stops) / 4)))
            os.kill(child, signal.SIGKILL)
            if os.waitpid(child, 0)[1] == 0:
                break
            stops.append(len(list(folder.glob("block_*.safetensors"))))
        print(folder.name, "blocks at each kill:", stops, flush=True)
"""


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


def test_killed_at_random_moments_the_same_bytes_come_out(repository, tmp_path):
    seed = int.from_bytes(os.urandom(4), "big")
    arguments = [str(repository / "tests"), str(tmp_path), "4", str(seed)]
    command = [sys.executable, "-c", textwrap.dedent(SERVER), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}\n{done.stdout}\n{done.stderr}"
    for attempt in range(4):
        assert_same_bytes(tmp_path / f"killed-{attempt}", tmp_path / "undisturbed", num_blocks=24)


def test_killed_between_any_two_writes_the_same_bytes_come_out(tmp_path, monkeypatch):
    """Stops before each rename, the points at which what is on disk changes."""

    def prune(folder):
        module = Tiny()
        trainer(callback(folder)).fit(module, loader())
        return module

    class KilledError(BaseException):
        pass

    expected = prune(tmp_path / "undisturbed")
    write, writes = progress.write_atomically, 0
    for stop in range(100):
        folder, left = tmp_path / f"stopped-{stop}", stop

        def stopping(path, content):
            nonlocal left
            if left == 0:
                path.with_name(f".{path.name}.tmp").write_bytes(content[: len(content) // 2])
                raise KilledError
            left -= 1
            write(path, content)

        monkeypatch.setattr(progress, "write_atomically", stopping)
        try:
            prune(folder)
        except KilledError:
            writes += 1
        monkeypatch.setattr(progress, "write_atomically", write)
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
    save = progress.ProgressFolder.save

    def saving(folder, index, result):
        if index == 1:
            os.kill(os.getpid(), signum)
        save(folder, index, result)

    with monkeypatch.context() as patch:
        patch.setattr(progress.ProgressFolder, "save", saving)
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
