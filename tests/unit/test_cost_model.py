"""The formulas of docs/scaling.md against real models."""

import weakref
from pathlib import Path

import pytest
import torch
from helpers.causal_lms import SIZES, save_tiny_lm, tiny_lm
from helpers.zo_run import train
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wandazeta.zeroth_order import OneSided, RAdaZOUpdate, SGDUpdate, TwoSided

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cost_model(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scaling

    return scaling


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


def test_more_ranks_are_never_slower_and_shards_wait_for_their_weights(cost_model):
    hardware, shape = cost_model.Hardware(1e14, 1e10, 1e-5), cost_model.SHAPES["llama-70b"]
    seconds = [cost_model.zo_seconds(shape, hardware, 4096, 16, ranks) for ranks in (1, 2, 4, 8, 16, 32)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == pytest.approx(seconds[0] / 32, rel=1e-3)
    few_tokens = cost_model.zo_seconds(shape, hardware, 8, 16, 8, sharded=True)
    assert few_tokens > shape.total * 2 * 7 / 8 / hardware.bandwidth


class LiveBytes(TorchDispatchMode):
    """Most bytes of tensors that were made in this context and are alive at once."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage):
        key = storage.data_ptr()
        if key == 0 or key in self.alive or key in self.known:
            return
        self.alive[key] = size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone():
            self.now -= self.alive.pop(key)

        weakref.finalize(storage, gone)


def test_activations_of_a_forward(cost_model):
    """The estimate is right to a third for a model of usual proportions, without the logits."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_lm(num_hidden_layers=3, **sizes).model
    shape = cost_model.Shape(128, 3, 384, SIZES["vocab_size"], 64)
    tokens = torch.randint(SIZES["vocab_size"], (16, 64))
    with torch.no_grad(), LiveBytes(model.parameters()) as live:
        model(input_ids=tokens, use_cache=False)
    assert live.peak == pytest.approx(cost_model.activation_bytes(shape, tokens.numel(), 4), rel=1 / 3)


class StepsOfVectors(Callback):
    """Steps whose losses cost nothing, and what they hold."""

    def __init__(self):
        self.peaks = []

    def on_train_start(self, trainer, pl_module):
        update, vector = pl_module._update_adapters, pl_module.adapters
        pl_module.losses = lambda theta_Pd, prepared: theta_Pd[:, 0].clone()

        def watched(batch, step):
            with LiveBytes([*pl_module.backbone.parameters(), *vector.buffers(), *batch.values()]) as live:
                update(batch, step)
            self.peaks.append(live.peak + vector.theta.nbytes + vector.update_states.nbytes)

        pl_module._update_adapters = watched


@pytest.mark.parametrize("estimator", [TwoSided(), OneSided()], ids=str)
@pytest.mark.parametrize("copies", [1, 2, 6])
@pytest.mark.parametrize("update", [SGDUpdate(), RAdaZOUpdate()], ids=["sgd", "radazo"])
def test_vectors_of_a_step(cost_model, tmp_path, estimator, copies, update):
    steps = StepsOfVectors()
    options = {"callbacks": [steps], "queries": 6, "query_chunk_size": copies, "update": update, "estimator": estimator}
    _, module, _ = train(
        save_tiny_lm(tmp_path / "model"), tmp_path, steps=3, adapter_rank=16, adapter_bottleneck=64, **options
    )
    expected = cost_model.adapter_bytes(module.adapters.num_parameters, copies, update.num_states)
    # the first step also prepares the model's frozen part; losses and marks are there, too
    assert len(steps.peaks) == 3
    assert max(steps.peaks[1:]) == pytest.approx(expected, rel=0.03)
