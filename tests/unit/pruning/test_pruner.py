import random

import numpy as np
import pytest
import torch
from helpers.architectures import ARCHITECTURES, EXCLUDED, build, pad
from helpers.processes import fork_ranks
from helpers.prune_model import BATCHES, FAST, Memory, equal, linears, prune, rows_of, tiny
from helpers.prune_options import make_options
from helpers.pruning import Tiny

from wandazeta.pruning import prune_model, pruner
from wandazeta.pruning.method.block import BlockPruner
from wandazeta.utilities.ranks import Ranks


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_pruned(name):
    batches = [*BATCHES[:4], *(pad(batch, 3) for batch in BATCHES[4:])]
    options = {"exclude_modules": EXCLUDED.get(name, ())}
    _, blocks, report = tiny(name, batches=batches, token_mask=lambda b: b["attention_mask"], **options)
    for block, record in zip(blocks, report.blocks, strict=True):
        excluded = [
            m for n, m in block.named_modules() if any(f".{n}".endswith(f".{e}") for e in options["exclude_modules"])
        ]
        pruned = [layer for layer in linears(block) if layer not in excluded]
        # the gate of a shared expert is a Linear that stays dense
        gate = getattr(getattr(block, "mlp", None), "shared_expert_gate", None)
        pruned = [rows_of(layer) for layer in pruned if layer is not gate]
        pruned += [p for n, p in block.named_parameters() if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
        assert len(record.layers) == len(pruned) > 0
        for weight in pruned:
            rows = weight.mT if name == "gpt_oss" and weight.ndim == 3 else weight
            assert ((rows != 0).reshape(-1, 4).sum(1) == 2).all()
        assert record.loss_after < record.loss_before * 1.05


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

    prune_model(model, forward, BATCHES, make_options(**FAST))
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


def test_masks_that_are_packed_for_the_copy_are_saved_as_they_are(monkeypatch):
    start, found = pruner._start_copy, []
    for packs in (False, True):
        monkeypatch.setattr(pruner, "_start_copy", lambda result, copies, packs, own=packs: start(result, copies, own))
        progress = Memory()
        # fused experts have masks of three dimensions
        tiny("mixtral", method="wanda", run={"progress": progress})
        found.append({(i, name): mask for i, block in progress.results.items() for name, mask in block.masks.items()})
    assert {mask.dim() for mask in found[0].values()} == {2, 3}
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_inside_inference_mode():
    model, _ = build("llama")
    with torch.inference_mode():
        prune(model)
    assert equal(model, tiny()[0])


def test_excluded_modules_and_blocks_stay_dense():
    _, blocks, report = tiny(exclude_modules=("q_proj", "layers.1"), method="tuned-ro")
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


@pytest.mark.parametrize("where", ["self_attn.q_proj.weight", "input_layernorm.weight"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_weights_that_are_not_finite_are_refused_before_the_first_block(method, where):
    model, blocks = build("llama")
    with torch.no_grad():
        model.get_submodule(blocks)[2].get_parameter(where).view(-1)[3] = float(
            "inf" if method == "magnitude" else "nan"
        )
    first = model.get_submodule(blocks)[0].self_attn.q_proj.weight.clone()
    with pytest.raises(ValueError, match=f"Expected finite weights of `{where}` in block 2"):
        prune(model, method=method)
    assert torch.equal(model.get_submodule(blocks)[0].self_attn.q_proj.weight, first)
    prune(model, method="magnitude", exclude_modules=(where,))


def test_weights_that_pruning_makes_infinite_are_refused(monkeypatch):
    model, _ = build("llama")
    original = BlockPruner.mask_by_score

    def overflow(self):
        kept = original(self)
        self.layers["mlp.up_proj.weight"].weight[0, 0] = float("inf")
        return kept

    monkeypatch.setattr(BlockPruner, "mask_by_score", overflow)
    with pytest.raises(ValueError, match=r"finite pruned weights of `mlp.up_proj.weight` in block 0"):
        prune(model, method="magnitude")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "wanda++"])
@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("inputs of `mlp.down_proj.weight` in block 0", lambda layers: layers[0].mlp.up_proj.weight.mul_(3e30)),
        ("weights of `self_attn.q_proj.weight` in block 1", lambda layers: layers[1].self_attn.q_proj.weight.div_(0)),
    ],
    ids=["overflow", "broken weights"],
)
def test_what_is_not_finite_is_refused(method, what, spoil):
    model, blocks = build("llama")
    with torch.no_grad():
        spoil(model.get_submodule(blocks))
    with pytest.raises(ValueError, match=f"Expected finite {what}"):
        prune(model, method=method)


@pytest.mark.parametrize("method", ["wanda", "wanda++"])
def test_compiled_blocks_are_pruned_as_others_are(method):
    tokens = [torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    options = make_options(method, samples_per_round=4, rounds=1)
    torch.compiler.reset()
    compiled, eager = Tiny().eval(), Tiny().eval()
    for block in compiled.layers:
        block.compile(backend="eager")
    with torch.no_grad():
        for rows in (tokens[0][:1], tokens[0], torch.cat(tokens)):
            compiled(rows)  # traced in the shapes to come, before there are hooks
    for model in (compiled, eager):
        prune_model(model, model, tokens, options)
    assert equal(compiled, eager)


def test_more_ranks_than_samples_are_refused_on_every_rank(tmp_path):
    def work(rank, size):
        with pytest.raises(ValueError, match="one calibration sample for each of 2 ranks, but got 1; start fewer"):
            prune(build("llama")[0], BATCHES[:1], run={"ranks": Ranks.of_process_group("cpu")}, method="wanda")
        return rank

    assert fork_ranks(work, tmp_path) == [0, 1]
