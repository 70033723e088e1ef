"""LoRA, tensor trains and masked fine-tuning by back-propagation under DeepSpeed on gloo, compared with one process.

All runs of a dictionary share one program, which takes a fraction of the time of one program each.
"""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from helpers.causal_lms import save_tiny_lm, tiny_lm
from helpers.masked import is_positive_zero
from helpers.processes import run
from helpers.tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file

pytest.importorskip("deepspeed")
pytest.importorskip("peft")
pytestmark = pytest.mark.slow

STAGES = (1, 2, 3)
CLIP = {"gradient_clip_val": 0.05}  # far below the norm of the gradients
MODES = {
    "lora": {"trainable": "PeftLoRA", "learning_rate": 1e-2},
    "tensor_train": {"trainable": "TensorTrainAdapters", "learning_rate": 1e-2},
    "masked": {
        "trainable": "Weights",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "trainer_options": CLIP,
    },
}
# measured: 8e-6; training moves a weight by more than twenty times as much
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    # all runs have the pruning of the first
    directory = tmp_path_factory.mktemp("common")
    return {"model_dir": str(save_tiny_lm(directory / "model")), "prune": str(directory / "pruning")}


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    runs = {name: mode | {"validate": True} for name, mode in MODES.items()}
    accumulated = MODES["masked"] | {"trainer_options": CLIP | {"accumulate_grad_batches": 2}}
    (results,) = run(
        "gradient_run", settings | {"runs": runs | {"accumulated": accumulated}}, tmp_path_factory.mktemp("alone")
    )
    return results


def on_stages(mode, stages=STAGES, **more):
    return {f"{mode}-{stage}": MODES[mode] | {"strategy": {"stage": stage}} | more for stage in stages}


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def spread(request, settings, alone, tmp_path_factory):
    runs = {name: settings for mode in MODES for name, settings in on_stages(mode, validate=True).items()}
    settings = settings | {"runs": runs, "devices": request.param}
    return run("gradient_run", settings, tmp_path_factory.mktemp("spread"), timeout=600)


def distance(a, b):
    return max(float((a[name] - weight).abs().max()) for name, weight in b.items())


def pruned_places(alone):
    weights = alone["masked"]["start"]
    return {name: w == 0 for name, w in weights.items() if ".layers." in name and w.ndim == 2}


def assert_sparse(result, alone):
    places = pruned_places(alone)
    assert sum(int(pruned.sum()) for pruned in places.values()) == sum(p.numel() for p in places.values()) // 2
    for name, pruned in places.items():
        assert is_positive_zero(result["weights"][name][pruned]), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", MODES)
def test_a_stage_trains_as_one_process_does(alone, spread, mode, stage):
    single = alone[mode]
    assert distance(single["weights"], single["start"]) > 20 * TOLERANCE
    for rank in spread:
        result = rank[f"{mode}-{stage}"]
        assert result["steps"] == [1, 2, 3, 4, 5, 6]
        assert distance(result["start"], single["start"]) == 0
        assert distance(result["weights"], single["weights"]) < TOLERANCE
        assert distance(result["weights"], spread[0][f"{mode}-{stage}"]["weights"]) == 0
        # what was trained is seen by validations, too: before, in the middle and at the end
        assert result["val"] == pytest.approx(single["val"], abs=TOLERANCE)
        assert result["moments"] == result["trained"] // len(spread) == single["trained"] // len(spread)
        assert result["sharded"] == (stage == 3 and len(spread) > 1)
    assert len(set(single["val"])) == 3


@pytest.mark.parametrize("stage", STAGES)
def test_zeros_are_held_to_the_bit(alone, spread, stage):
    for rank in spread:
        assert_sparse(rank[f"masked-{stage}"], alone)


@pytest.fixture(scope="module")
def interrupted(settings, alone, tmp_path_factory):
    """Three steps and a checkpoint in one program; in another the rest, the whole, and what is special."""
    root = tmp_path_factory.mktemp("interrupted")
    masks = {name.removeprefix("backbone."): ~pruned for name, pruned in pruned_places(alone).items()}
    save_file(masks, root / "masks.safetensors")
    parts = on_stages("masked") | on_stages("lora", (2, 3)) | on_stages("tensor_train", (3,))
    settings = settings | {"devices": 2}
    first = {name: part | {"steps": 3, "save_every": 3} for name, part in parts.items()}
    run("gradient_run", settings | {"runs": first}, root, timeout=600)
    second = {name: part | {"save_every": 3, "resume": True} for name, part in parts.items()}
    finished = {f"{name} again": part | {"root": str(root / name)} for name, part in second.items() if "masked" in name}
    bf16 = {"precision": "bf16-true", "accumulate_grad_batches": 2} | CLIP
    special = {
        name: MODES[mode] | {"strategy": {"stage": stage}} | options
        for stage in STAGES
        for name, mode, options in (
            (f"accumulated-{stage}", "masked", {"trainer_options": CLIP | {"accumulate_grad_batches": 2}}),
            (f"bf16-{stage}", "masked", {"trainer_options": bf16, "keep_sparsity": True}),
            (f"noise-{stage}", "masked", {"noise": True}),
            (f"file-{stage}", "masked", {"keep_sparsity": True, "masks": f"{root}/masks.safetensors", "steps": 2}),
            (f"adapter-{stage}", "lora", {"save_adapters": True}),
            (f"trains-{stage}", "tensor_train", {"save_adapters": True}),
        )
    }
    # under stage 3 DeepSpeed itself cannot load a checkpoint without an optimizer
    special["evaluated"] = MODES["lora"] | {"strategy": {"stage": 2}, "evaluate": True, "root": str(root / "lora-2")}
    ranks = run("gradient_run", settings | {"runs": second | finished | special}, root, timeout=600)
    return root, ranks


@pytest.mark.parametrize("spread", [2], indirect=True, ids=["two ranks"])
def test_resuming_is_what_a_run_without_a_stop_is(interrupted, spread, alone):
    _, ranks = interrupted
    for name in (n for n in ranks[0] if n in spread[0]):
        for rank, whole in zip(ranks, spread, strict=True):
            assert rank[name]["steps"] == [4, 5, 6]
            assert distance(rank[name]["weights"], whole[name]["weights"]) == 0
            if "masked" in name:
                assert_sparse(rank[name], alone)
                # a finished run, started again, has nothing to do and nothing to complain of
                assert "steps" not in rank[f"{name} again"]
                assert distance(rank[f"{name} again"]["weights"], whole[name]["weights"]) == 0


def test_checkpoints_hold_adapters_only(interrupted):
    root, ranks = interrupted
    for stage in (2, 3):
        adapters = {name for name in ranks[0][f"lora-{stage}"]["weights"] if "lora" in name}
        states = sorted((root / f"lora-{stage}" / "last.ckpt").rglob("*model_states.pt"))
        assert states
        for state in states:
            assert set(torch.load(state, weights_only=False)["module"]) == adapters


@pytest.mark.parametrize("stage", STAGES)
def test_masks_hold_with_accumulation_16_bits_and_a_file(interrupted, alone, stage):
    _, ranks = interrupted
    for rank in ranks:
        for name in ("accumulated", "bf16", "file"):
            assert_sparse(rank[f"{name}-{stage}"], alone)
        accumulated, bf16 = (rank[f"{name}-{stage}"]["weights"] for name in ("accumulated", "bf16"))
        assert distance(accumulated, alone["accumulated"]["weights"]) < TOLERANCE
        assert {weight.dtype for weight in bf16.values()} == {torch.bfloat16}
        assert distance(bf16, rank[f"bf16-{stage}"]["start"]) > 20 * TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_that_moves_what_has_no_gradient_is_found_in_the_first_step(interrupted, stage):
    _, ranks = interrupted
    for rank in ranks:
        assert "under DeepSpeed the optimizer" in rank[f"noise-{stage}"]["error"]
        assert rank[f"noise-{stage}"]["steps"] == [1]


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_are_written_whole_and_merged_only_where_weights_are(interrupted, stage):
    root, ranks = interrupted
    factors = load_file(root / f"adapter-{stage}" / "adapter" / "adapter_model.safetensors")
    weights = ranks[0][f"adapter-{stage}"]["weights"]
    trained = {name: weight for name, weight in weights.items() if "lora" in name}
    written = {f"backbone.{n.removeprefix('base_model.model.')}": t for n, t in factors.items()}
    assert trained.keys() == {name.replace(".weight", ".default.weight") for name in written}
    for name, factor in written.items():
        assert torch.equal(factor, trained[name.replace(".weight", ".default.weight")])
    (theta,) = load_file(root / f"trains-{stage}" / "adapter" / "adapters.safetensors").values()
    assert torch.equal(theta, ranks[0][f"trains-{stage}"]["weights"]["adapters.theta"])
    for rank in ranks:
        assert ("error" in rank[f"adapter-{stage}"]) == (stage == 3)
    if stage == 3:
        assert "the strategy has sharded them" in ranks[0]["adapter-3"]["error"]


def test_a_checkpoint_is_evaluated(interrupted, alone):
    _, ranks = interrupted
    for rank in ranks:
        # by now it is of six steps
        assert rank["evaluated"]["val/option_loss"] == pytest.approx(alone["lora"]["val"][-1], abs=TOLERANCE)


@pytest.mark.parametrize(("recovery", "stage"), [("lora", 1), ("masked", 2), ("masked", 3)])
def test_the_configs_fit_together(tmp_path, repository, recovery, stage):
    model = tiny_lm()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers." in name and weight.ndim == 2:
                weight.view(-1, 4)[:, :2] = 0.0
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"paragraph {index} " * 8 for index in range(60)))
    names = (f"recovery/{recovery}", f"trainer/deepspeed_stage{stage}")
    configs = [repository / "configs" / f"{name}.yaml" for name in names]
    # everything except the machine, the model and the data is taken from the files
    strategy = yaml.safe_load(configs[1].read_text())["trainer"]["strategy"]
    strategy["class_path"] = "helpers.cpu_deepspeed.CPUDeepSpeedStrategy"
    few = {"max_steps": 2, "val_check_interval": 2, "enable_progress_bar": False}
    here = {
        "model": {"init_args": {"model_name_or_path": "model"}},
        "data": {"init_args": {"source": "text.txt", "sequence_length": 16, "eval_windows": 4}},
        "trainer": {"accelerator": "cpu", "devices": 2, "strategy": strategy, **few},
    }
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(here))
    result = subprocess.run(
        [sys.executable, "-m", "wandazeta", "fit", *(f"-c={path}" for path in [*configs, "here.yaml"])],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(repository / "tests"), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    # each rank its own file
    optimizers = list(tmp_path.glob("runs/recovery/*/checkpoints/last.ckpt/**/*optim_states.pt"))
    assert len(optimizers) == 2
    assert "Keeping" in result.stderr or recovery == "lora"
