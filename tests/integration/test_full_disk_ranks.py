"""A disk that fills up under rank 0: both ranks end with a line, nothing is half written, and the next run goes on."""

import contextlib
import shutil
import time

import pytest
import torch
from helpers.small_disk import small_disk as small_disk_at
from helpers.two_ranks import SOON_S, assert_same, run, start, trained, write_fit_config

from wandazeta.callbacks import AtomicCheckpointIO

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a file system of a few megabytes at `small`."""
    root = tmp_path_factory.mktemp("full_disk")
    with small_disk_at(root / "small", 16):
        yield root


@pytest.fixture(scope="module")
def prepared(root):
    """The configuration, too, and an undisturbed run of it in `undisturbed`."""
    write_fit_config(root)
    run(root / "undisturbed")
    return root


@pytest.fixture
def small_disk(root):
    """The small file system, empty."""
    small = root / "small"
    for path in small.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return small


@pytest.mark.parametrize("middle", ["progress/block_0001.safetensors", "checkpoints/last.ckpt"])
def test_all_ranks_end_and_the_next_run_goes_on(prepared, small_disk, middle):
    process = start(small_disk)
    deadline = time.monotonic() + 120
    while not (small_disk / middle).exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    fill(small_disk)
    output = process.communicate(timeout=SOON_S)[0]
    assert process.returncode not in (0, None)
    assert "error: No space left on device: '" in output
    assert "killed" not in output
    assert output.count("error: ") == 2, "a line of each rank"
    assert "Traceback" not in output
    assert not [path for path in small_disk.rglob(".*") if path.is_file()]
    if middle.startswith("checkpoints"):
        assert "error: rank 0 failed, see its own error" in output
        trained(small_disk)
    else:
        assert "error: Failed on rank 0: [Errno 28]" in output
    (small_disk / "ballast").unlink()
    run(small_disk)
    assert_same(small_disk, prepared / "undisturbed")


def test_a_checkpoint_without_room_leaves_the_one_before(small_disk):
    path, files = small_disk / "last.ckpt", AtomicCheckpointIO()
    files.save_checkpoint({"step": 1}, path)
    fill(small_disk)
    with pytest.raises(OSError, match=r"No space left on device.*last\.ckpt"):
        files.save_checkpoint({"step": 2, "weights": torch.ones(10**6)}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert {path.name for path in small_disk.iterdir()} == {"last.ckpt", "ballast"}


def fill(disk):
    """Leave nothing, whatever is being written."""
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
