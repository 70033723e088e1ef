"""`prune -c` on two ranks, in memory and streamed: the bytes of `prune MODEL` in one process, and what a rank holds."""

import json
import sys
import textwrap

import pytest
import yaml
from helpers import left_threads
from helpers.fit_config import write_inputs
from helpers.two_ranks import run, start

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CONFIG = ["prune", "-c", "../config.yaml", "--output_dir", "out"]
NUM_SAMPLES = 7
# as many tokens as go through a block at once: no sample shares a product with others, whose number would decide how it
# is rounded
LENGTH = "2048"

# what a rank holds while it runs a block; with a file `kill` in the folder, rank 1 is killed at the second block
WATCHED = """
    import json, os, signal, sys

    import torch
    from wandazeta.cli.main import main
    from wandazeta.models.streaming import is_file_backed
    from wandazeta.modules import LanguageModel
    from wandazeta.pruning import pruner

    rank, blocks, samples = os.environ["RANK"], set(), []
    build, capture = LanguageModel.__init__, pruner.capture_samples

    def watch(self, *args, **kwargs):
        build(self, *args, **kwargs)
        layers = self.backbone.model.layers

        def look(block, args):
            if rank == "1" and samples and block is layers[1] and os.path.exists("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            blocks.add(sum(not is_file_backed(layer.mlp.up_proj.weight) for layer in layers))

        for layer in layers:
            layer.mlp.up_proj.register_forward_pre_hook(lambda module, args, layer=layer: look(layer, args))

    def count(*args):
        samples.append(capture(*args))
        return samples[-1]

    LanguageModel.__init__, pruner.capture_samples = watch, count
    main()
    found = {"blocks": sorted(blocks), "samples": [len(each.hidden) for each in samples]}
    open(f"held-{rank}.json", "w").write(json.dumps(found))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The inputs, a configuration, and what `prune MODEL` writes in one process with the same settings in `plain`."""
    root = tmp_path_factory.mktemp("ranks")
    write_inputs(root, num_blocks=3)
    text = (root / "text.txt").read_text()
    (root / "text.txt").write_text(text * (NUM_SAMPLES * int(LENGTH) // len(text) + 1))
    reading = {"split_fractions": [1.0, 0.0, 0.0]}
    data = {"source": "../text.txt", "sequence_length": int(LENGTH), "reading": reading}
    config = {
        "run_dir": "run",
        "prune": {"method": "wanda++", "num_calibration_samples": NUM_SAMPLES},
        "model": {"class_path": "LanguageModel", "init_args": {"model_name_or_path": "../model"}},
        "data": {"class_path": "TextDataModule", "init_args": data},
        # one device, as the shipped configurations of a pruning have it
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    (root / "watched.py").write_text(textwrap.dedent(WATCHED))
    options = ["--text", "../text.txt", "--sequence_length", LENGTH, "--num_samples", str(NUM_SAMPLES)]
    plain = ["prune", "../model", *options, "--method", "wanda++", "--output_dir", "out"]
    # torchrun gives each rank one thread, unless told otherwise
    run(root / "plain", ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "wandazeta", *plain])
    return root


def assert_same(folder, expected):
    for name in ("model.safetensors", "sparsity/masks.safetensors", "config.json"):
        assert (folder / "out" / name).read_bytes() == (expected / "out" / name).read_bytes(), name


def test_with_ranks_that_lightning_starts(root):
    folder = root / "devices"
    run(folder, ["env", "OMP_NUM_THREADS=1", sys.executable, left_threads.__file__, *CONFIG, "--trainer.devices", "2"])
    assert_same(folder, root / "plain")
    environment = json.loads((folder / "run" / "log" / "prune" / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert {path.name for path in folder.rglob("rank-*.log")} == {"rank-0.log", "rank-1.log"}


def test_streamed_each_rank_holds_one_block_and_its_samples_and_a_killed_rank_is_named(root):
    folder = root / "streamed"
    folder.mkdir()
    (folder / "kill").touch()
    command = [*TORCHRUN, "../watched.py", *CONFIG, "--model.init_args.loading.stream_weights", "true"]
    process = start(folder, command)
    output = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert "error: rank 1 is lost: it was killed" in output
    assert not (folder / "out").exists()
    assert len(list((folder / "run" / "pruning").glob("block_*.safetensors"))) == 1
    (folder / "kill").unlink()
    run(folder, command)
    assert_same(folder, root / "plain")
    held = [json.loads((folder / f"held-{rank}.json").read_text()) for rank in range(2)]
    assert held == [{"blocks": [1], "samples": [4]}, {"blocks": [1], "samples": [3]}]
    # complete, so it is loaded and exported once more
    (folder / "out" / "model.safetensors").unlink()
    run(folder, command)
    assert_same(folder, root / "plain")
    assert json.loads((folder / "held-1.json").read_text())["samples"] == []
