"""One call to prune a model and one to measure it."""

import pytest
import torch
from helpers.causal_lms import save_tiny_lm, tiny_lm
from helpers.tokenizer import byte_tokenizer
from torch.nn import functional as F

import wandazeta
from wandazeta.pruning import Wanda, WandaPP

TEXTS = [f"document {index} says {'something ' * (index % 3 + 1)}" for index in range(40)]


def pruned_layers(model):
    return [weight for name, weight in model.named_parameters() if "layers" in name and weight.ndim == 2]


def test_a_model_in_memory_is_pruned_in_place():
    model = tiny_lm()
    pruned, report = wandazeta.prune(
        model, byte_tokenizer(), TEXTS, method="wanda", num_samples=8, sequence_length=16, device="cpu"
    )
    assert pruned is model
    assert report.sparsity == 0.5
    assert report.num_samples == 8
    for weight in pruned_layers(model):
        groups = (weight.reshape(-1, 4) != 0).sum(1)
        assert bool((groups == 2).all())


def test_all_windows_are_used_where_the_texts_fill_fewer():
    _, report = wandazeta.prune(tiny_lm(), byte_tokenizer(), TEXTS[:3], sequence_length=16, method=WandaPP())
    assert 0 < report.num_samples < 128


def test_a_model_by_its_directory_in_a_folder_is_pruned_once(tmp_path, caplog):
    directory = str(save_tiny_lm(tmp_path / "model"))
    options = {"method": Wanda(), "num_samples": 4, "sequence_length": 16, "folder": tmp_path / "pruning"}
    first, report = wandazeta.prune(directory, None, TEXTS, **options)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pruning").iterdir()}
    second, again = wandazeta.prune(directory, None, iter(TEXTS), **options)
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pruning").iterdir()}
    assert again == report
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="holds another one: it differs in"):
        wandazeta.prune(directory, None, TEXTS, **options | {"pattern": "1:4"})


def test_an_unstructured_pattern_and_layers_that_stay_dense():
    model = tiny_lm()
    _, report = wandazeta.prune(
        model,
        byte_tokenizer(),
        TEXTS,
        pattern="unstructured",
        sparsity=0.25,
        method="magnitude",
        exclude_modules=["mlp.down_proj"],
    )
    assert abs(report.sparsity - 0.25) < 0.01
    dense = [weight for name, weight in model.named_parameters() if "down_proj" in name]
    assert all(bool((weight != 0).all()) for weight in dense)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_perplexity_is_that_of_the_models_own_logits(batch_size):
    model, tokenizer = tiny_lm(), byte_tokenizer()
    tokens = torch.tensor(tokenizer("".join(text + "\n\n" for text in TEXTS), add_special_tokens=False)["input_ids"])
    windows = tokens[: len(tokens) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp()
    found = wandazeta.evaluate(model, tokenizer, TEXTS, sequence_length=16, batch_size=batch_size, device="cpu")
    assert found.perplexity == pytest.approx(float(expected), rel=1e-5)
    assert (found.num_tokens, found.sequence_length) == (windows[:, 1:].numel(), 16)
    assert not found.starts_with_bos
    assert wandazeta.evaluate(model, byte_tokenizer(bos=True), TEXTS, sequence_length=16).starts_with_bos


def test_evaluation_leaves_the_model_in_its_mode():
    model = tiny_lm().train()
    wandazeta.evaluate(model, byte_tokenizer(), TEXTS, sequence_length=16)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "wander"}, "`method`"),
        ({"pattern": "4:2"}, "`sparsity_pattern`"),
        ({"num_samples": 0}, "`num_samples`"),
        ({"device": "tpu:7"}, "`device`"),
        ({"sequence_length": 10**6}, "`sequence_length`"),
    ],
)
def test_bad_arguments_are_named_before_any_work(options, message):
    model = tiny_lm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        wandazeta.prune(model, byte_tokenizer(), TEXTS, **{"sequence_length": 16} | options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_a_name_needs_a_tokenizer():
    with pytest.raises(ValueError, match="`tokenizer`"):
        wandazeta.prune(tiny_lm(), None, TEXTS)
