"""DeepSpeed's stages on gloo against one plain process."""

import shutil

import pytest
import torch
from helpers.causal_lms import save_tiny_lm
from helpers.encoders import save_tiny_encoder
from helpers.fit_config import wandazeta, write_fit_config
from helpers.processes import run

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    model_dir = save_tiny_lm(tmp_path_factory.mktemp("model"))
    return {"model_dir": str(model_dir), "steps": 6, "queries": 3, "adapter_layers": "last:1"}


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    (result,) = run("zo_run", settings, tmp_path_factory.mktemp("alone"))
    return result


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage_trains_as_one_process_does(settings, alone, tmp_path, stage, devices):
    # three queries on two ranks: under stage 3 both must run two forwards
    ranks = run("zo_run", settings | {"strategy": {"stage": stage}, "devices": devices}, tmp_path)
    assert len(ranks) == devices
    for rank in ranks:
        assert rank["updates"] == rank["global_step"] == 6
        assert rank["theta"].dtype == torch.float32
        if stage < 3:
            assert torch.equal(rank["theta"], alone["theta"])
        else:  # no frozen prefix: equal to rounding
            torch.testing.assert_close(rank["theta"], alone["theta"], atol=2e-4, rtol=1e-3)
        assert rank["sharded"] == (stage == 3 and devices > 1)


@pytest.fixture(scope="module")
def pruned_alone(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    (result,) = run("zo_run", settings | {"prune": str(folder / "pruning")}, folder)
    return result


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_model_is_pruned_first_and_then_trained(settings, alone, pruned_alone, tmp_path, stage):
    chosen = {"strategy": {"stage": stage}, "devices": 2, "prune": str(tmp_path / "pruning")}
    assert pruned_alone["backbone_key"] != alone["backbone_key"]
    for rank in run("zo_run", settings | chosen, tmp_path):
        # each rank pruned with its half of the samples, whose sums round otherwise than those of one process
        assert rank["updates"] == 6
        assert rank["sharded"] == (stage == 3)
        torch.testing.assert_close(rank["theta"], pruned_alone["theta"], atol=2e-4, rtol=1e-3)
    assert not torch.allclose(pruned_alone["theta"], alone["theta"], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_encoder_and_its_new_head_train_as_in_one_process(tmp_path, stage):
    model_dir = save_tiny_encoder(tmp_path / "model")
    settings = {"model_dir": str(model_dir), "steps": 4, "queries": 3, "loading": {"num_classes": 3}}
    (alone,) = run("zo_run", settings, tmp_path / "alone")
    for rank in run("zo_run", settings | {"strategy": {"stage": stage}, "devices": 2}, tmp_path / "two"):
        torch.testing.assert_close(rank["theta"], alone["theta"], atol=2e-4, rtol=1e-3)
        assert rank["sharded"] == (stage == 3)


@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoint_holds_adapters_only_and_resumes(settings, alone, tmp_path, stage):
    settings = settings | {"strategy": {"stage": stage}, "devices": 2, "save_every": 3}
    run("zo_run", settings | {"steps": 3}, tmp_path)
    states = sorted((tmp_path / "last.ckpt").rglob("*model_states.pt"))
    assert states
    for state in states:
        module = torch.load(state, weights_only=False)["module"]
        assert not any(name.startswith("backbone.model") for name in module), sorted(module)
    ranks = run("zo_run", settings | {"resume": True}, tmp_path)
    whole = alone["theta"]
    if stage == 3:
        whole = run("zo_run", settings, tmp_path / "whole")[0]["theta"]
    for rank in ranks:
        assert min(rank["steps"]) == 4
        assert torch.equal(rank["theta"], whole)


@pytest.mark.slow
def test_checkpoints_of_deepspeed_and_of_other_strategies_are_refused_by_the_other_in_one_line(tmp_path):
    deepspeed = {"class_path": "helpers.cpu_deepspeed.CPUDeepSpeedStrategy"}
    write_fit_config(tmp_path, strategy=deepspeed, devices=1)
    auto = ("fit", "-c", "config.yaml", "--trainer.strategy", "auto")
    done = wandazeta(tmp_path, "fit", "-c", "config.yaml")
    assert done.returncode == 0, done.stderr
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert last.is_dir()
    done = wandazeta(tmp_path, *auto)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: Is a directory: '{last}'; DeepSpeed wrote this checkpoint and only DeepSpeed reads it: use its "
        "strategy or another `ckpt_path`"
    )
    shutil.rmtree(last)
    assert wandazeta(tmp_path, *auto).returncode == 0
    done = wandazeta(tmp_path, "fit", "-c", "config.yaml")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: The provided path is not a valid DeepSpeed checkpoint: {last}; another strategy wrote this "
        "checkpoint: use that strategy or another `ckpt_path`"
    )
