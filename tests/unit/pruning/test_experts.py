"""Fused experts are pruned one by one, against a loop over experts with plain Linears."""

import pytest
import torch
from helpers.architectures import EXCLUDED, WITH_EXPERTS, build, pad, token_batches
from helpers.experts import build_unreached, weights_of, with_loops
from helpers.prune_model import BATCHES, Memory, equal, prune
from torch import nn

from wandazeta.pruning.method.masks import make_mask
from wandazeta.pruning.pattern import SparsityPattern

# what a model with loops takes to be matrices that cannot be pruned, or prunes, and must not
ROUTERS = ("gate", "router", "shared_expert_gate")
PATTERNS = {"2:4": {"sparsity_pattern": "2:4"}, "50%": {"sparsity_pattern": "unstructured", "sparsity": 0.5}}


def routers_of(model):
    last_names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in ROUTERS if name in last_names]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "rgs", "ro", "wanda++", "sparsegpt", "tuned-ro"])
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_every_method_prunes_them_like_a_loop_over_linears(name, method):
    model, _ = build(name)
    loops = with_loops(model, name)
    excluded = EXCLUDED.get(name, ())
    # rates at which rounding is not amplified
    options = {"method": method, "learning_rate": 1e-4, "alpha": "auto", "batches": token_batches(8, length=20)}
    report = prune(model, exclude_modules=excluded, **options)
    prune(loops, exclude_modules=(*excluded, *routers_of(loops)), **options)
    assert not report.unreached_experts
    found, wanted = weights_of(model, name), weights_of(loops, name)
    assert found.keys() == wanted.keys() != set()
    for key, weight in found.items():
        assert torch.equal(weight == 0, wanted[key] == 0), key
        torch.testing.assert_close(weight, wanted[key], rtol=1e-3, atol=1e-4)
    others = {key: weight for key, weight in loops.state_dict().items() if "experts." not in key}
    torch.testing.assert_close({key: model.state_dict()[key] for key in others}, others, rtol=1e-3, atol=1e-4)


def brute_force_wanda(model, blocks, batches, pattern):
    """Wanda with whole forwards, one block after the other; an expert without tokens by magnitude."""
    for block in blocks:
        layers = [m for m in block.modules() if isinstance(m, nn.Linear)]
        inputs = {layer: [] for layer in layers}

        def hook(layer, args, inputs=inputs):
            inputs[layer].append(args[0])

        handles = [layer.register_forward_pre_hook(hook) for layer in layers]
        for batch in batches:
            model(**batch)
        for handle in handles:
            handle.remove()
        for layer in layers:
            score = layer.weight.abs()
            if inputs[layer]:
                score = score * torch.cat([x.flatten(0, -2) for x in inputs[layer]]).norm(dim=0)
            layer.weight.mul_(make_mask(score, pattern))


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_experts_that_no_token_reaches_are_pruned_by_magnitude_and_named(pattern):
    model, blocks = build_unreached()
    loops = with_loops(model, "gpt_oss")
    brute_force_wanda(loops, loops.get_submodule(blocks), BATCHES, SparsityPattern(**PATTERNS[pattern]))
    report = prune(model, method="wanda", **PATTERNS[pattern])
    wanted = weights_of(loops, "gpt_oss")
    for key, weight in weights_of(model, "gpt_oss").items():
        assert torch.equal(weight, wanted[key])
    assert report.unreached_experts == {f"model.layers.{i}.mlp.experts": (3,) for i in range(3)}
    assert "`model.layers.1.mlp.experts` 3" in report.unreached_words


@pytest.mark.parametrize("method", ["rgs", "ro", "wanda++", "sparsegpt"])
def test_every_method_prunes_an_unreached_expert_by_magnitude(method):
    model, _ = build_unreached()
    dense = weights_of(build_unreached()[0], "gpt_oss")
    report = prune(model, method=method)
    assert set(report.unreached_experts.values()) == {(3,)}
    for key, weight in weights_of(model, "gpt_oss").items():
        mask = make_mask(dense[key][3].abs(), SparsityPattern("2:4"))
        assert torch.equal(weight[3], dense[key][3] * mask)


def test_padding_reaches_no_expert():
    plain, padded = build("qwen3_moe")[0], build("qwen3_moe")[0]
    options = {"method": "wanda", "token_mask": lambda batch: batch["attention_mask"]}
    reports = [prune(plain, **options), prune(padded, [pad(batch, 5) for batch in BATCHES], **options)]
    assert equal(plain, padded)
    counts = [[layer.expert_tokens for block in report.blocks for layer in block.layers] for report in reports]
    assert counts[0] == counts[1]
    # every token has two experts
    assert sum(counts[0][-1]) == 2 * reports[0].num_tokens


def test_what_is_measured_for_one_expert_does_not_change_another():
    """Two models, in one of which an expert gets other tokens: the masks of the others are the same."""
    masks = []
    for ids in (3, 4):
        model, _ = build("mixtral")
        experts = model.model.layers[0].mlp.experts
        router = model.model.layers[0].mlp.gate
        # the first two experts get all tokens but the last, which only the other two get
        tokens = torch.arange(10)
        chosen = torch.where(tokens[:, None] < 9, torch.tensor([[0, 1]]), torch.tensor([[2, 3]]))
        router.forward = lambda hidden, chosen=chosen: (None, torch.full((10, 2), 0.5), chosen)
        batches = token_batches(4)
        for batch in batches:
            batch["input_ids"][:, -1] = ids
        progress = Memory()
        prune(model, batches, method="wanda", run={"progress": progress})
        assert progress.results[0].masks["mlp.experts.down_proj"].shape == experts.down_proj.shape
        masks.append(progress.results[0].masks["mlp.experts.gate_up_proj"])
    assert torch.equal(masks[0][:2], masks[1][:2])
    assert not torch.equal(masks[0][2:], masks[1][2:])


@pytest.mark.parametrize("excluded", ["experts", "gate_up_proj", "layers.1"])
def test_experts_can_be_left_dense(excluded):
    model, dense = build("mixtral")[0], build("mixtral")[0]
    report = prune(model, method="wanda", exclude_modules=(excluded,))
    assert report.sparsity == 0.5
    for key, weight in weights_of(model, "mixtral").items():
        untouched = torch.equal(weight, dense.get_parameter(key))
        assert untouched == (f".{excluded}." in f".{key}.")


def test_routers_stay_dense():
    for name in WITH_EXPERTS:
        model, dense = build(name)[0], build(name)[0]
        prune(model, method="magnitude", batches=[], exclude_modules=EXCLUDED.get(name, ()))
        names = [n for n in model.state_dict() if n.split(".")[-2] in ROUTERS]
        assert names
        for key in names:
            assert torch.equal(model.state_dict()[key], dense.state_dict()[key])


def test_an_interrupted_pruning_goes_on_to_the_same_bits():
    progress, whole = Memory(), build("deepseek_v3")[0]
    report = prune(whole, run={"progress": progress})
    del progress.results[2]
    resumed = build("deepseek_v3")[0]
    assert prune(resumed, run={"progress": progress}).blocks[1] == report.blocks[1]
    assert equal(resumed, whole)
