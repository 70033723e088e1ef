"""Every callback of Lightning with both training modules: it works, or is refused by name."""

import json

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
import torch
from helpers.causal_lms import classification_batch, collate, rows_of, save_tiny_lm, step_loader
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from wandazeta.adapters import PeftLoRA, TensorTrainAdapters, Weights
from wandazeta.callbacks import WandaPPPruneCallback
from wandazeta.datamodules import PromptedClassificationDataModule
from wandazeta.modules import FirstOrderModule, ZerothOrderModule
from wandazeta.zeroth_order import RAdaZOUpdate, VarianceSchedule

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    rows = [{"text": f"{index} {'fine' if index % 2 else 'poor'}", "label": index % 2} for index in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Writer(lightning_callbacks.BasePredictionWriter):
    pass


class EveryFourth(lightning_callbacks.BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.backbone)

    def finetune_function(self, module, epoch, optimizer):
        pass


CALLBACKS = {
    "BackboneFinetuning": lightning_callbacks.BackboneFinetuning,
    "BaseFinetuning": EveryFourth,
    "BasePredictionWriter": lambda: Writer("epoch"),
    "BatchSizeFinder": lambda: lightning_callbacks.BatchSizeFinder(steps_per_trial=1, max_trials=1, init_val=4),
    "Callback": Callback,
    "Checkpoint": lightning_callbacks.Checkpoint,
    "DeviceStatsMonitor": lightning_callbacks.DeviceStatsMonitor,
    "EarlyStopping": lambda: lightning_callbacks.EarlyStopping("val/option_loss"),
    "GradientAccumulationScheduler": lambda: lightning_callbacks.GradientAccumulationScheduler({0: 2}),
    "LambdaCallback": lightning_callbacks.LambdaCallback,
    "LearningRateFinder": lambda: lightning_callbacks.LearningRateFinder(num_training_steps=3),
    "LearningRateMonitor": lightning_callbacks.LearningRateMonitor,
    "ModelCheckpoint": lambda: ModelCheckpoint(monitor="val/accuracy"),
    "ModelPruning": lambda: lightning_callbacks.ModelPruning("l1_unstructured", amount=0.5),
    "ModelSummary": lightning_callbacks.ModelSummary,
    "OnExceptionCheckpoint": lambda: lightning_callbacks.OnExceptionCheckpoint("unused"),
    "ProgressBar": lightning_callbacks.ProgressBar,
    "RichModelSummary": lightning_callbacks.RichModelSummary,
    "RichProgressBar": lightning_callbacks.RichProgressBar,
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1),
    "SpikeDetection": lightning_callbacks.SpikeDetection,
    "ThroughputMonitor": lambda: lightning_callbacks.ThroughputMonitor(lambda batch: len(batch["input_ids"])),
    "Timer": lambda: lightning_callbacks.Timer("00:01:00:00"),
    "TQDMProgressBar": lightning_callbacks.TQDMProgressBar,
    "EMAWeightAveraging": EMAWeightAveraging,
    "WeightAveraging": WeightAveraging,
}

MODULES = {
    "zeroth_order": lambda path: ZerothOrderModule(path, trainable=TensorTrainAdapters(rank=2)),
    "lora": lambda path: FirstOrderModule(path, trainable=PeftLoRA(2)),
    "tensor_train": lambda path: FirstOrderModule(path, trainable=TensorTrainAdapters(rank=2)),
    "weights": lambda path: FirstOrderModule(path, trainable=Weights()),
}

FINETUNING = {"BackboneFinetuning", "BaseFinetuning"}
REFUSED = {
    "zeroth_order": FINETUNING
    | {"GradientAccumulationScheduler", "LearningRateFinder", "ModelPruning", "SpikeDetection"}
    | {"StochasticWeightAveraging"},
    "lora": FINETUNING | {"ModelPruning"},
    "tensor_train": FINETUNING | {"ModelPruning"},
    "weights": FINETUNING,
}


def test_the_table_has_every_callback_of_lightning():
    assert set(CALLBACKS) == set(lightning_callbacks.__all__)


def trainer(tmp_path, *callbacks, **options):
    defaults = {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 1, "log_every_n_steps": 1}
    defaults |= {"accelerator": "cpu", "devices": 1, "logger": CSVLogger(tmp_path), "enable_progress_bar": False}
    defaults |= {"default_root_dir": tmp_path, "enable_model_summary": False, "num_sanity_val_steps": 0}
    defaults |= {
        "enable_checkpointing": any(isinstance(callback, lightning_callbacks.Checkpoint) for callback in callbacks)
    }
    return Trainer(callbacks=list(callbacks), **(defaults | options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_works_or_is_refused_by_name(model_dir, reviews, tmp_path, name, kind):
    module, callback = MODULES[kind](str(model_dir)), CALLBACKS[name]()
    data = PromptedClassificationDataModule(
        reviews, "{text} is", [" bad", " good"], batch_size=4, num_train=20, num_val=8, num_test=8
    )
    bars = isinstance(callback, lightning_callbacks.ProgressBar)
    run = trainer(
        tmp_path,
        callback,
        enable_progress_bar=bars,
        enable_model_summary=isinstance(callback, lightning_callbacks.ModelSummary),
    )
    if name in REFUSED[kind]:
        with pytest.raises(ValueError, match=f"no {type(callback).__name__} for "):
            run.fit(module, datamodule=data)
        return
    run.fit(module, datamodule=data)
    assert run.global_step == (2 if name == "GradientAccumulationScheduler" else 4)
    if kind == "zeroth_order":
        assert module.progress.tolist() == [4, 4 * 16, 4]
    assert "val/accuracy" in run.callback_metrics


# -- averages of weights


class Recorder(Callback):
    """Records the trained values after every step and those of every validation."""

    def __init__(self):
        self.steps, self.validated, self.losses = [], [], []

    def on_train_start(self, trainer, module):
        self.start = trained(module)

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append(trained(module))

    def on_validation_batch_end(self, trainer, module, *_):
        self.validated.append(trained(module))

    def on_validation_end(self, trainer, module):
        self.losses.append(float(trainer.callback_metrics["val/option_loss"]))


def trained(module):
    if isinstance(module, ZerothOrderModule):
        return module.adapters.theta.detach().clone()
    return torch.cat([p.detach().flatten() for name, p in module.named_parameters() if name in module.adapter_names])


def validation():
    return DataLoader(rows_of(classification_batch(8)), batch_size=4, collate_fn=collate)


def fit(module, root, *callbacks, steps=4, **options):
    saving = ModelCheckpoint(root, "{step}", save_top_k=-1, every_n_train_steps=2, save_last=True)
    run = trainer(root, *callbacks, saving, max_steps=steps, max_epochs=-1, limit_train_batches=2)
    run.fit(module, step_loader(classification_batch(20), 4, run), validation(), **options)
    return run


def module_of(kind, path):
    if kind == "zeroth_order":
        schedule = VarianceSchedule(min_queries=2, max_queries=4, window=1)
        return ZerothOrderModule(path, schedule=schedule, update=RAdaZOUpdate(), learning_rate=1e-2)
    return FirstOrderModule(path, trainable=PeftLoRA(2) if kind == "lora" else TensorTrainAdapters(rank=2))


KINDS = pytest.mark.parametrize("kind", ["zeroth_order", "lora", "tensor_train"])
AVERAGES = pytest.mark.parametrize(
    "average", [lambda: EMAWeightAveraging(decay=0.8), WeightAveraging], ids=["ema", "swa"]
)


@KINDS
@AVERAGES
def test_adapters_are_averaged_and_counters_are_not(model_dir, tmp_path, kind, average):
    plain, plain_steps = module_of(kind, str(model_dir)), Recorder()
    fit(plain, tmp_path / "plain", plain_steps)
    module, steps = module_of(kind, str(model_dir)), Recorder()
    fit(module, tmp_path / "averaged", steps, average())
    # training itself is not changed
    assert all(torch.equal(a, b) for a, b in zip(steps.steps, plain_steps.steps, strict=True))
    expected, averages = steps.steps[0], [steps.steps[0]]
    for number, values in enumerate(steps.steps[1:], start=2):
        weight = 0.2 if average is not WeightAveraging else 1 / number
        expected = expected + weight * (values - expected)
        averages.append(expected)
    torch.testing.assert_close(trained(module), expected)
    assert not torch.equal(trained(module), steps.steps[-1])
    # validations after the second and the fourth step used the averages, two batches each
    torch.testing.assert_close(steps.validated[0], averages[1])
    (again,) = trainer(tmp_path, limit_val_batches=2).validate(module, validation(), verbose=False)
    (plain_loss,) = trainer(tmp_path, limit_val_batches=2).validate(plain, validation(), verbose=False)
    assert again["val/option_loss"] != plain_loss["val/option_loss"]
    if kind == "zeroth_order":
        for name in ("progress", "adapters.update_states", "adapters.schedule_states"):
            assert torch.equal(module.get_buffer(name), plain.get_buffer(name)), name


def test_a_validation_measures_the_average(model_dir, tmp_path):
    module, steps = module_of("zeroth_order", str(model_dir)), Recorder()
    run = fit(module, tmp_path, steps, EMAWeightAveraging(decay=0.5), steps=4)
    assert run.global_step == 4
    module.adapters.theta = steps.validated[-1]
    module.adapters.clear_cache()
    (found,) = trainer(tmp_path, limit_val_batches=1).validate(module, validation(), verbose=False)
    assert found["val/option_loss"] == pytest.approx(steps.losses[-1], rel=1e-6)


@KINDS
@AVERAGES
def test_checkpoints_with_averages_hold_adapters_only_and_resume(model_dir, tmp_path, kind, average):
    whole = module_of(kind, str(model_dir))
    fit(whole, tmp_path / "whole", average(), steps=6)
    fit(module_of(kind, str(model_dir)), tmp_path / "parts", average(), steps=4)
    resumed = module_of(kind, str(model_dir))
    fit(resumed, tmp_path / "parts", average(), steps=6, ckpt_path="last")
    assert torch.equal(trained(resumed), trained(whole))
    content = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state"):
        assert not any(name.startswith("backbone.") and "lora_" not in name for name in content[key])
    if kind == "zeroth_order":
        assert resumed.progress.tolist() == whole.progress.tolist() == content["state_dict"]["progress"].tolist()


@pytest.mark.parametrize("kind", ["lora", "tensor_train"])
def test_stochastic_weight_averaging_averages_the_adapters(model_dir, tmp_path, kind):
    module, steps = module_of(kind, str(model_dir)), Recorder()
    run = trainer(
        tmp_path, steps, StochasticWeightAveraging(1e-2, swa_epoch_start=1), max_epochs=3, limit_train_batches=1.0
    )
    run.fit(module, step_loader(classification_batch(20), 4, run))
    # Lightning averages what the three epochs begin with
    torch.testing.assert_close(trained(module), (steps.start + steps.steps[4] + steps.steps[9]) / 3)


def test_averages_without_buffers_are_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match="`use_buffers` of EMAWeightAveraging to be True for ZerothOrderModule"):
        fit(module_of("zeroth_order", str(model_dir)), tmp_path, EMAWeightAveraging(use_buffers=False))


# zeroth order refuses StochasticWeightAveraging in any place
@pytest.mark.parametrize(
    ("kind", "average"),
    [
        ("zeroth_order", EMAWeightAveraging),
        ("lora", EMAWeightAveraging),
        ("lora", lambda: StochasticWeightAveraging(1e-3)),
    ],
)
def test_pruning_after_a_copy_of_the_weights_is_refused(model_dir, tmp_path, kind, average):
    prune = WandaPPPruneCallback(method="magnitude", output_dir=str(tmp_path / "pruned"))
    with pytest.raises(ValueError, match=r"WandaPPPruneCallback before \w+Averaging in argument `callbacks`"):
        fit(module_of(kind, str(model_dir)), tmp_path, average(), prune)


@pytest.mark.parametrize("kind", ["zeroth_order", "lora"])
def test_the_average_of_a_pruned_model_is_pruned(model_dir, tmp_path, kind):
    prune = WandaPPPruneCallback(method="magnitude", output_dir=str(tmp_path / "pruned"))
    module = module_of(kind, str(model_dir))
    fit(module, tmp_path, prune, EMAWeightAveraging(decay=0.5))
    weights = {n: p for n, p in module.named_parameters() if "up_proj" in n and "lora" not in n and p.ndim == 2}
    assert weights
    assert all((weight == 0).float().mean() == 0.5 for weight in weights.values())
