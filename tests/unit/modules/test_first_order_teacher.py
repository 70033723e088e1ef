"""`FirstOrderModule` with a teacher."""

import pytest
import torch
from helpers.causal_lms import save_tiny_lm, text_batch
from helpers.first_order import fit, prune
from helpers.tiny_model import save_tiny_llama
from lightning.pytorch import Callback

from wandazeta.adapters import Weights
from wandazeta.callbacks import KeepSparsity
from wandazeta.models.loading import LoadingOptions, load_backbone
from wandazeta.modules import FirstOrderModule


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_tiny_lm(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    return str(prune(save_tiny_lm(tmp_path_factory.mktemp("pruned"))))


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


def divergence(directory, teacher, module=None):
    """Mean divergence over the whole vocabulary and the tokens of the training data, written out."""
    batch = text_batch(20)
    student = load_backbone(directory).eval() if module is None else module.backbone.eval()
    with torch.no_grad():
        q, p = (model(**batch).logits.double().log_softmax(-1) for model in (student, load_backbone(teacher).eval()))
    return float(((p.exp() * (p - q)).sum(-1) * batch["attention_mask"]).sum() / batch["attention_mask"].sum())


def test_a_pruned_model_comes_closer_to_its_teacher_and_goes_on_to_the_same_bits(pruned, teacher, tmp_path):
    options = {"trainable": Weights(), "teacher": teacher, "text": True, "learning_rate": 3e-3}
    losses = Losses()
    _, whole = fit(pruned, tmp_path / "whole", KeepSparsity(), losses, steps=8, **options)
    before = divergence(pruned, teacher)
    assert divergence(pruned, teacher, whole) < 0.7 * before
    # of 20 texts each is run once in two epochs, and at the start the loss is nearly that over the whole vocabulary
    assert whole.teacher_targets.num_computed == 20
    assert 0.5 * before < losses.seen[0] < 1.5 * before
    fit(pruned, tmp_path / "parts", KeepSparsity(), steps=4, save=True, **options)
    _, resumed = fit(pruned, tmp_path / "parts", KeepSparsity(), steps=8, save=True, resume=True, **options)
    assert resumed.teacher_targets.num_computed == 4
    own = set(load_backbone(pruned).state_dict())
    for name, weight in whole.named_parameters():
        assert torch.equal(resumed.get_parameter(name), weight), name
        assert name.removeprefix("backbone.") in own
    content = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)
    assert {name.removeprefix("backbone.") for name in content["state_dict"]} == own
    assert not any(p.requires_grad for p in whole.teacher_targets.model.parameters())
    reference = load_backbone(teacher).state_dict()
    assert all(torch.equal(value, reference[name]) for name, value in whole.teacher_targets.model.state_dict().items())
    with pytest.raises(ValueError, match="`teacher` differs"):
        fit(pruned, tmp_path / "parts", steps=10, save=True, resume=True, **options | {"teacher": None})


def test_what_does_not_fit_is_refused_before_anything_is_loaded(pruned, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("wandazeta.modules.first_order.load_backbone", None)
    other = str(save_tiny_llama(tmp_path / "other", words=(" north", " south")))
    with pytest.raises(
        ValueError, match=r"`teacher` to be a model with the same tokens, but got .*differ; use the den"
    ):
        FirstOrderModule(pruned, trainable=Weights(), teacher=other)
    with pytest.raises(ValueError, match="`teacher` to be left out with `num_classes`"):
        FirstOrderModule(pruned, LoadingOptions(num_classes=2), trainable=Weights(), teacher=teacher)
    with pytest.raises(ValueError, match="`teacher` to be a model with its tokenizer"):
        FirstOrderModule(pruned, trainable=Weights(), teacher="no/such/model")
