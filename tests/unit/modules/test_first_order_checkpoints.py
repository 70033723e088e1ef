from functools import partial

import pytest
import torch
from helpers.causal_lms import classification_batch, save_tiny_lm, step_loader
from helpers.first_order import fit, prune
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR, PolynomialLR

from wandazeta.adapters import PeftLoRA, Weights
from wandazeta.modules import FirstOrderModule

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pruned_dir(tmp_path_factory):
    return prune(save_tiny_lm(tmp_path_factory.mktemp("pruned")))


def test_lora_checkpoints_hold_adapters_only_and_resume_to_the_same_bits(model_dir, tmp_path):
    _, whole = fit(model_dir, tmp_path / "whole", steps=6)
    fit(model_dir, tmp_path / "parts", steps=4, save=True)
    _, resumed = fit(model_dir, tmp_path / "parts", steps=6, save=True, resume=True)
    for name in whole.adapter_names:
        assert torch.equal(resumed.get_parameter(name), whole.get_parameter(name))
    content = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)
    assert set(content["state_dict"]) == whole.adapter_names
    # elsewhere, for evaluation
    fresh = FirstOrderModule(str(model_dir), trainable=PeftLoRA(2))
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
        fresh,
        step_loader(classification_batch(20), 4, None),
        ckpt_path=tmp_path / "parts" / "last.ckpt",
        verbose=False,
    )
    assert all(torch.equal(fresh.get_parameter(name), whole.get_parameter(name)) for name in whole.adapter_names)


def test_full_checkpoints_hold_everything(model_dir, tmp_path):
    _, whole = fit(model_dir, tmp_path / "whole", steps=6, trainable=Weights())
    fit(model_dir, tmp_path / "parts", steps=4, save=True, trainable=Weights())
    _, resumed = fit(model_dir, tmp_path / "parts", steps=6, save=True, resume=True, trainable=Weights())
    for name, weight in whole.named_parameters():
        assert torch.equal(resumed.get_parameter(name), weight), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable": Weights()}, "`trainable` differs: saved PeftLoRA, here Weights"),
        ({"trainable": PeftLoRA(4)}, "`rank`"),
        ({"trainable": PeftLoRA(2, 4)}, "`alpha`"),
        ({"trainable": PeftLoRA(2, target_modules=["q_proj"])}, "`target_modules`"),
        ({"directory": "pruned"}, "the backbone that was trained on"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(model_dir, pruned_dir, tmp_path, change, message):
    fit(model_dir, tmp_path, steps=2, save=True)
    directory = pruned_dir if change.pop("directory", None) else model_dir
    with pytest.raises(ValueError, match=message):
        fit(directory, tmp_path, steps=4, save=True, resume=True, **change)


def test_full_training_does_not_go_on_from_the_weights_of_another_model(model_dir, pruned_dir, tmp_path):
    fit(model_dir, tmp_path, steps=2, save=True, trainable=Weights())
    with pytest.raises(ValueError, match="the backbone that was trained on"):
        fit(pruned_dir, tmp_path, steps=4, save=True, resume=True, trainable=Weights())
    # whose weights all come from the file
    loaded = FirstOrderModule.load_from_checkpoint(
        tmp_path / "last.ckpt", model_name_or_path=str(pruned_dir), trainable=Weights(), weights_only=False
    )
    _, trained = fit(model_dir, tmp_path / "again", steps=2, trainable=Weights())
    assert all(torch.equal(loaded.get_parameter(name), weight) for name, weight in trained.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-2}, "`learning_rate` differs: saved 0.01, here 0.02"),
        ({"weight_decay": 0.1}, "`weight_decay`"),
        ({"lr_scheduler": partial(PolynomialLR, total_iters=8)}, r"`lr_scheduler` .*total_iters=4.*total_iters=8"),
        ({"lr_scheduler": None}, "`lr_scheduler`"),
    ],
)
def test_what_a_checkpoint_would_bring_back_of_the_rates_cannot_be_changed(model_dir, tmp_path, change, message):
    given = {"lr_scheduler": partial(PolynomialLR, total_iters=4)}
    _, module = fit(model_dir, tmp_path, steps=2, save=True, **given)
    with pytest.raises(ValueError, match=message):
        fit(model_dir, tmp_path, steps=4, save=True, resume=True, **given | change)
    # without training they do not matter
    fresh = FirstOrderModule(str(model_dir), trainable=PeftLoRA(2), seed=3, **{"learning_rate": 1e-2} | given | change)
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
        fresh, step_loader(classification_batch(20), 4, None), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert all(torch.equal(fresh.get_parameter(name), module.get_parameter(name)) for name in module.adapter_names)


def test_a_scheduler_may_have_an_argument_for_each_group(model_dir, tmp_path):
    given = partial(LambdaLR, lr_lambda=[lambda step: 1.0, lambda step: 0.5])  # of matrices, and of the rest
    fit(model_dir, tmp_path, steps=2, save=True, trainable=Weights(), lr_scheduler=given)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["first_order"]["lr_scheduler"] == "LambdaLR()"
    assert saved["lr_schedulers"][0]["base_lrs"] == [0.01, 0.01]
