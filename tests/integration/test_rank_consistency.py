"""A rank with another package, model or data than rank 0 is named on every rank before any work."""

import os
import socket
import subprocess

import pytest
from helpers.tiny_model import save_tiny_llama
from helpers.two_ranks import COMMAND, clean_environment, write_fit_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("start_alike")
    write_fit_config(root)
    return root


def other_version(root):
    """A package of another version than is installed, as far as its metadata say."""
    package = root / "elsewhere" / "lightning-9.8.7.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning\nVersion: 9.8.7\n")
    return [], {"PYTHONPATH": os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])}


def other_model(root):
    save_tiny_llama(root / "other", num_blocks=10, seed=1)
    return ["--model.init_args.model_name_or_path", "../other"], {}


def other_text(root):
    text = (root / "text.txt").read_text()
    (root / "other.txt").write_text(text.replace("paragraph 40 ", "pamphlets 4 "))
    return ["--data.init_args.source", "../other.txt"], {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_version, "rank 1 has lightning 9.8.7 instead of "),
        (other_model, "rank 1 has another model; "),
        (other_text, "rank 1 has another training data; "),
    ],
)
def test_what_differs_is_named_on_every_rank_before_any_work(prepared, change, message):
    folder = prepared / change.__name__
    folder.mkdir()
    arguments, environment = change(prepared)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = clean_environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    # as torchrun does it, so that each rank can be given something else
    shared |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [*COMMAND, *(arguments if rank else [])],
            cwd=folder,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (environment if rank else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    for error in errors:
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert message in lines[0]
        assert "Traceback" not in error
    assert not (folder / "progress").exists()
