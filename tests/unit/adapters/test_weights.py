import copy
import os
import signal

import pytest
import torch
from helpers.architectures import build
from helpers.causal_lms import CONFIGS, prompts, tiny_lm

from wandazeta.adapters import InPlaceWeights, Weights, weights


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts so small that every way through the code is taken."""
    monkeypatch.setattr(weights, "PART", 100)


def in_place(model, step=3, queries=2):
    vector = InPlaceWeights(model, [name for name, _ in model.named_parameters()])
    vector.start_step(seed=1, step=step, num_queries=queries)
    return vector


def gone_to(model, coordinates, step=3):
    """A copy of a model whose weights have been moved for good."""
    model = copy.deepcopy(model)
    in_place(model, step, len(coordinates)).apply_update(torch.tensor(coordinates), 0.0, [], [])
    return model


def directions_of(model, **options):
    """Every weight's direction of both queries, as what a step of one changes where the weight was zero."""
    empty = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.zero_()
    steps = [gone_to(empty, coordinates, **options) for coordinates in ([1.0, 0.0], [0.0, 1.0])]
    return [dict(step.named_parameters()) for step in steps]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_directions_are_normal_and_all_different():
    model = tiny_lm()
    drawn = [*directions_of(model), *directions_of(model, step=4)]
    flat = torch.stack([torch.cat([z.flatten() for z in named.values()]) for named in drawn])
    size = flat.shape[1]
    assert flat.mean(1).abs().max() < 4 / size**0.5
    assert (flat.var(1) - 1).abs().max() < 4 * (2 / size) ** 0.5
    assert (flat @ flat.T / size - torch.eye(4)).abs().max() < 0.05
    assert flat.unique().numel() > 0.99 * flat.numel(), "two parts with one stream"
    again = directions_of(model)[0]
    assert all(torch.equal(z, again[name]) for name, z in drawn[0].items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_forward_in_use_is_that_of_a_moved_model(kind, tied):
    model = tiny_lm(kind, tie_word_embeddings=tied)
    vector, (ids, mask) = in_place(model), prompts(3)
    before, coordinates = state(model), [1e-2, -2e-2]
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        with vector.use(torch.tensor([coordinates])):
            moved = model(ids, attention_mask=mask).logits
        expected = gone_to(model, coordinates)(ids, attention_mask=mask).logits
        assert torch.equal(model(ids, attention_mask=mask).logits, plain)
    assert is_same(before, state(model)), "the weights were touched"
    assert (moved - plain)[mask.bool()].abs().max() > 1e-2
    torch.testing.assert_close(moved[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_rows_of_the_head_are_moved(kind):
    model = tiny_lm(kind)
    vector, ids = in_place(model), torch.tensor([7, 299, 8, 7])
    moved = gone_to(model, [0.1, 0.0]).lm_head
    with vector.use(torch.tensor([[0.1, 0.0]])):
        weight, bias = vector.rows(model.lm_head, ids)
    assert torch.equal(weight, moved.weight[ids])
    assert (bias is None) == (moved.bias is None)
    if bias is not None:
        assert torch.equal(bias, moved.bias[ids])
    assert torch.equal(vector.rows(model.lm_head, ids)[0], model.lm_head.weight[ids])


def test_coordinates_are_steps_along_the_directions():
    model = tiny_lm()
    first, second = directions_of(model)
    for name, weight in gone_to(model, [0.5, -0.25]).named_parameters():
        expected = model.get_parameter(name) + 0.5 * first[name] - 0.25 * second[name]
        torch.testing.assert_close(weight, expected)


def test_decay_spares_vectors_and_progress_is_noted_down():
    model, progress = tiny_lm(), torch.zeros(2)
    before, vector = state(model), in_place(model)
    vector.apply_update(torch.zeros(2), 0.1, [progress], [torch.ones(2)])
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name] * (0.9 if weight.ndim == 2 else 1.0))
    assert progress.tolist() == [1, 1]


def test_what_is_pruned_stays_zero():
    model = tiny_lm("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            weight = block.mlp.c_fc.weight
            weight.view(-1, 4).scatter_(1, weight.view(-1, 4).abs().argsort(1)[:, :2], 0.0)
        by_chance = model.transformer.h[0].attn.c_attn.weight
        by_chance[0, 0] = 0.0
        model.transformer.wte.weight.zero_()
    zeros = [block.mlp.c_fc.weight == 0 for block in model.transformer.h]
    moved = gone_to(model, [1e-2, 0.0])
    for block, pruned in zip(moved.transformer.h, zeros, strict=True):
        assert torch.equal(block.mlp.c_fc.weight == 0, pruned)
    assert moved.transformer.h[0].attn.c_attn.weight[0, 0] != 0
    assert (moved.transformer.wte.weight != 0).all()
    ids, _ = prompts(2)
    with torch.no_grad(), in_place(model).use(torch.tensor([[1e-2, 0.0]])):
        torch.testing.assert_close(model(ids).logits, moved(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_pruned_experts_stay_sparse_and_dense_ones_are_trained(name):
    model, _ = build(name)
    with torch.no_grad():
        pruned, dense = (layer.mlp.experts.down_proj for layer in model.model.layers[:2])
        (pruned.mT if name == "gpt_oss" else pruned)[..., ::2] = 0.0
        dense[:, 0, 0] = 0.0  # by chance
    zeros = pruned == 0
    moved = gone_to(model, [1e-2, 0.0]).model.layers
    assert torch.equal(moved[0].mlp.experts.down_proj == 0, zeros)
    assert (moved[1].mlp.experts.down_proj != 0).all()


def test_errors_and_signals_see_the_weights_as_they_are():
    model = tiny_lm()
    vector, before, seen = in_place(model), state(model), []
    norm = model.model.layers[1].input_layernorm
    forward = norm.forward

    def interrupted(x):
        assert not torch.equal(norm.weight, before["model.layers.1.input_layernorm.weight"])
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not seen
        raise RuntimeError("on purpose")

    norm.forward = interrupted
    previous = signal.signal(signal.SIGUSR1, lambda *_: seen.append(is_same(before, state(model))))
    try:
        with pytest.raises(RuntimeError, match="on purpose"), vector.use(torch.tensor([[1e-2, 0.0]])):
            model(prompts(2)[0])
    finally:
        handler = signal.signal(signal.SIGUSR1, previous)
    assert seen == [True]
    assert norm.forward is interrupted
    assert handler is not previous
    norm.forward = forward
    assert is_same(before, state(model))


def test_biases_and_head():
    model = tiny_lm("phi")
    before = state(model)
    for parts, expected in (("biases", False), ("biases_and_head", True)):
        moved = copy.deepcopy(model)
        vector = Weights(parts).insert(moved, seed=0)
        vector.start_step(0, 0, 1)
        vector.apply_update(torch.tensor([0.1]), 0.0, [], [])
        changed = {name for name, tensor in moved.state_dict().items() if not torch.equal(tensor, before[name])}
        biases = {name for name in before if name.endswith("bias")}
        assert changed == vector.parameter_names == (biases | {"lm_head.weight"} if expected else biases)
        assert vector.num_parameters == sum(before[name].numel() for name in changed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Weights("norms"), "`parts`"),
        (lambda: Weights("biases").check(tiny_lm(), 0), "LlamaForCausalLM has none"),
        (lambda: Weights().check(tiny_lm(), 2), "to be SGDUpdate"),
        (lambda: Weights().check(tiny_lm().bfloat16(), 0), "in float32, but got torch.bfloat16"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_row_of_coordinates_at_a_time():
    vector = in_place(tiny_lm())
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"), vector.use(torch.zeros(2, 2)):
        pass
