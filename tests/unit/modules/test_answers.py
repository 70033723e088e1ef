"""Trained answers of a language model: their gradient against autograd, where they start, where they are kept."""

import pytest
import torch
from helpers.causal_lms import SIZES, classification_batch, save_tiny_lm, tiny_lm
from helpers.processes import run
from helpers.zo_run import components, train
from torch import nn
from torch.nn import functional as F

from wandazeta.adapters import LoRAAdapters, TensorTrainAdapters, Weights
from wandazeta.adapters.files import load_adapters
from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import LanguageModel, ZerothOrderModule
from wandazeta.zeroth_order import OneSided, TrainedHead

OPTIONS = ((7,), (9,), (11,))
WIDTH, NUM = SIZES["hidden_size"], len(OPTIONS)
OWN = NUM * (WIDTH + 1)
EXACT = {"estimator": ["OneSided", {}], "head": {"num_answers": NUM, "gradient": "exact"}}


def examples(num=4, options=OPTIONS):
    return classification_batch(num, options)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(save_tiny_lm(tmp_path_factory.mktemp("model")))


def scores(model, ids, options):
    """Mean log-probabilities of the options after a prompt, by plain forwards; of one token, logits do as well."""
    found = []
    for option in options:
        tokens = torch.tensor([*ids, *option])
        logprobs = model(tokens[None]).logits[0].log_softmax(-1)
        found.append(sum(logprobs[len(ids) - 1 + i, token] for i, token in enumerate(option)) / len(option))
    return torch.stack(found)


def answers_gradient(model, batch, options):
    """Autograd's on the plain model, one unpadded prompt at a time."""
    results, added = [], nn.Linear(WIDTH, NUM)
    nn.init.zeros_(added.weight)
    nn.init.zeros_(added.bias)
    states = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        prompt = ids[mask.bool()].tolist()
        with torch.no_grad():
            own = scores(model, prompt, options)
        results.append(own + added(states[-1][0, len(prompt) - 1]))
    F.cross_entropy(torch.stack(results), batch["label"]).backward()
    return torch.cat([added.weight.grad.flatten(), added.bias.grad])


@pytest.mark.parametrize("aggregation", ["mean", "fzoo"])
@pytest.mark.parametrize(
    ("kind", "options", "prefix_cache_gib"),
    [
        ("llama", OPTIONS, 4.0),
        ("llama", OPTIONS, 0),
        ("llama", ((9, 3), (7,), (11, 4, 5)), 4.0),
        # scales its logits, caps them, has a head with a bias
        ("granite", OPTIONS, 4.0),
        ("gemma2", OPTIONS, 4.0),
        ("phi", OPTIONS, 4.0),
    ],
)
def test_first_step_moves_them_by_the_gradient_of_autograd(tmp_path, kind, options, prefix_cache_gib, aggregation):
    batch = examples(options=options)
    chosen = EXACT | {"estimator": OneSided(aggregation=aggregation), "identity_start": True, "queries": 2}
    chosen |= {
        "prefix_cache_gib": prefix_cache_gib,
        "adapter_layers": "last:1",
        "query_chunk_size": 4,
        "batch": batch,
        "batch_size": 4,
    }
    _, module, _ = train(save_tiny_lm(tmp_path / "model", kind), tmp_path, steps=1, **chosen)
    expected = -3e-3 * answers_gradient(tiny_lm(kind), batch, options)
    torch.testing.assert_close(module.adapters.theta[-OWN:], expected, atol=1e-7, rtol=1e-3)
    assert expected.norm() > 1e-4


def test_training_begins_with_the_prompts_own_answers(model_dir):
    batch, plain = examples(), LanguageModel(model_dir)
    module = ZerothOrderModule(model_dir, head=TrainedHead(NUM))
    module.setup("test")
    expected = plain.predict_step(batch, 0)["scores"]
    torch.testing.assert_close(module.predict_step(batch, 0)["scores"], expected, atol=1e-5, rtol=1e-5)
    module.adapters.theta[-NUM:] = torch.tensor([1.0, 2.0, 3.0])
    moved = module.predict_step(batch, 0)["scores"] - expected
    torch.testing.assert_close(moved, moved.new_tensor([1.0, 2.0, 3.0]).expand_as(moved), atol=1e-5, rtol=1e-5)


def test_learns_faster_than_by_estimates_and_than_without(model_dir, tmp_path):
    chosen = {"batch": examples(12), "batch_size": 6, "steps": 30, "learning_rate": 3e-2, "estimator": OneSided()}
    losses = {}
    for kind, options in {
        "none": {},
        "estimated": {"head": TrainedHead(NUM)},
        "exact": {"head": TrainedHead(NUM, "exact")},
    }.items():
        losses[kind] = train(model_dir, tmp_path / kind, **chosen, **options)[2].steps[30]["loss"]
    assert losses["exact"] < 0.6 * losses["estimated"]
    assert losses["exact"] < 0.6 * losses["none"]


@pytest.mark.parametrize("copies", [1, 3, 8])
def test_any_number_of_copies_in_a_forward_is_the_same_step(model_dir, tmp_path, copies):
    chosen = EXACT | {"batch": examples(), "batch_size": 4, "steps": 2, "queries": 3}
    one, other = (
        train(model_dir, tmp_path / str(size), query_chunk_size=size, **chosen)[1].adapters.theta
        for size in (16, copies)
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_two_ranks_train_as_one_and_a_checkpoint_goes_on(model_dir, tmp_path):
    settings = EXACT | {
        "head": {"num_answers": 2, "gradient": "exact"},
        "model_dir": model_dir,
        "steps": 4,
        "queries": 3,
        "save_every": 2,
    }
    (alone,) = run("zo_run", settings, tmp_path / "alone")
    for rank in run("zo_run", settings | {"devices": 2, "strategy": "ddp"}, tmp_path / "two"):
        assert torch.equal(rank["theta"], alone["theta"])
    run("zo_run", settings | {"steps": 2}, tmp_path / "stopped")
    (resumed,) = run("zo_run", settings | {"resume": True}, tmp_path / "stopped")
    assert min(resumed["steps"]) == 3
    assert torch.equal(resumed["theta"], alone["theta"])


def test_a_sharded_model_trains_them_as_a_whole_one(model_dir, tmp_path):
    pytest.importorskip("deepspeed")
    settings = EXACT | {
        "head": {"num_answers": 2, "gradient": "exact"},
        "model_dir": model_dir,
        "steps": 3,
        "queries": 3,
        "query_chunk_size": 16,
    }
    (alone,) = run("zo_run", settings, tmp_path / "alone")
    chosen = {"strategy": {"stage": 3}, "devices": 2, "loading": {"shard_on_load": True}}
    for rank in run("zo_run", settings | chosen, tmp_path / "shares"):
        torch.testing.assert_close(rank["theta"], alone["theta"], atol=2e-4, rtol=1e-3)


def test_they_are_exported_and_loaded_where_there_is_a_place_for_them(model_dir, tmp_path, monkeypatch):
    batch = examples()
    _, module, _ = train(model_dir, tmp_path / "run", steps=2, batch=batch, **EXACT)
    module.save_adapters(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert f"num_answers={NUM}" in code
    scope = {}
    monkeypatch.chdir(tmp_path / "saved")
    exec(code, scope)
    assert torch.equal(scope["model"].adapters.theta, module.adapters.theta)
    options = {"head": TrainedHead(NUM), "trainable": TensorTrainAdapters(rank=2, bottleneck=8)}
    other = ZerothOrderModule(model_dir, **options)
    other.load_adapters(tmp_path / "saved")
    torch.testing.assert_close(other.predict_step(batch, 0), module.predict_step(batch, 0))
    with pytest.raises(ValueError, match=r"ZerothOrderModule\.load_adapters"):
        load_adapters(tiny_lm(), tmp_path / "saved")
    with pytest.raises(ValueError, match="num_answers"):
        ZerothOrderModule(model_dir, trainable=options["trainable"]).load_adapters(tmp_path / "saved")


def test_another_number_of_options_is_refused_in_the_first_step(model_dir, tmp_path):
    with pytest.raises(ValueError, match="`num_answers` = 3 options, but got 2"):
        train(model_dir, tmp_path, steps=1, batch=examples(options=((7,), (9,))), **EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loading": LoadingOptions(num_classes=3)}, "either `num_classes`"),
        ({"trainable": LoRAAdapters()}, "TensorTrainAdapters"),
        ({"trainable": Weights(), "head": TrainedHead(NUM)}, "TensorTrainAdapters"),
    ],
)
def test_what_does_not_go_together_is_refused_before_loading(change, message):
    with pytest.raises(ValueError, match=message):
        ZerothOrderModule("nowhere/at/all", **components(EXACT | change))
