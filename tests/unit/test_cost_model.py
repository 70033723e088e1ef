"""The formulas of docs/scaling.md against real models."""

import json
from pathlib import Path

import pytest
from helpers.causal_lms import SIZES, tiny_lm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cost_model(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import cost_model

    return cost_model


@pytest.mark.parametrize("tied", [False, True])
def test_values_of_a_model(cost_model, tied):
    model = tiny_lm(tie_word_embeddings=tied)
    shape = cost_model.Shape(SIZES["hidden_size"], 3, 48, SIZES["vocab_size"], 16, tied)
    assert shape.total == sum(parameter.numel() for parameter in model.parameters())
    block = model.model.layers[0]
    assert shape.block == sum(parameter.numel() for parameter in block.parameters())
    linears = [module for module in block.modules() if hasattr(module, "in_features")]
    assert shape.linear_weights == sum(linear.weight.numel() for linear in linears)
    assert shape.input_widths == sum(linear.in_features for linear in linears)


def test_shapes_are_those_of_the_models(cost_model):
    """What everybody calls them: 134.5 million, 6.74 and 69.0 billion values."""
    totals = {name: shape.total for name, shape in cost_model.SHAPES.items()}
    assert totals == {"smollm2-135m": 134_515_008, "llama-7b": 6_738_415_616, "llama-70b": 68_976_648_192}


def test_vectors_of_a_step(cost_model, tmp_path):
    from helpers.causal_lms import save_tiny_lm
    from helpers.zo_run import train

    from wandazeta.modules.zo import RAdaZOUpdate

    _, module, _ = train(save_tiny_lm(tmp_path / "model"), tmp_path, steps=1, update=RAdaZOUpdate())
    bank = module.adapters
    kept = bank.theta.nbytes + bank.update_states.nbytes
    # one copy, a gradient and a direction come and go
    assert cost_model.adapter_bytes(bank.num_parameters, 1, 2) == kept + 3 * bank.theta.nbytes


def test_more_ranks_are_never_slower_and_shards_wait_for_their_weights(cost_model):
    hardware, shape = cost_model.Hardware(1e14, 1e10, 1e-5), cost_model.SHAPES["llama-70b"]
    seconds = [cost_model.zo_seconds(shape, hardware, 4096, 16, ranks) for ranks in (1, 2, 4, 8, 16, 32)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == pytest.approx(seconds[0] / 32, rel=1e-3)
    few_tokens = cost_model.zo_seconds(shape, hardware, 8, 16, 8, sharded=True)
    assert few_tokens > shape.total * 2 * 7 / 8 / hardware.bandwidth


def test_the_result_says_what_is_projected(cost_model):
    result = ROOT / "benchmarks" / "results" / "scaling.json"
    if not result.exists():
        pytest.skip("benchmarks/scaling.py has not been run")
    for record in json.loads(result.read_text())["records"]:
        assert record["projected"] == (record["gpus"] > 0)
