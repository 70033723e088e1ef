"""Each method, against an independent reference of it."""

import pytest
import torch
from helpers.architectures import build
from helpers.prune_model import BATCHES, equal, linears, prune, rows_of, tiny

from wandazeta.pruning.method.layers import prunable_layers
from wandazeta.pruning.method.sparsegpt import sparsegpt
from wandazeta.pruning.pattern import SparsityPattern


def independent_wanda(model, blocks, batches, num_pruned_of_4=None, sparsity=None):
    """Wanda in a dozen lines: whole forwards, one block after the other."""
    for block in blocks:
        norms = {}

        def hook(layer, args, norms=norms):
            norms[layer] = norms.get(layer, 0) + args[0].flatten(0, -2).pow(2).sum(0)

        handles = [layer.register_forward_pre_hook(hook) for layer in linears(block)]
        for batch in batches:
            model(**batch)
        for handle, layer in zip(handles, linears(block), strict=True):
            handle.remove()
            score = rows_of(layer).abs() * (norms[layer] / len(batches)).sqrt()
            group, count = (
                (4, num_pruned_of_4) if sparsity is None else (score.shape[1], int(score.shape[1] * sparsity))
            )
            lowest = score.reshape(-1, group).sort(dim=1, stable=True).indices[:, :count]
            rows_of(layer).copy_(rows_of(layer).reshape(-1, group).scatter(1, lowest, 0).view_as(score))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("pattern", [{"num_pruned_of_4": 2}, {"num_pruned_of_4": 3}, {"sparsity": 0.5}])
@torch.no_grad()
def test_without_gradients_and_rounds_it_is_wanda_bit_for_bit(name, pattern):
    theirs, blocks = build(name)
    independent_wanda(theirs, theirs.get_submodule(blocks), BATCHES, **pattern)
    kept = 4 - pattern.get("num_pruned_of_4", 0)
    options = {"sparsity_pattern": f"{kept}:4"} if kept < 4 else {"sparsity_pattern": "unstructured", **pattern}
    for method in ({"method": "wanda"}, {"method": "wanda++", "alpha": 0.0, "rounds": 0}):
        assert equal(tiny(name, **method, **options)[0], theirs)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_slope_makes_the_last_block_sparser_than_the_first(method):
    options = {"sparsity_pattern": "unstructured", "sparsity": 0.5, "sparsity_slope": 0.25}
    _, blocks, report = tiny(method=method, **options)
    assert len(blocks) > 1
    expected = [0.375 + 0.25 * i / (len(blocks) - 1) for i in range(len(blocks))]
    for block, record, sparsity in zip(blocks, report.blocks, expected, strict=True):
        for layer in linears(block):
            zeros = (layer.weight == 0).float()
            if method == "sparsegpt":
                assert zeros.mean().item() == pytest.approx(sparsity, abs=0.01)
            else:
                assert (zeros.sum(1) == int(zeros.shape[1] * sparsity)).all()
        assert {layer.pattern for layer in record.layers} == {f"{100 * sparsity:g}%"}
    with pytest.raises(ValueError, match=r"at least one weight of each row, but 0\.01"):
        tiny(method=method, sparsity_pattern="unstructured", sparsity=0.06, sparsity_slope=0.1)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "unstructured"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "rgs", "ro", "wanda++", "sparsegpt", "tuned-ro"])
def test_every_row_and_group_has_its_exact_count(method, pattern):
    sparsity = 0.5 if pattern == "unstructured" else None
    model, blocks, report = tiny(method=method, sparsity_pattern=pattern, sparsity=sparsity)
    dense, _ = build("llama")
    for block in blocks:
        for layer in linears(block):
            zeros = layer.weight == 0
            if method in ("sparsegpt", "tuned-ro") and sparsity is not None:
                assert zeros.sum() == int(zeros.numel() * sparsity)  # rows share the zeros of a block of columns
            elif sparsity is not None:
                assert (zeros.sum(1) == int(zeros.shape[1] * sparsity)).all()
            else:
                kept, size = map(int, pattern.split(":"))
                assert ((~zeros).view(-1, size).sum(1) == kept).all()
    untouched = ("embed", "norm", "lm_head")
    for (key, value), other in zip(model.state_dict().items(), dense.state_dict().values(), strict=True):
        assert torch.equal(value, other) == any(part in key for part in untouched)
    wanted = SparsityPattern(pattern, sparsity).target_sparsity
    assert report.sparsity == pytest.approx(wanted)


def test_no_rounds_is_rgs_and_no_gradient_is_ro():
    assert equal(tiny(rounds=0)[0], tiny(method="rgs")[0])
    assert equal(tiny(alpha=0.0)[0], tiny(method="ro")[0])
    models = [tiny(method=m, alpha=30.0)[0] for m in ("magnitude", "wanda", "rgs", "ro", "wanda++")]
    assert not any(equal(a, b) for i, a in enumerate(models) for b in models[:i])


def test_rgs_by_hand():
    """The first block only: later ones see another input."""
    dense, _ = build("llama")
    block = dense.model.layers[0]
    inputs = {}
    for name, layer in prunable_layers(block).items():
        layer.register_forward_hook(lambda _, args, __, name=name: inputs.setdefault(name, []).append(args[0].detach()))
    outputs = []
    block.register_forward_hook(lambda _, __, output: outputs.append(output))
    for batch in BATCHES:
        dense(**batch)
    pruned = tiny(method="rgs", alpha=50.0)[0].model.layers[0]
    for name, layer in prunable_layers(block).items():
        grads = [torch.autograd.grad(o.pow(2).sum().sqrt(), layer.weight, retain_graph=True)[0] for o in outputs]
        gradient = torch.stack(grads).pow(2).mean(0).sqrt()
        norm = torch.stack([x[0].norm(dim=0) ** 2 for x in inputs[name]]).mean(0).sqrt()
        groups = ((50.0 * gradient + norm) * layer.weight.abs()).view(-1, 4)
        kept = groups >= groups.topk(2).values[:, 1:]
        assert torch.equal(pruned.get_parameter(name) != 0, kept.view_as(layer.weight))


def test_magnitude_needs_no_data():
    model, blocks = build("llama")
    report = prune(model, batches=[], method="magnitude", run={"block_name": blocks})
    for ours, dense in zip(linears(model.model.layers), linears(build("llama")[0].model.layers), strict=True):
        groups = dense.weight.abs().view(-1, 4)
        wanted = dense.weight * (groups >= groups.topk(2).values[:, 1:]).view_as(dense.weight)
        assert torch.equal(ours.weight, wanted)
    assert report.num_samples == 0


@torch.no_grad()
def test_sparsegpt_solves_every_layer_from_its_own_inputs():
    """Block by block, with the whole model's forwards and one elimination a layer."""
    theirs, blocks = build("llama")
    for block in theirs.get_submodule(blocks):
        grams = {}

        def hook(layer, args, grams=grams):
            rows = args[0].flatten(0, -2)
            grams[layer] = grams.get(layer, 0) + rows.t() @ rows

        handles = [layer.register_forward_pre_hook(hook) for layer in linears(block)]
        for batch in BATCHES:
            theirs(**batch)
        for handle, layer in zip(handles, linears(block), strict=True):
            handle.remove()
            layer.weight.copy_(sparsegpt([layer.weight], grams[layer], SparsityPattern("2:4"))[0][0])
    ours, _, report = tiny(method="sparsegpt")
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=name)
    assert all(block.loss_after is not None for block in report.blocks)
