import copy
import random

import numpy as np
import pytest
import torch
from helpers.architectures import ARCHITECTURES, EXCLUDED, build, pad, token_batches
from torch import nn

from wandazeta.callbacks.pruning import samples
from wandazeta.callbacks.pruning.layers import is_transposed, prunable_layers
from wandazeta.callbacks.pruning.masks import make_mask
from wandazeta.callbacks.pruning.options import PruneOptions
from wandazeta.callbacks.pruning.pruner import PruningInterrupted, prune_model
from wandazeta.callbacks.pruning.sparsegpt import sparsegpt
from wandazeta.callbacks.pruning.statistics import InputStatistics

FAST = {"rounds": 2, "samples_per_round": 4, "learning_rate": 1e-3}
BATCHES = token_batches(8)


def prune(model, batches=BATCHES, token_mask=None, run=None, **options):
    options = PruneOptions(**{**FAST, **options})
    return prune_model(model, lambda batch: model(**batch), batches, options, token_mask=token_mask, **(run or {}))


def tiny(name="llama", batches=BATCHES, **options):
    model, blocks = build(name)
    report = prune(model, batches, **options)
    return model, model.get_submodule(blocks), report


def linears(block):
    return [m for m in block.modules() if isinstance(m, nn.Linear) or is_transposed(m)]


def rows_of(layer):
    return layer.weight.detach().t() if is_transposed(layer) else layer.weight.detach()


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "unstructured"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "rgs", "ro", "wanda++", "sparsegpt"])
def test_every_row_and_group_has_its_exact_count(method, pattern):
    sparsity = 0.5 if pattern == "unstructured" else None
    model, blocks, report = tiny(method=method, sparsity_pattern=pattern, sparsity=sparsity)
    dense, _ = build("llama")
    for block in blocks:
        for layer in linears(block):
            zeros = layer.weight == 0
            if method == "sparsegpt" and sparsity is not None:
                assert zeros.sum() == int(zeros.numel() * sparsity)  # rows share the zeros of a block of columns
            elif sparsity is not None:
                assert (zeros.sum(1) == int(zeros.shape[1] * sparsity)).all()
            else:
                kept, size = map(int, pattern.split(":"))
                assert ((~zeros).view(-1, size).sum(1) == kept).all()
    untouched = ("embed", "norm", "lm_head")
    for (key, value), other in zip(model.state_dict().items(), dense.state_dict().values(), strict=True):
        assert torch.equal(value, other) == any(part in key for part in untouched)
    wanted = PruneOptions(sparsity_pattern=pattern, sparsity=sparsity).target_sparsity
    assert report.sparsity == pytest.approx(wanted)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_pruned(name):
    batches = [*BATCHES[:4], *(pad(batch, 3) for batch in BATCHES[4:])]
    options = {"target": "dense_stream", "exclude_modules": EXCLUDED.get(name, ())}
    _, blocks, report = tiny(name, batches=batches, token_mask=lambda b: b["attention_mask"], **options)
    for block, record in zip(blocks, report.blocks, strict=True):
        assert len(record.layers) == len(linears(block)) > 0
        for layer in linears(block):
            assert ((rows_of(layer) != 0).reshape(-1, 4).sum(1) == 2).all()
        assert record.loss_after < record.loss_before * 1.05


def test_no_rounds_is_rgs_and_no_gradient_is_ro():
    assert equal(tiny(rounds=0)[0], tiny(method="rgs")[0])
    assert equal(tiny(alpha=0.0)[0], tiny(method="ro")[0])
    models = [tiny(method=m, alpha=30.0)[0] for m in ("magnitude", "wanda", "rgs", "ro", "wanda++")]
    assert not any(equal(a, b) for i, a in enumerate(models) for b in models[:i])


def test_rgs_by_hand():
    """The first block only: later ones see another input."""
    dense, _ = build("llama")
    block, options = dense.model.layers[0], PruneOptions(method="rgs", alpha=50.0)
    inputs = {}
    for name, layer in prunable_layers(block, options).items():
        layer.register_forward_hook(lambda _, args, __, name=name: inputs.setdefault(name, []).append(args[0].detach()))
    outputs = []
    block.register_forward_hook(lambda _, __, output: outputs.append(output))
    for batch in BATCHES:
        dense(**batch)
    pruned = tiny(method="rgs", alpha=50.0)[0].model.layers[0]
    for name, layer in prunable_layers(block, options).items():
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


@pytest.mark.parametrize("target", ["dense_block", "dense_stream"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_optimisation_lowers_the_loss_of_every_block(target, optimizer):
    _, _, report = tiny(target=target, optimizer=optimizer, rounds=6, samples_per_round=8)
    for block in report.blocks:
        assert block.loss_after < block.loss_before


@pytest.mark.parametrize("target", ["dense_block", "dense_stream"])
def test_the_pruned_block_feeds_the_next_and_the_target_is_the_one_asked_for(target):
    """The reported losses, recomputed with forwards of the pruned and of the dense model."""
    model, blocks, report = tiny(target=target)
    dense, _ = build("llama")

    def states(which):
        inputs, outputs = {}, {}

        def record(block, args, output):
            inputs.setdefault(places[block], []).append(args[0])
            outputs.setdefault(places[block], []).append(output)

        places = {block: i for i, block in enumerate(which.model.layers)}
        handles = [block.register_forward_hook(record) for block in places]
        with torch.no_grad():
            for batch in BATCHES:
                which(**batch)
        for handle in handles:
            handle.remove()
        return inputs, outputs

    inputs, outputs = states(model)
    wanted = states(dense)[1]
    if target == "dense_block":
        mixed = copy.deepcopy(model)
        for i in range(len(blocks)):  # dense blocks on the pruned model's inputs
            mixed.model.layers = copy.deepcopy(model.model.layers)
            mixed.model.layers[i] = copy.deepcopy(dense.model.layers[i])
            wanted[i] = states(mixed)[1][i]
    for i, record in enumerate(report.blocks):
        losses = [(a - b).pow(2).mean() for a, b in zip(outputs[i], wanted[i], strict=True)]
        assert record.loss_after == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert not torch.equal(inputs[1][0], states(dense)[0][1][0])


@pytest.mark.parametrize("name", ["llama", "bert", "opt"])
def test_padded_positions_change_nothing(name):
    """Right padding that no real position attends to; garbage tokens there must not count anywhere."""
    batches = [pad(batch, 5) for batch in BATCHES]
    other = copy.deepcopy(batches)
    for batch in other:
        batch["input_ids"][:, -5:] = torch.randint(3, 32, (1, 5), generator=torch.Generator().manual_seed(7))
    options = {"alpha": 30.0, "target": "dense_stream", "token_mask": lambda batch: batch["attention_mask"].bool()}
    assert equal(tiny(name, batches=batches, **options)[0], tiny(name, batches=other, **options)[0])
    options.pop("token_mask")
    assert not equal(tiny(name, batches=batches, **options)[0], tiny(name, batches=other, **options)[0])


def test_rows_of_a_batch_are_samples():
    joined = [
        {key: torch.cat([batch[key] for batch in BATCHES[i : i + 4]]) for key in BATCHES[0]} for i in range(0, 8, 4)
    ]
    model, _, report = tiny(batches=joined)
    assert equal(model, tiny()[0])
    assert (report.num_samples, report.num_tokens) == (8, 80)


class Memory:
    """Progress in memory that forgets some blocks."""

    def __init__(self):
        self.results = {}

    def load(self, index):
        return self.results.get(index)

    def save(self, index, result):
        self.results[index] = copy.deepcopy(result)


@pytest.mark.parametrize("target", ["dense_block", "dense_stream"])
@pytest.mark.parametrize("stop", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_resumed_is_bit_identical(name, stop, target):
    undisturbed, _, wanted = tiny(name, target=target)
    progress, asked = Memory(), []

    def should_stop():
        asked.append(1)
        return len(asked) == stop + 1

    with pytest.raises(PruningInterrupted) as interrupt:
        tiny(name, target=target, run={"progress": progress, "should_stop": should_stop})
    assert interrupt.value.block_index == stop
    assert sorted(progress.results) == list(range(stop + 1))
    resumed, _, report = tiny(name, target=target, run={"progress": progress})
    assert equal(resumed, undisturbed)
    assert [b.loss_after for b in report.blocks] == [b.loss_after for b in wanted.blocks]


def test_complete_progress_needs_neither_data_nor_forward():
    progress, seen = Memory(), []
    wanted, _, report = tiny(run={"progress": progress})
    model, blocks = build("llama")
    run = {
        "progress": progress,
        "block_name": blocks,
        "on_block": lambda record, count: seen.append((record.index, count)),
    }
    again = prune(model, batches=[], run=run)
    assert equal(model, wanted)
    assert again == report
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_a_lost_block_in_the_middle_is_made_again():
    progress = Memory()
    wanted, _, _ = tiny(run={"progress": progress})
    lost = progress.results.pop(1)
    again, _, _ = tiny(run={"progress": progress})
    assert equal(again, wanted)
    for name, weight in lost.weights.items():
        assert torch.equal(progress.results[1].weights[name], weight)


def test_results_hold_weights_and_masks_in_the_weights_layout():
    progress = Memory()
    _, blocks, _ = tiny("gpt2", run={"progress": progress})
    for index, block in enumerate(blocks):
        result = progress.results[index]
        assert result.weights.keys() == result.masks.keys()
        for name, mask in result.masks.items():
            assert torch.equal(result.weights[name], block.get_parameter(name))
            assert torch.equal(mask, block.get_parameter(name) != 0)
            assert mask.is_contiguous()
            assert not result.weights[name][~mask].signbit().any()


def test_progress_of_another_model_is_refused():
    progress = Memory()
    tiny("gpt2", run={"progress": progress})
    with pytest.raises(ValueError, match=r"remove the progress"):
        tiny("llama", run={"progress": progress})


def test_nothing_else_is_changed():
    model, _ = build("bert")
    model.train()
    model.bert.encoder.layer[1].eval()
    model.bert.embeddings.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    parameters = list(model.parameters())
    torch.manual_seed(3)
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())

    def forward(batch):
        torch.rand(1), random.random(), np.random.rand()
        return model(**batch)

    prune_model(model, forward, BATCHES, PruneOptions(**FAST))
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.grad is None for p in parameters)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_the_global_random_state_has_no_say_and_the_seed_has():
    torch.manual_seed(1)
    first = tiny("bert")[0]
    torch.manual_seed(2)
    assert equal(tiny("bert")[0], first)
    assert not equal(tiny("bert", seed=1)[0], first)


def test_inside_inference_mode():
    model, _ = build("llama")
    with torch.inference_mode():
        prune(model)
    assert equal(model, tiny()[0])


def test_sixteen_bit_models_stay_so():
    model, _ = build("llama")
    model = model.bfloat16()
    report = prune(model)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    for layer in linears(model.model.layers):
        assert ((layer.weight != 0).view(-1, 4).sum(1) == 2).all()
    assert report.blocks[0].loss_after < report.blocks[0].loss_before


def test_excluded_modules_and_blocks_stay_dense():
    _, blocks, report = tiny(exclude_modules=("q_proj", "layers.1"), target="dense_stream")
    dense, _ = build("llama")
    assert torch.equal(blocks[0].self_attn.q_proj.weight, dense.model.layers[0].self_attn.q_proj.weight)
    assert equal(blocks[1], dense.model.layers[1])
    assert len(report.blocks[0].layers) == 6
    assert report.blocks[1].layers == ()
    assert (blocks[2].mlp.up_proj.weight == 0).any()


def test_wrong_requests_are_refused_before_any_change():
    model, _ = build("llama")
    dense, _ = build("llama")
    for options, message in (
        ({"batches": []}, "calibration samples"),
        ({"samples_per_round": 9}, r"at most the number of calibration samples \(8\)"),
        ({"sparsity_pattern": "5:10"}, "16 inputs of `model.layers.0.self_attn.q_proj.weight`"),
        ({"exclude_modules": ("up_prj",)}, "did you mean `mlp.up_proj`"),
        ({"run": {"block_name": "model.layer"}}, "did you mean `model.layers`"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(model, **options)
    assert equal(model, dense)
    assert all(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_sparsegpt_solves_every_layer_from_its_own_inputs():
    """Block by block, with the whole model's forwards and one elimination a layer."""
    theirs, blocks = build("llama")
    options = PruneOptions(method="sparsegpt")
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
            layer.weight.copy_(sparsegpt([layer.weight], grams[layer], options)[0][0])
    ours, _, report = tiny(method="sparsegpt")
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=name)
    assert all(block.loss_after is not None for block in report.blocks)


def test_optimisation_may_start_from_sparsegpt():
    options = {"method": "ro", "rounds": 1, "learning_rate": 1e-9, "mask_mode": "fixed", "target": "dense_block"}
    started, blocks, report = tiny(start="sparsegpt", **options)
    reference, other_blocks, _ = tiny(method="sparsegpt")
    # with steps too small to matter the first block is SparseGPT's own
    for layer, other in zip(linears(blocks[0]), linears(other_blocks[0]), strict=True):
        torch.testing.assert_close(layer.weight, other.weight, rtol=1e-4, atol=1e-5)
    plain = tiny(**options)[2]
    assert report.blocks[0].loss_before < plain.blocks[0].loss_before
    assert not equal(started, reference)


def test_bfloat16_compute_hardly_changes_the_masks():
    for method in ("wanda", "rgs"):
        found = []
        for compute_dtype in ("model", "bfloat16"):
            model, blocks, _ = tiny(method=method, compute_dtype=compute_dtype, alpha=10.0)
            assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
            found.append(torch.cat([(layer.weight != 0).flatten() for block in blocks for layer in linears(block)]))
        assert 0 < (found[0] != found[1]).float().mean() < 0.05, "autocast was on, and did no harm"


class Broadcasting(nn.Module):
    """A model whose blocks take an argument that belongs to one sample, and one that is shared."""

    def __init__(self, per_sample):
        super().__init__()
        self.layers = nn.ModuleList(BiasedBlock() for _ in range(3))
        self.per_sample = per_sample

    def forward(self, x):
        bias = torch.arange(4.0).view(1, 4, 1)
        for layer in self.layers:
            x = layer(x, bias[:, :, 0].reshape(-1) if self.per_sample else bias)
        return x


class BiasedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seen = []

    def forward(self, x, bias):
        self.seen.append(len(x))
        return x + self.linear(x) + (bias if bias.ndim == 3 else bias.view(len(x), -1, 1))


@pytest.mark.parametrize("per_sample", [False, True])
def test_samples_go_together_where_the_block_allows_it(per_sample):
    torch.manual_seed(0)
    model, rows = Broadcasting(per_sample), [torch.randn(1, 4, 8) for _ in range(6)]
    expected = copy.deepcopy(model)
    options = PruneOptions(method="wanda")
    prune_model(model, model, rows, options)
    for layer in expected.layers:
        norm = sum(x[0].square().sum(0) for x in rows).sqrt()
        kept = make_mask(layer.linear.weight.abs() * norm, options)
        layer.linear.weight.data *= kept
        bias = torch.arange(4.0).view(1, 4, 1)
        rows = [(layer(x, bias)).detach() for x in rows]
    assert all(
        torch.equal(a.linear.weight, b.linear.weight) for a, b in zip(model.layers, expected.layers, strict=True)
    )
    assert max(model.layers[1].seen) == (1 if per_sample else 6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(
    "options", [{"method": "wanda"}, {"method": "sparsegpt"}, {"method": "ro", "target": "dense_stream"}], ids=str
)
def test_forwards_without_a_use_end_early_and_nothing_changes(monkeypatch, name, options):
    monkeypatch.setattr(samples, "_MAX_TOKENS", 16)  # several batches
    batches = token_batches(24)
    model, _, report = tiny(name, batches=batches, **options)
    sample, stops = InputStatistics.sample, []

    def whole(self, mask=None, num_samples=1, shape=None, may_stop=False):
        stops.append(may_stop and self._last_layers.get(shape) is not None)
        return sample(self, mask, num_samples, shape)

    monkeypatch.setattr(InputStatistics, "sample", whole)
    reference, _, wanted = tiny(name, batches=batches, **options)
    assert any(stops)
    assert equal(model, reference)
    assert [block.loss_after for block in report.blocks] == [block.loss_after for block in wanted.blocks]
