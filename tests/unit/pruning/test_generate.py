"""Samples that the dense model writes."""

import copy

import pytest
import torch
from helpers.architectures import build, token_batches
from helpers.prune_model import Memory, equal, prune, tiny
from helpers.pruning import Tiny, Writer, callback, loader, trainer
from torch import nn

from wandazeta.models.streaming import StoredTensor, back_by_file
from wandazeta.pruning import generate
from wandazeta.pruning.generate import find_writer, with_tokens, write_copies
from wandazeta.pruning.pruner import PruningInterrupted
from wandazeta.pruning.samples import split_rows

CPU = torch.device("cpu")


def long_rows(count=4, tokens=48):
    ids = torch.randint(1, 32, (count, tokens), generator=torch.Generator().manual_seed(1))
    return split_rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def write(model, rows, copies=3, masks=None, seed=0, **more):
    return write_copies(model, rows, masks or [None] * len(rows), copies, seed=seed, device=CPU, **more)


def test_a_sure_model_goes_on_with_the_likeliest_tokens_from_places_of_the_sample():
    model, _ = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)  # a draw is the likeliest token
    rows = long_rows()
    written = write(model, rows)
    assert len(written) == 12
    for place, text in enumerate(written):
        assert text.shape == (1, 48)
        start = (48 - 12) * (place // 4) // 3
        assert torch.equal(text[0, :12], rows[place % 4]["input_ids"][0, start : start + 12])
        with torch.no_grad():
            likeliest = model(input_ids=text).logits[0].argmax(-1)
        assert torch.equal(text[0, 12:], likeliest[11:-1])


def test_draws_have_the_models_probabilities():
    model, _ = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(30.0)
    model.generation_config.temperature = 0.1  # the model's own settings are not those of its text
    model.generation_config.eos_token_id = 5
    row = long_rows(1, 4)
    with torch.no_grad():
        wanted = model(input_ids=row[0]["input_ids"][:, :1]).logits[0, 0].softmax(-1)
    tokens = torch.cat([write(model, row, copies=1, seed=seed)[0] for seed in range(1500)])[:, 1]
    share = torch.bincount(tokens, minlength=32) / len(tokens)
    assert (share - wanted).abs().max() < 0.06
    assert 0.1 < wanted.max() < 0.9, "sure or even would not tell"


def test_padding_stays_and_so_do_the_samples_and_the_model():
    model, _ = build("llama")
    before = copy.deepcopy(model)
    rows = long_rows(2)
    masks = [torch.ones(1, 48, dtype=torch.bool), torch.ones(1, 48, dtype=torch.bool)]
    masks[1][:, :20] = False
    texts = [row["input_ids"].clone() for row in rows]
    written = write(model, rows, masks=masks, dtype=torch.bfloat16)
    for place, text in enumerate(written):
        padding = ~masks[place % 2]
        assert torch.equal(text[padding], texts[place % 2][padding])
        assert not torch.equal(text, texts[place % 2])
    assert all(torch.equal(row["input_ids"], text) for row, text in zip(rows, texts, strict=True))
    assert equal(model, before)


def test_a_sample_too_short_to_begin_with_is_used_again():
    rows = long_rows(2, 3)
    assert [text.tolist() for text in write(build("llama")[0], rows, copies=1)] == [
        r["input_ids"].tolist() for r in rows
    ]


def test_seeds_decide_and_global_generators_do_not():
    model, rows = build("llama")[0], long_rows()
    state = torch.get_rng_state()
    first = torch.cat(write(model, rows))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(torch.cat(write(model, rows)), first)
    assert not torch.equal(torch.cat(write(model, rows, seed=1)), first)


def test_batches_of_any_form(monkeypatch):
    monkeypatch.setattr(generate, "ROWS_AT_ONCE", 2)
    model = build("llama")[0]
    bare = [row["input_ids"] for row in long_rows()]
    wanted = write(model, bare)
    for kind in (list, tuple):
        packed = [kind([row, "more"]) for row in bare]
        assert torch.equal(torch.cat(write(model, packed)), torch.cat(wanted))
        changed = with_tokens(packed[0], wanted[0])
        assert type(changed) is kind
        assert changed[0] is wanted[0]
        assert changed[1] == "more"

    class Encoding(dict):
        kept = "attribute"

    changed = with_tokens(Encoding(input_ids=bare[0]), wanted[0])
    assert changed.kept == "attribute"
    assert changed["input_ids"] is wanted[0]
    assert with_tokens(bare[0], wanted[0]) is wanted[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "gemma2"])
def test_pruned_as_with_the_copies_given(name):
    memory = Memory()
    options = {"samples_per_round": 24, "target": "dense_stream", "learning_rate": 1e-2}
    batches = [{key: value.repeat(1, 3) for key, value in batch.items()} for batch in token_batches(8)]
    model, _, report = tiny(name, batches=batches, generated_copies=2, run={"progress": memory}, **options)
    assert report.blocks[0].num_samples == 24
    rows = [row for batch in batches for row in split_rows(batch)]
    texts = [{**rows[place % 8], "input_ids": text} for place, text in enumerate(memory.texts)]
    given, _, _ = tiny(name, batches=rows + texts, **options)
    assert equal(model, given)
    assert not equal(model, tiny(name, batches=batches, **{**options, "samples_per_round": 8})[0])


@pytest.mark.parametrize("stop", [0, 1])
def test_resumed_is_bit_identical_and_writes_nothing_again(stop, monkeypatch):
    options = {"generated_copies": 2, "target": "dense_stream"}
    undisturbed, _, _ = tiny(**options)
    progress, asked = Memory(), []

    def should_stop():
        asked.append(1)
        return len(asked) == stop + 1

    with pytest.raises(PruningInterrupted):
        tiny(**options, run={"progress": progress, "should_stop": should_stop})
    monkeypatch.setattr("wandazeta.pruning.pruner.write_copies", None)
    resumed, _, _ = tiny(**options, run={"progress": progress})
    assert equal(resumed, undisturbed)


def test_only_optimisation_has_copies():
    for method in ("wanda", "sparsegpt", "rgs", "magnitude"):
        assert equal(tiny(method=method, generated_copies=2)[0], tiny(method=method)[0]), method


@pytest.mark.parametrize("damage", ["none", "truncated", "another pruning's"])
def test_the_folder_keeps_them(tmp_path, damage, monkeypatch):
    options = {"method": "ro", "generated_copies": 2, "learning_rate": 1e-2}
    for seed in (0, 1):
        trainer(callback(tmp_path / str(seed), seed=seed, **options)).fit(Writer(), loader())
    file = tmp_path / "0" / "generated.safetensors"
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-3])
    elif damage == "another pruning's":
        file.write_bytes((tmp_path / "1" / "generated.safetensors").read_bytes())
    else:
        monkeypatch.setattr("wandazeta.pruning.pruner.write_copies", None)
    kept = (tmp_path / "0" / "block_0002.safetensors").read_bytes()
    (tmp_path / "0" / "block_0002.safetensors").unlink()
    trainer(callback(tmp_path / "0", seed=0, **options)).fit(Writer(), loader())
    assert file.read_bytes() == content
    assert (tmp_path / "0" / "block_0002.safetensors").read_bytes() == kept


def test_another_head_would_write_other_text(tmp_path):
    options = {"method": "ro", "generated_copies": 1}
    trainer(callback(tmp_path, **options)).fit(Writer(), loader())
    module = Writer()
    nn.init.ones_(module.head.weight)
    with pytest.raises(ValueError, match=r"1 of \d+ model tensors, first `head\.weight`"):
        trainer(callback(tmp_path, **options)).fit(module, loader())


def test_models_that_write_no_text_are_refused(tmp_path):
    module = Tiny()
    with pytest.raises(ValueError, match=r"language model of transformers.*`generated_copies`, but Tiny has none"):
        trainer(callback(tmp_path, generated_copies=1)).fit(module, loader())
    assert all((layer.up.weight != 0).all() for layer in module.layers)
    with pytest.raises(ValueError, match="BertForMaskedLM has none"):
        tiny("bert", generated_copies=1)


def test_streamed_models_are_refused(tmp_path):
    model, blocks = build("llama")
    weight = nn.Parameter(torch.empty(16, 16, device="meta"))
    model.model.layers[1].self_attn.q_proj.weight = back_by_file(weight, StoredTensor(tmp_path / "file", "weight"))
    with pytest.raises(ValueError, match=r"whole in memory for `generated_copies`"):
        find_writer(model, model.get_submodule(blocks))


def test_samples_that_are_no_tokens_are_refused():
    with pytest.raises(ValueError, match=r"batches of tokens.*`generated_copies`, but got Tensor"):
        write(build("llama")[0], [torch.randn(1, 4, 8)])


def test_too_few_samples_with_their_copies_are_refused():
    with pytest.raises(ValueError, match=r"samples_per_round.*\(24\), but got 25"):
        prune(build("llama")[0], token_batches(8), generated_copies=2, samples_per_round=25)
