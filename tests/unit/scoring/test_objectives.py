import pytest
import torch
from helpers.causal_lms import classification_batch, save_tiny_lm, text_batch
from helpers.encoders import labelled_batch, save_tiny_encoder
from helpers.zo_run import train, trainable_of
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.text import CharErrorRate

from wandazeta.adapters import Weights
from wandazeta.modules import ZerothOrderModule
from wandazeta.scoring.objectives import ExactText, GeneratedText, objective_losses
from wandazeta.zeroth_order import ForwardMode, TwoSided, direction


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("model"))


def ready(directory, **options):
    options = {"estimator": TwoSided(0.1), "trainable": trainable_of(options)} | options
    module = ZerothOrderModule(str(directory), **options)
    module.setup("test")
    return module


def copies(module, num, scale=0.3):
    generator = torch.Generator().manual_seed(1)
    return module.adapters.theta + scale * torch.randn(num, module.adapters.num_parameters, generator=generator)


def scores_of(module, thetas, batch):
    """One vector at a time, stored."""
    scores = []
    for theta in thetas:
        module.adapters.theta.copy_(theta)
        scores.append(module.scorer.option_scores(module.scorer.prepare(batch)).values[0])
    return scores


def macro_f1(predicted, labels, num_classes):
    values = []
    for c in range(num_classes):
        hits = ((predicted == c) & (labels == c)).sum()
        values.append(2 * hits / ((predicted == c).sum() + (labels == c).sum()))
    return sum(values) / num_classes


@pytest.mark.parametrize("chunk", [1, 5])
def test_metrics_of_the_scores_are_those_of_every_copy(model_dir, chunk):
    options = ((7,), (9,), (11,))
    batch = classification_batch(24, options=options)
    thetas = copies(ready(model_dir), 5)
    accuracy = ready(model_dir, objective=MulticlassAccuracy(num_classes=3, average="micro"))
    f1 = ready(model_dir, objective=MulticlassF1Score(num_classes=3, average="macro"))
    with torch.no_grad():
        predicted = [s.argmax(1) for s in scores_of(ready(model_dir), thetas, batch)]
        found = [
            torch.cat([module.losses(part, module.scorer.prepare(batch)) for part in thetas.split(chunk)])
            for module in (accuracy, f1)
        ]
    shares = torch.stack([(p == batch["label"]).double().mean() for p in predicted])
    assert len(set(shares.tolist())) > 1
    torch.testing.assert_close(found[0], 1 - shares, atol=1e-6, rtol=0)
    expected = torch.stack([macro_f1(p, batch["label"], 3) for p in predicted])
    torch.testing.assert_close(found[1], 1 - expected.double(), atol=1e-6, rtol=0)


def greedy(module, prompt, num_tokens):
    """The whole unpadded sequence for every token, no cache."""
    ids = prompt
    for _ in range(num_tokens):
        ids = torch.cat([ids, module.backbone(ids[None]).logits[0, -1].argmax()[None]])
    return ids[len(prompt) :]


@pytest.mark.parametrize("options", [((7,), (9,)), ((7, 11), (9,), (13, 17, 19))], ids=["single", "several"])
def test_generated_text_is_that_of_every_copy(model_dir, options):
    batch = classification_batch(6, options=options)
    module = ready(model_dir, objective=GeneratedText(CharErrorRate(), max_new_tokens=3))
    assert module.scorer.prefix is None
    thetas, stored = copies(module, 4), module.adapters.theta.clone()
    with torch.no_grad():
        losses = module.losses(thetas, module.scorer.prepare(batch))
        assert torch.equal(module.adapters.theta, stored)
        expected = []
        for theta in thetas:
            module.adapters.theta.copy_(theta)
            texts = [
                module.tokenizer.decode(greedy(module, ids[mask.bool()], 3), skip_special_tokens=True)
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
            right = [module.tokenizer.decode(list(options[label])) for label in batch["label"]]
            expected.append(CharErrorRate()(texts, right).double())
    assert len({float(x) for x in expected}) > 1
    torch.testing.assert_close(losses, torch.stack(expected))


def test_exact_match_of_generated_text(model_dir):
    batch = classification_batch(6)
    module = ready(model_dir, prefix_cache_gib=0)
    with torch.no_grad():
        first = [
            int(greedy(module, ids[mask.bool()], 1))
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        # the first example's continuation is one of the options, of every second example the right one
        batch["option_ids"] = torch.tensor([[first[0]], [first[0] + 1]])
        module.objective = GeneratedText()
        loss = module.losses(module.adapters.theta[None], module.scorer.prepare(batch))
    right = [token == int(batch["option_ids"][label]) for token, label in zip(first, batch["label"], strict=True)]
    assert loss.item() == pytest.approx(1 - sum(right) / 6, abs=1e-6)
    assert sum(right) > 0


def test_moved_weights_have_a_metric_each(model_dir):
    batch = classification_batch(6)
    for objective in (MulticlassAccuracy(num_classes=2, average="micro"), GeneratedText(CharErrorRate())):
        module = ready(model_dir, trainable=Weights(), objective=objective)
        module.adapters.start_step(0, 0, 2, direction)
        points = torch.tensor([[0.3, 0.0], [0.0, -0.3], [0.0, 0.0]])
        with torch.no_grad():
            prepared = module.scorer.prepare(batch)
            losses = module.losses(points, prepared)
            for point, loss in zip(points, losses, strict=True):
                moved = ready(model_dir, trainable=Weights(), objective=objective)
                moved.adapters.start_step(0, 0, 2, direction)
                moved.adapters.apply_update(point, 0.0, [], [])
                expected = objective_losses(objective, moved.scorer, prepared, 1, moved.tokenizer)
                assert loss == expected[0]


def test_training_raises_a_metric_without_a_gradient(tmp_path):
    directory = save_tiny_encoder(tmp_path / "model")
    _, module, recorder = train(
        directory,
        tmp_path,
        steps=100,
        queries=8,
        batch=labelled_batch(24),
        batch_size=24,
        loading={"num_classes": 3},
        objective=MulticlassAccuracy(num_classes=3, average="micro"),
        estimator=TwoSided(0.1),
        learning_rate=0.1,
        query_chunk_size=8,
    )
    losses = [recorder.steps[step]["loss"] for step in range(1, 101)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert module.objective._update_count == 0


def test_a_step_follows_the_metric(model_dir, tmp_path):
    objective = MulticlassAccuracy(num_classes=2, average="micro")
    settings = {"steps": 1, "num_examples": 16, "batch_size": 16, "queries": 3, "estimator": TwoSided(0.3), "seed": 5}
    _, module, _ = train(model_dir, tmp_path, objective=objective, **settings)
    plain, batch = ready(model_dir, seed=5), classification_batch(16)
    theta = plain.adapters.theta.clone()
    gradient = torch.zeros_like(theta)
    with torch.no_grad():
        for query in range(3):
            z = direction(5, 0, query, theta.numel())
            sides = scores_of(plain, (theta + 0.3 * z, theta - 0.3 * z), batch)
            plus, minus = (1 - (s.argmax(1) == batch["label"]).double().mean() for s in sides)
            gradient += (plus - minus).float() / 0.6 * z / 3
    assert gradient.any()
    torch.testing.assert_close(module.adapters.theta, theta - 3e-3 * gradient, atol=1e-6, rtol=1e-5)


def test_what_does_not_fit_is_refused(model_dir):
    with pytest.raises(ValueError, match="higher_is_better"):
        ready(model_dir, objective=MeanMetric())
    with pytest.raises(ValueError, match="`epsilon` of `estimator` to be set for the objective ExactText"):
        ready(model_dir, objective=GeneratedText(), estimator=TwoSided())
    with pytest.raises(ValueError, match="`estimator` to be TwoSided or OneSided for the objective"):
        ready(model_dir, objective=MulticlassAccuracy(num_classes=2), estimator=ForwardMode())
    with pytest.raises(ValueError, match="`max_new_tokens` to be at least 1"):
        GeneratedText(max_new_tokens=0)

    def losses(objective, batch):
        module = ready(model_dir, objective=objective)
        with torch.no_grad():
            module.losses(module.adapters.theta[None], module.scorer.prepare(batch))

    with pytest.raises(ValueError, match="running text"):
        losses(MulticlassAccuracy(num_classes=2), text_batch())
    with pytest.raises(ValueError, match="answer options"):
        losses(GeneratedText(), text_batch())
    sharded = ready(model_dir, objective=GeneratedText())
    next(sharded.backbone.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="the strategy shards them"):
        sharded.losses(sharded.adapters.theta[None], sharded.scorer.prepare(classification_batch()))
    with pytest.raises(ValueError, match="average='macro'"):
        losses(MulticlassAccuracy(num_classes=2, average="none"), classification_batch())


def test_exact_text_counts_over_batches():
    metric = ExactText()
    metric.update([" a", "b"], ["a", "c"])
    metric.update(["d "], ["d"])
    assert metric.compute() == pytest.approx(2 / 3)
