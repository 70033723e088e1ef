import pytest
import torch
from helpers.causal_lms import CONFIGS, classification_batch, text_batch, tiny_lm
from torch import nn

from wandazeta.adapters import AdaptedModule, inject_adapters
from wandazeta.models.blocks import find_blocks
from wandazeta.scoring import frozen_prefix
from wandazeta.scoring.frozen_prefix import FrozenPrefix
from wandazeta.scoring.scorer import Scorer, Scores

LONG = ((7, 11), (9,), (13, 17, 19))


def adapted(kind, layers, sites=None, max_bytes=2**30, seed=0, **changes):
    model = tiny_lm(kind, **changes)
    _, blocks = find_blocks(model)
    vector = inject_adapters(
        model,
        blocks=blocks,
        sites=sites,
        layers=layers,
        rank=2,
        bottleneck=8,
        identity_start=False,
        generator=torch.Generator().manual_seed(seed),
    )
    sites = {module for module in model.modules() if isinstance(module, AdaptedModule)}
    return model, vector, Scorer(model), Scorer(model, FrozenPrefix(model, blocks, sites, max_bytes))


def copies(vector, num=3):
    generator = torch.Generator().manual_seed(1)
    return vector.theta + 0.3 * torch.randn(num, vector.num_parameters, generator=generator).to(vector.theta.device)


@torch.no_grad()
def both(vector, plain, cached, batch, method, num=3):
    results = []
    for scorer in (plain, cached):
        prepared = scorer.prepare(batch)
        with vector.use(copies(vector, num)):
            result = getattr(scorer, method)(prepared, num)
            results.append(result.values if isinstance(result, Scores) else result)
    return results


@pytest.mark.parametrize("layers", [[-1], [1, 2], [1], [0, 1, 2]], ids=["last", "last two", "middle", "all"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_cached_equals_uncached(kind, layers):
    _, vector, plain, cached = adapted(kind, layers)
    for seed in (0, 1, 0):  # computed, computed, found
        expected, found = both(vector, plain, cached, classification_batch(seed=seed), "option_scores")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std(0).mean() > 1e-3, "the adapters must matter"
    assert cached.prefix.narrow == (layers == [-1])


@pytest.mark.parametrize("layers", [[-1], [1, 2]])
def test_several_token_options_and_text(layers):
    _, vector, plain, cached = adapted("llama", layers)
    expected, found = both(vector, plain, cached, classification_batch(options=LONG), "option_scores")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    expected, found = both(vector, plain, cached, text_batch(), "token_nll")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [[-1], [1]], ids=["last", "middle"])
def test_what_runs_before_an_adapter_behind_a_module_is_computed_once(layers):
    model, vector, plain, cached = adapted("llama", layers, sites=["after:mlp.down_proj"])
    batch = classification_batch()
    expected, found = both(vector, plain, cached, batch, "option_scores")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    prepared = cached.prepare(batch)
    assert {x.shape[-1] for x in prepared.prefix.states} == {32}, "gate and up feed a kept output only"
    assert len(prepared.prefix.states) == 3  # input, attention, MLP
    mlp = model.model.layers[layers[0]].mlp
    weights = [linear.weight for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj.base)]
    with torch.no_grad(), vector.use(copies(vector)):
        for weight in weights:
            weight.fill_(torch.nan)
        assert torch.equal(cached.option_scores(prepared, 3).values, found)


def test_last_block_alone_runs_the_scored_position_only():
    model, vector, _, cached = adapted("llama", [-1])
    batch = classification_batch()
    prepared = cached.prepare(batch)
    assert [x.shape for x in prepared.prefix.states] == 3 * [(4, 1, 32)]  # input, attention, its norm
    seen = []
    handle = model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    lower = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: pytest.fail("a lower block ran"))
    with torch.no_grad(), vector.use(copies(vector)):
        cached.option_scores(prepared, 3)
    handle.remove()
    lower.remove()
    assert seen == [(12, 1, 32)]


def test_last_of_several_blocks_goes_on_with_the_scored_position():
    model, vector, _, cached = adapted("llama", [1, 2])
    prepared = cached.prepare(classification_batch())
    seen = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape)) for block in model.model.layers
    ]
    with torch.no_grad(), vector.use(copies(vector)):
        cached.option_scores(prepared, 3)
    for handle in handles:
        handle.remove()
    assert seen == [(12, 12, 32), (12, 1, 32)]


def test_adapters_before_attention_keep_every_position():
    _, vector, plain, cached = adapted("llama", [-1], sites=["before:self_attn.q_proj", "after:mlp.down_proj"])
    expected, found = both(vector, plain, cached, classification_batch(), "option_scores")
    assert not cached.prefix.narrow
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_kept_states_do_not_depend_on_the_batch():
    _, _, _, first = adapted("llama", [-1])
    _, _, _, second = adapted("llama", [-1])
    batch = classification_batch()
    alone = {k: v[2:3] if len(v) == 4 else v for k, v in batch.items()}
    with torch.no_grad():
        together = [x[2:3] for x in first.prepare(batch).prefix.states]
        torch.testing.assert_close(second.prepare(alone).prefix.states, together, atol=0, rtol=0)


@pytest.mark.parametrize("layers", [[-1], [1, 2]], ids=["last", "last two"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_gpu_computes_sequences_in_batches_of_one_shape(monkeypatch, kind, layers):
    monkeypatch.setattr(frozen_prefix, "_runs_in_batches", lambda device: True)
    changes = {"max_position_embeddings": 40} if kind == "opt" else {}
    model, vector, plain, cached = adapted(kind, layers, **changes)
    batch = classification_batch(num=20)
    seen = []
    lower = model.get_submodule("model.layers" if kind == "llama" else "model.decoder.layers")[0].self_attn.q_proj
    handle = lower.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    with torch.no_grad():
        cached.prepare(batch)
    handle.remove()
    # two batches for the twenty sequences; those of one or two rows compare the replay with the plain forward
    assert [shape for shape in seen if shape[0] > 2][-2:] == 2 * [(16, 40 if kind == "opt" else 64)]
    expected, found = both(vector, plain, cached, batch, "option_scores")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("free", [2**30, 8 * 4000, 0])
def test_states_stay_on_the_gpu_while_there_is_room(monkeypatch, free):
    monkeypatch.setattr(frozen_prefix, "_free_bytes", lambda device: free)
    model, vector, plain, cached = adapted("llama", [1, 2])
    model.cuda()
    vector.cuda()
    batch = {name: value.cuda() for name, value in classification_batch(num=8).items()}
    expected, found = both(vector, plain, cached, batch, "option_scores")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    on_gpu = [states[0].is_cuda for states in cached.prefix._cache.values()]
    assert (any(on_gpu), all(on_gpu)) == {2**30: (True, True), 32000: (True, False), 0: (False, False)}[free]


def test_another_prompt_with_the_same_id_is_another_entry():
    _, vector, plain, cached = adapted("llama", [-1])
    for seed in (0, 5):
        batch = classification_batch(seed=seed)
        expected, found = both(vector, plain, cached, batch, "option_scores")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_memory_bound():
    _, vector, plain, cached = adapted("llama", [1, 2], max_bytes=4000)
    expected, found = both(vector, plain, cached, classification_batch(num=8), "option_scores")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert 0 < cached.prefix.num_bytes <= 4000


class Mixing(nn.Module):
    """An MLP that looks at other positions: no property of a decoder block that may be taken for granted."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + x.cumsum(1)


def test_a_block_that_mixes_positions_late_is_noticed():
    model = tiny_lm()
    model.model.layers[-1].mlp = Mixing(model.model.layers[-1].mlp)
    _, blocks = find_blocks(model)
    vector = inject_adapters(
        model, blocks=blocks, layers=[-1], sites=["before:mlp.base.up_proj"], rank=2, bottleneck=8, identity_start=False
    )
    sites = {module for module in model.modules() if isinstance(module, AdaptedModule)}
    plain, cached = Scorer(model), Scorer(model, FrozenPrefix(model, blocks, sites, 2**30))
    expected, found = both(vector, plain, cached, classification_batch(), "option_scores")
    assert not cached.prefix.narrow
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
