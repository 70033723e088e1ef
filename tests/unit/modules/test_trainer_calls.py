"""The modules under the trainer: any order of its calls, several loaders, its precision and its options."""

import pytest
from helpers.causal_lms import classification_batch, collate, rows_of, save_tiny_lm, text_batch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from wandazeta.adapters import PeftLoRA, TensorTrainAdapters, Weights
from wandazeta.modules import FirstOrderModule, LanguageModel, ZerothOrderModule
from wandazeta.zeroth_order import ForwardMode


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("model"))


def loader(batch, batch_size=4):
    return DataLoader(rows_of(batch), batch_size=batch_size, collate_fn=collate)


def trainer(tmp_path, **options):
    defaults = {"max_steps": 2, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults |= {"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path, "enable_checkpointing": False}
    return Trainer(**(defaults | options))


MODULES = {
    "language_model": LanguageModel,
    "zeroth_order": ZerothOrderModule,
    "last_block": lambda path: ZerothOrderModule(path, trainable=TensorTrainAdapters(rank=2, layers="last:1")),
    "forward_mode": lambda path: ZerothOrderModule(path, estimator=ForwardMode()),
    "mezo": lambda path: ZerothOrderModule(path, trainable=Weights()),
    "lora": lambda path: FirstOrderModule(path, trainable=PeftLoRA(2)),
    "tensor_train": lambda path: FirstOrderModule(path, trainable=TensorTrainAdapters(rank=2)),
    "weights": lambda path: FirstOrderModule(path, trainable=Weights()),
}


@pytest.mark.parametrize("kind", MODULES)
def test_calls_of_the_trainer_follow_each_other_in_any_order(model_dir, tmp_path, kind):
    if kind in ("lora",):
        pytest.importorskip("peft")
    batch = classification_batch(8)
    calls = {
        "fit": lambda run, module: run.fit(module, loader(batch), loader(batch)),
        "validate": lambda run, module: run.validate(module, loader(batch), verbose=False),
        "test": lambda run, module: run.test(module, loader(batch), verbose=False),
        "predict": lambda run, module: run.predict(module, loader(batch)),
    }
    if kind == "language_model":
        del calls["fit"]  # it has nothing to train
    # a module of its own for every first call, then all pairs of calls follow each other
    for first in calls:
        module, run = MODULES[kind](str(model_dir)), trainer(tmp_path)
        for second in calls:
            calls[first](run, module)
            calls[second](run, module)
            run.fit_loop.epoch_loop.max_steps += 2


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("kind", ["language_model", "zeroth_order", "lora"])
def test_every_loader_has_its_own_metrics(model_dir, tmp_path, kind, stage):
    if kind == "lora":
        pytest.importorskip("peft")
    module = MODULES[kind](str(model_dir))
    run = trainer(tmp_path)
    evaluate = run.validate if stage == "val" else run.test
    loaders = [loader(text_batch(5, seed=1)), loader(text_batch(3, seed=2)), loader(classification_batch(6))]
    alone = [evaluate(module, one, verbose=False)[0] for one in loaders]
    assert alone[0][f"{stage}/loss"] != alone[1][f"{stage}/loss"]
    evaluate(module, loaders, verbose=False)
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    assert found == {
        f"{name}/dataloader_idx_{index}": pytest.approx(value)
        for index, values in enumerate(alone)
        for name, value in values.items()
    }


def test_every_loader_of_a_fit_has_its_own_metrics(model_dir, tmp_path):
    module, run = ZerothOrderModule(str(model_dir)), trainer(tmp_path)
    run.fit(module, loader(classification_batch(8)), [loader(text_batch(3)), loader(classification_batch(6))])
    assert {name for name in run.callback_metrics if name.startswith("val/")} == {
        "val/loss/dataloader_idx_0",
        "val/perplexity/dataloader_idx_0",
        "val/accuracy/dataloader_idx_1",
        "val/option_loss/dataloader_idx_1",
    }
