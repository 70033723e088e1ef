"""FSDP2 by Lightning's ModelParallelStrategy: two ranks on gloo compared with one process."""

import subprocess
import sys

import pytest
import torch
import yaml
from helpers import gradient_run, zo_run
from helpers.causal_lms import save_tiny_lm
from helpers.first_order import prune
from helpers.masked import is_positive_zero
from helpers.processes import run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wandazeta.adapters import Weights
from wandazeta.modules import FirstOrderModule

pytest.importorskip("peft")
pytestmark = pytest.mark.slow

CLIP = {"gradient_clip_val": 0.05}  # far below the norm of the gradients
WEIGHTS = {"trainable": "Weights", "learning_rate": 1e-3, "weight_decay": 0.1}
MODES = {
    "lora": {"trainable": "PeftLoRA", "learning_rate": 1e-2},
    "tensor_train": {"trainable": "TensorTrainAdapters", "learning_rate": 1e-2},
    "masked": WEIGHTS | {"trainer_options": CLIP | {"accumulate_grad_batches": 2}},
    "loaded": WEIGHTS | {"trainer_options": CLIP, "keep_sparsity": True, "prune": None},
}
# measured: 2e-6; training moves a weight by more than fifty times as much
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def pruned_dir(tmp_path_factory):
    return str(prune(save_tiny_lm(tmp_path_factory.mktemp("pruned"), seed=1)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pruned_dir):
    """The folder of all runs, those of one process, and those of each of two ranks."""
    root = tmp_path_factory.mktemp("fsdp2")
    settings = {"model_dir": str(save_tiny_lm(root / "model")), "prune": str(root / "pruning")}
    modes = MODES | {"loaded": MODES["loaded"] | {"model_dir": pruned_dir}}
    alone = {
        name: gradient_run.train(**settings | {"root": root / name, "validate": True} | mode)
        for name, mode in modes.items()
    }
    sharded = {name: mode | {"strategy": {"fsdp2": {}}} for name, mode in modes.items()}
    whole = {name: mode | {"validate": True} for name, mode in sharded.items()}
    whole["lora"]["save_adapters"] = whole["tensor_train"]["save_adapters"] = True
    folders = {name: {"root": str(root / f"{name}-stopped"), "save_every": 3} for name in modes}
    stopped = {f"{name} stopped": mode | folders[name] | {"steps": 3} for name, mode in sharded.items()}
    resumed = {f"{name} resumed": mode | folders[name] | {"resume": True} for name, mode in sharded.items()}
    refused = sharded["loaded"] | {"strategy": {"fsdp2": {"save_distributed_checkpoint": True}}}
    settings |= {"devices": 2, "runs": whole | stopped | resumed | {"refused": refused}}
    return root, alone, run("gradient_run", settings, root, timeout=600)


def distance(a, b):
    return max(float((a[name] - weight).abs().max()) for name, weight in b.items())


def pruned_places(result):
    weights = {
        name: w for name, w in result["start"].items() if ".layers." in name and w.ndim == 2 and "lora" not in name
    }
    places = {name: weight == 0 for name, weight in weights.items()}
    assert sum(int(pruned.sum()) for pruned in places.values()) == sum(p.numel() for p in places.values()) // 2
    return places


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_train_what_one_process_trains(runs, mode):
    _, alone, ranks = runs
    assert len(ranks) == 2
    assert distance(alone[mode]["weights"], alone[mode]["start"]) > 20 * TOLERANCE
    for rank in ranks:
        assert rank[mode]["sharded"]
        assert distance(rank[mode]["start"], alone[mode]["start"]) == 0
        assert distance(rank[mode]["weights"], alone[mode]["weights"]) < TOLERANCE
        assert distance(rank[mode]["weights"], ranks[0][mode]["weights"]) == 0
        assert rank[mode]["val"] == pytest.approx(alone[mode]["val"], abs=TOLERANCE)
        for name, pruned in pruned_places(alone[mode]).items():
            assert is_positive_zero(rank[mode]["weights"][name][pruned]), name
    # optimizer states are sharded with the weights; the vector of tensor trains is on every rank
    parts = 1 if mode == "tensor_train" else 2
    assert sum(rank[mode]["moments"] for rank in ranks) == alone[mode]["trained"] * 2 // parts


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_run_ends_with_the_same_bits(runs, mode):
    root, _, ranks = runs
    for rank in ranks:
        # with accumulation there are batches without a step
        assert set(rank[f"{mode} resumed"]["steps"]) - {3} == {4, 5, 6}
        assert distance(rank[f"{mode} resumed"]["weights"], rank[mode]["weights"]) == 0
    checkpoint = torch.load(root / f"{mode}-stopped" / "last.ckpt", weights_only=True)
    trained = {"lora": "lora", "tensor_train": "theta"}.get(mode, "")
    assert checkpoint["state_dict"].keys() == {name for name in ranks[0][mode]["weights"] if trained in name}


def test_the_checkpoint_is_exported_by_one_process(runs, pruned_dir, tmp_path):
    root, _, ranks = runs
    module = FirstOrderModule.load_from_checkpoint(
        root / "loaded-stopped" / "last.ckpt", model_name_or_path=pruned_dir, trainable=Weights()
    )
    module.backbone.save_pretrained(tmp_path)
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    for name, weight in ranks[0]["loaded"]["weights"].items():
        assert torch.equal(exported[name.removeprefix("backbone.")], weight), name


def test_adapters_are_written_whole(runs):
    root, _, ranks = runs
    factors = load_file(root / "lora" / "adapter" / "adapter_model.safetensors")
    trained = {name: weight for name, weight in ranks[0]["lora"]["weights"].items() if "lora" in name}
    written = {f"backbone.{n.removeprefix('base_model.model.')}": t for n, t in factors.items()}
    assert trained.keys() == {name.replace(".weight", ".default.weight") for name in written}
    for name, factor in written.items():
        assert torch.equal(factor, trained[name.replace(".weight", ".default.weight")])
    (theta,) = load_file(root / "tensor_train" / "adapter" / "adapters.safetensors").values()
    assert torch.equal(theta, ranks[0]["tensor_train"]["weights"]["adapters.theta"])
    assert all("the strategy has sharded them" in rank["lora"]["error"] for rank in ranks)


def test_what_cannot_be_kept_or_resumed_is_refused(runs):
    _, _, ranks = runs
    for rank in ranks:
        assert "`save_distributed_checkpoint` of ModelParallelStrategy to be False" in rank["refused"]["error"]


def test_forward_passes_through_shards_train_the_same_bits(pruned_dir, tmp_path):
    # cached prefixes are computed row by row, which rounds differently; they are off where weights are sharded
    settings = {"model_dir": pruned_dir, "queries": 4, "save_every": 3, "prefix_cache_gib": 0}
    _, module, _ = zo_run.train(**settings | {"root": tmp_path / "alone", "steps": 6})
    settings |= {"strategy": {"fsdp2": {}}, "devices": 2}
    run("zo_run", settings | {"steps": 3}, tmp_path / "two")
    ranks = run("zo_run", settings | {"steps": 6, "resume": True}, tmp_path / "two")
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["sharded"]
        assert min(rank["steps"]) == 4
        assert torch.equal(rank["theta"], zo_run.trained_vector(module))
    # by then of six steps
    checkpoint = torch.load(tmp_path / "two" / "last.ckpt", weights_only=True)
    assert torch.equal(checkpoint["state_dict"]["adapters.theta"], ranks[0]["theta"])
    assert not any("backbone" in name for name in checkpoint["state_dict"])


def test_the_config_runs_without_noise(pruned_dir, tmp_path, repository):
    (tmp_path / "text.txt").write_text("\n\n".join(f"paragraph {index} " * 8 for index in range(60)))
    here = {
        "model": {"init_args": {"model_name_or_path": pruned_dir}},
        "data": {"init_args": {"source": "text.txt", "sequence_length": 16, "eval_windows": 4}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": {"init_args": {"data_parallel_size": 2}},
            "max_steps": 2,
            "val_check_interval": 2,
            "enable_progress_bar": False,
        },
    }
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(here))
    configs = [repository / "configs" / name for name in ("recovery/masked.yaml", "trainer/fsdp2.yaml")]
    result = subprocess.run(
        [sys.executable, "-m", "wandazeta", "fit", *(f"-c={path}" for path in [*configs, "here.yaml"])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Keeping" in result.stderr
    for noise in ("sync_dist", "destroy_process_group"):
        assert noise not in result.stderr
    (checkpoint,) = tmp_path.glob("runs/recovery/*/checkpoints/last.ckpt")
    # trained in the precision of the files, though the weights are gathered in bfloat16
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for name, weight in weights.items():
        if ".layers." in name and weight.ndim == 2:
            assert int((weight == 0).sum()) >= weight.numel() // 2
