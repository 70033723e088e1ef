"""Copies of samples in which the dense model draws tokens anew."""

from types import SimpleNamespace

import pytest
import torch
from helpers.architectures import build, token_batches
from helpers.prune_model import Memory, equal, prune, tiny
from torch import nn

from wandazeta.callbacks.pruning.pruner import PruningInterrupted
from wandazeta.callbacks.pruning.resample import with_resampled
from wandazeta.callbacks.pruning.samples import split_rows


def mask_of(row):
    return row["attention_mask"].bool()


def resample(model, blocks, rows, copies=3, token_mask=None, forward=None, **more):
    layers = model.get_submodule(blocks)

    def behind(rows):
        found = []
        handle = layers[-1].register_forward_hook(lambda block, args, output: found.append(output))
        for row in rows:
            forward(row)
        handle.remove()
        return found

    forward = forward or (lambda row: model(**row))
    with torch.no_grad():
        return with_resampled(rows, copies, layers, forward, behind, token_mask, seed=more.pop("seed", 0), **more)


def long_rows(count=4, tokens=48):
    ids = torch.randint(1, 32, (count, tokens), generator=torch.Generator().manual_seed(1))
    return split_rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_half_of_the_tokens_are_what_the_model_predicts_of_the_true_ones_before():
    model, blocks = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)  # so sure of itself that a draw is the likeliest token
    rows = long_rows()
    found = resample(model, blocks, rows)
    assert len(found) == 16
    assert all(a is b for a, b in zip(found[:4], rows, strict=True))
    shares = []
    for place, copy in enumerate(found[4:]):
        true = rows[place % 4]["input_ids"][0]
        wanted = model(**rows[place % 4]).logits[0].argmax(-1)
        changed = copy["input_ids"][0]
        assert changed[0] == true[0]
        replaced = changed[1:] != true[1:]
        assert torch.equal(changed[1:][replaced], wanted[:-1][replaced])
        assert torch.equal(copy["attention_mask"], rows[place % 4]["attention_mask"])
        shares.append(replaced.float().mean())
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.08)
    assert not torch.equal(found[4]["input_ids"], found[8]["input_ids"])


def test_draws_have_the_models_probabilities():
    model, blocks = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(30.0)
    row = long_rows(1, 2)
    with torch.no_grad():
        wanted = model(**row[0]).logits[0, 0].softmax(-1)
    tokens = torch.cat([copy["input_ids"] for copy in resample(model, blocks, row, copies=8000)[1:]])[:, 1]
    # half of them are the true token
    share = torch.bincount(tokens, minlength=32) / len(tokens)
    kept = torch.nn.functional.one_hot(row[0]["input_ids"][0, 1], 32)
    assert (share - (0.5 * wanted + 0.5 * kept)).abs().max() < 0.02
    assert wanted.max() > 0.1, "an even distribution would not tell"


def test_padding_stays_and_so_do_the_samples():
    model, blocks = build("llama")
    rows = long_rows(2)
    for row in rows:
        row["attention_mask"][:, :20] = 0
    before = [row["input_ids"].clone() for row in rows]
    for place, copy in enumerate(resample(model, blocks, rows, token_mask=mask_of)[2:]):
        true = before[place % 2]
        assert torch.equal(copy["input_ids"][:, :20], true[:, :20])
        assert not torch.equal(copy["input_ids"], true)
    assert all(torch.equal(row["input_ids"], ids) for row, ids in zip(rows, before, strict=True))


@pytest.mark.parametrize(("num_rows", "num_ranks"), [(4, 2), (5, 2), (3, 4)])
def test_ranks_have_the_samples_of_one(num_rows, num_ranks):
    model, blocks = build("llama")
    rows = long_rows(num_rows)
    alone = resample(model, blocks, rows)
    for rank in range(num_ranks):
        shared = resample(model, blocks, rows, rank=rank, num_ranks=num_ranks)
        wanted = alone[rank::num_ranks]
        assert len(shared) == len(wanted)
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(shared, wanted, strict=True))


def test_another_seed_draws_others():
    model, blocks = build("llama")
    found = [torch.cat([r["input_ids"] for r in resample(model, blocks, long_rows(), seed=seed)]) for seed in (0, 1)]
    assert not torch.equal(*found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "gemma2"])
def test_pruned_as_with_the_copies_given(name, monkeypatch):
    from wandazeta.callbacks.pruning import pruner

    kept = []

    def noted(rows, *args, **kwargs):
        kept.extend(with_resampled(rows, *args, **kwargs))
        return kept

    monkeypatch.setattr(pruner, "with_resampled", noted)
    options = {"samples_per_round": 24, "target": "dense_stream", "learning_rate": 1e-2}
    model, _, report = tiny(name, resampled_copies=2, **options)
    assert len(kept) == 24
    given, _, wanted = tiny(name, batches=kept, **options)
    assert equal(model, given)
    assert report.blocks == tuple(
        block.__class__(**{**vars(block), "seconds": found.seconds, "peak_memory": found.peak_memory})
        for block, found in zip(wanted.blocks, report.blocks, strict=True)
    )
    assert report.blocks[0].num_samples == 24
    assert not equal(model, tiny(name, **{**options, "samples_per_round": 8})[0])


def test_the_hidden_states_behind_the_blocks_are_the_models(monkeypatch):
    from wandazeta.callbacks.pruning import pruner

    seen = []

    def noted(rows, copies, blocks, forward, run_blocks, *args, **kwargs):
        seen.append((rows, run_blocks(rows)))
        return list(rows)

    monkeypatch.setattr(pruner, "with_resampled", noted)
    with pytest.raises(PruningInterrupted):
        tiny(resampled_copies=1, run={"should_stop": lambda: True})
    rows, behind = seen[0]
    model = build("llama")[0]
    with torch.no_grad():
        for row, hidden in zip(rows, behind, strict=True):
            assert torch.equal(model.lm_head(model.model.norm(hidden)), model(**row).logits)


@pytest.mark.parametrize("stop", [0, 1])
def test_resumed_is_bit_identical(stop):
    undisturbed, _, _ = tiny(resampled_copies=2, target="dense_stream")
    progress, asked = Memory(), []

    def should_stop():
        asked.append(1)
        return len(asked) == stop + 1

    with pytest.raises(PruningInterrupted):
        tiny(resampled_copies=2, target="dense_stream", run={"progress": progress, "should_stop": should_stop})
    resumed, _, _ = tiny(resampled_copies=2, target="dense_stream", run={"progress": progress})
    assert equal(resumed, undisturbed)


def test_batches_and_logits_of_any_form():
    model, blocks = build("llama")
    rows = [row["input_ids"] for row in long_rows()]
    wanted = resample(model, blocks, rows, forward=lambda row: model(row))
    assert all(isinstance(row, torch.Tensor) and row.shape == (1, 48) for row in wanted)
    for kind in (list, tuple):
        packed = [kind([row, "more"]) for row in rows]
        found = resample(model, blocks, packed, forward=lambda row: model(row[0]))
        assert all(type(row) is kind and row[1] == "more" for row in found)
        assert all(torch.equal(row[0], bare) for row, bare in zip(found, wanted, strict=True))
    for form in (lambda logits: logits, lambda logits: (logits, None)):
        found = resample(model, blocks, rows, forward=lambda row, form=form: form(model(row).logits))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda model, row: model(**row).logits.mean(), r"a tensor of shape \(\)"),
        (lambda model, row: model(**row).logits[:, -1], r"a tensor of shape \(1, 32\)"),
        (lambda model, row: SimpleNamespace(loss=model(**row).logits.mean()), "SimpleNamespace"),
    ],
)
def test_what_predicts_no_tokens_is_refused_before_the_blocks_run(forward, found):
    model, blocks = build("llama")

    def run_blocks(rows):
        raise AssertionError("too late")

    with torch.no_grad(), pytest.raises(ValueError, match=f"logits.*`resampled_copies`, but got {found}"):
        with_resampled(
            long_rows(), 1, model.get_submodule(blocks), lambda row: forward(model, row), run_blocks, None, seed=0
        )


def test_samples_that_are_no_tokens_are_refused():
    layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])
    rows = [torch.randn(1, 4, 8)]
    with pytest.raises(ValueError, match=r"batches of tokens.*`resampled_copies`, but got Tensor"):
        with_resampled(rows, 1, layers, lambda row: layers[1](layers[0](row)), lambda rows: [], None, seed=0)


def test_too_few_samples_with_their_copies_are_refused():
    with pytest.raises(ValueError, match=r"samples_per_round.*\(24\), but got 25"):
        prune(build("llama")[0], token_batches(8), resampled_copies=2, samples_per_round=25)


def test_only_optimisation_has_copies():
    for method in ("wanda", "sparsegpt", "rgs", "magnitude"):
        assert equal(tiny(method=method, resampled_copies=2)[0], tiny(method=method)[0]), method
