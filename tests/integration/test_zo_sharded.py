"""A backbone that DeepSpeed's stage 3 shards: what a rank holds and gathers in a step, and loading in shares."""

from pathlib import Path

import pytest
import torch
from helpers.causal_lms import save_tiny_lm
from helpers.processes import run

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    model_dir = save_tiny_lm(tmp_path_factory.mktemp("model"), num_hidden_layers=6)
    return {"model_dir": str(model_dir), "steps": 4, "queries": 3, "query_chunk_size": 16}


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    (result,) = run("zo_run", settings, tmp_path_factory.mktemp("alone"))
    return result


@pytest.mark.parametrize(
    ("devices", "options"),
    [(2, {}), (2, {"shard_on_load": True}), (1, {"offload": True}), (2, {"shard_on_load": True, "offload": True})],
    ids=["whole", "shares", "offload", "shares-offload"],
)
def test_blocks_are_gathered_once_a_step_and_two_held_at_most(settings, alone, tmp_path, monkeypatch, devices, options):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import scaling

    shape = scaling.Shape(hidden=32, layers=6, intermediate=48, vocabulary=300, key_value=16)
    strategy = {"stage": 3, "offload_parameters": options.get("offload", False)}
    loading = {"shard_on_load": options.get("shard_on_load", False)}
    chosen = {"strategy": strategy, "devices": devices, "loading": loading}
    ranks = run("zo_run", settings | chosen | {"watch_gathers": True}, tmp_path)
    assert len(ranks) == devices
    for rank in ranks:
        torch.testing.assert_close(rank["theta"], alone["theta"], atol=2e-4, rtol=1e-3)
        assert rank["backbone_key"] == alone["backbone_key"]
        gathers = rank["gathers"]
        # three queries are six points; a plain loop would gather six times
        assert set(gathers["per_step"].values()) == {1.0}
        assert sum("layers" in name for name in gathers["per_step"]) == 6 * 9
        # the formulas of docs/scaling.md, but for what fills shares up to whole ones
        assert gathers["total"] == 4 * shape.total
        expected = scaling.resident_weights(shape, 4, devices, sharded=True)
        assert expected <= gathers["own"] <= expected + 16 * len(gathers["per_step"])
        assert 0 < gathers["live"] <= scaling.gathered_weights(shape, 4) < gathers["total"] / 2


def test_chunks_gather_once_each(settings, tmp_path):
    chosen = {"strategy": {"stage": 3}, "devices": 2, "watch_gathers": True, "query_chunk_size": 2}
    for rank in run("zo_run", settings | chosen, tmp_path):
        # each rank has three of the six points
        assert set(rank["gathers"]["per_step"].values()) == {2.0}


def test_bfloat16_is_loaded_in_shares(settings, tmp_path):
    chosen = {"strategy": {"stage": 3}, "devices": 2, "watch_gathers": True}
    chosen |= {"trainer_options": {"precision": "bf16-true"}}
    whole, shares = (
        run("zo_run", settings | chosen | {"loading": {"dtype": "bfloat16", "shard_on_load": shard}}, tmp_path / name)
        for name, shard in (("whole", False), ("shares", True))
    )
    for one, other in zip(whole, shares, strict=True):
        assert torch.equal(one["theta"], other["theta"])
        assert one["theta"].dtype == torch.float32
        assert other["gathers"]["total"] == one["gathers"]["total"]


def test_goes_on_in_shares_from_a_checkpoint_of_whole_weights(settings, tmp_path):
    settings = settings | {"strategy": {"stage": 3}, "devices": 2, "save_every": 2}
    undisturbed = run("zo_run", settings, tmp_path / "undisturbed")
    run("zo_run", settings | {"steps": 2}, tmp_path / "stopped")
    for rank in run("zo_run", settings | {"resume": True, "loading": {"shard_on_load": True}}, tmp_path / "stopped"):
        assert min(rank["steps"]) == 3
        assert torch.equal(rank["theta"], undisturbed[0]["theta"])


@pytest.mark.parametrize(("stage", "shard"), [(2, False), (3, False), (3, True)], ids=["2", "3", "3-shares"])
def test_modules_validate_and_test_with_data_modules_as_without_deepspeed(evaluated, tmp_path, stage, shard):
    settings, alone = evaluated
    for rank in run("validate_run", settings | {"devices": 2, "stage": stage, "shard": shard}, tmp_path):
        assert (int(rank.pop("whole_values")) == 0) == (stage == 3)
        for kind, losses in rank.items():
            assert len(losses) == 2
            torch.testing.assert_close(losses, alone[kind])


@pytest.fixture(scope="module")
def evaluated(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "text.txt").write_text("\n\n".join(f"paragraph {index} " * 8 for index in range(200)))
    settings = {"model_dir": settings["model_dir"], "text": str(folder / "text.txt")}
    (alone,) = run("validate_run", settings | {"devices": 1, "stage": 0, "shard": False}, folder / "alone")
    return settings, alone
