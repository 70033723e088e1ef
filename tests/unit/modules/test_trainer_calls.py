"""The modules under the trainer: any order of its calls, several loaders, its precision and its options."""

import pytest
import torch
from helpers.causal_lms import classification_batch, collate, rows_of, save_tiny_lm, text_batch
from lightning.pytorch import Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import Metric

from wandazeta.adapters import PeftLoRA, TensorTrainAdapters, Weights
from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import FirstOrderModule, LanguageModel, ZerothOrderModule, first_order
from wandazeta.modules.language_model import NonFiniteLossError
from wandazeta.zeroth_order import ConstantSchedule, ForwardMode, TwoSided, direction


class ExactClasses(Metric):
    """Accuracy, which divides two counts."""

    higher_is_better = True

    def __init__(self):
        super().__init__()
        for name in ("right", "total"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores, labels):
        self.right += (scores.argmax(1) == labels).sum()
        self.total += len(labels)

    def compute(self):
        return self.right / self.total


class MeanSquaredScore(Metric):
    """A metric whose states are of floating point."""

    higher_is_better = False

    def __init__(self):
        super().__init__()
        self.add_state("sum", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, scores, labels):
        self.sum += scores.float().square().mean()

    def compute(self):
        return self.sum


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
        "val/sequence_length/dataloader_idx_0",
        "val/bos/dataloader_idx_0",
        "val/accuracy/dataloader_idx_1",
        "val/option_loss/dataloader_idx_1",
    }


# -- half precision of the trainer


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_are_not_rounded_by_the_precision_of_the_trainer(model_dir, tmp_path, stage):
    batch = classification_batch(301)
    module, run = LanguageModel(str(model_dir)), trainer(tmp_path, precision="bf16-true")
    (metrics,) = (run.validate if stage == "val" else run.test)(module, loader(batch, 7), verbose=False)
    predictions = trainer(tmp_path, precision="bf16-true").predict(module, loader(batch, 7))
    right = int((torch.cat([p["prediction"] for p in predictions]) == batch["label"]).sum())
    assert metrics[f"{stage}/accuracy"] == pytest.approx(right / 301, abs=1e-9)
    losses = F.cross_entropy(torch.cat([p["scores"] for p in predictions]).double(), batch["label"])
    assert metrics[f"{stage}/option_loss"] == pytest.approx(float(losses), abs=1e-9)


def test_training_in_half_precision_draws_the_same_directions(model_dir, tmp_path):
    drawn = {}

    class Gaussian(TwoSided):
        @property
        def draw(self):
            def draw(seed, step, query, numel, device="cpu"):
                return drawn.setdefault((precision, step, query), direction(seed, step, query, numel, device))

            return draw

    for precision in ("32-true", "bf16-true"):
        module = ZerothOrderModule(str(model_dir), estimator=Gaussian(), schedule=ConstantSchedule(2))
        trainer(tmp_path, precision=precision).fit(module, loader(classification_batch(8)))
        buffers = dict(module.adapters.named_buffers())
        assert {name: x.dtype for name, x in buffers.items() if name != "schedule_states"} == {
            name: torch.float32 for name in buffers if name != "schedule_states"
        }
    for step, query in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert torch.equal(drawn["32-true", step, query], drawn["bf16-true", step, query])
        assert drawn["bf16-true", step, query].dtype == torch.float32


@pytest.mark.parametrize("metric", [ExactClasses, MeanSquaredScore])
def test_metrics_as_objectives_are_not_rounded_by_the_precision_of_the_trainer(model_dir, tmp_path, metric):
    seen = []

    class Recording(metric):
        def compute(self):
            value = super().compute()
            seen.append((value.dtype, float(value)))
            return value

    module = ZerothOrderModule(
        str(model_dir), objective=Recording(), estimator=TwoSided(epsilon=0.1), schedule=ConstantSchedule(1)
    )
    trainer(tmp_path, precision="bf16-true", max_steps=1).fit(module, loader(classification_batch(301), 301))
    assert {dtype for dtype, _ in seen} == {torch.float32}
    if metric is ExactClasses:
        assert all(round(value * 301) / 301 == pytest.approx(value, abs=1e-7) for _, value in seen)


# -- options of the trainer


@pytest.mark.parametrize("kind", ["zeroth_order", "mezo", "lora"])
def test_no_logging_in_between(model_dir, tmp_path, kind):
    if kind == "lora":
        pytest.importorskip("peft")
    run = trainer(tmp_path, log_every_n_steps=0)
    run.fit(MODULES[kind](str(model_dir)), loader(classification_batch(8)))
    assert run.global_step == 2
    assert "train/loss" in run.callback_metrics


# -- float16


@pytest.mark.parametrize("kind", ["lora", "tensor_train", "weights"])
def test_back_propagation_in_float16_is_refused(model_dir, tmp_path, kind):
    if kind == "lora":
        pytest.importorskip("peft")
    module, run = MODULES[kind](str(model_dir)), trainer(tmp_path, precision="16-true")
    with pytest.raises(ValueError, match=r"`precision` to be .* got '16-true'.*use 16-mixed"):
        run.fit(module, loader(classification_batch(8)))
    assert module.adapters is None, "refused before the adapters are inserted"
    # evaluation is possible
    assert trainer(tmp_path, precision="16-true").validate(module, loader(classification_batch(8)), verbose=False)


def test_training_weights_that_were_loaded_in_float16_is_refused(model_dir, tmp_path):
    module = FirstOrderModule(str(model_dir), LoadingOptions("float16"), trainable=Weights())
    with pytest.raises(ValueError, match=r"got float16.*`loading.dtype: float32`"):
        trainer(tmp_path).fit(module, loader(classification_batch(8)))


@pytest.mark.parametrize("kind", ["lora", "tensor_train", "weights"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_back_propagation_ends_at_the_first_loss_that_is_not_finite(model_dir, tmp_path, kind, bad, monkeypatch):
    if kind == "lora":
        pytest.importorskip("peft")
    module, run = MODULES[kind](str(model_dir)), trainer(tmp_path, max_steps=5)
    plain = first_order.objective_losses

    def losses(*args):
        return plain(*args) * (bad if run.global_step == 2 else 1.0)

    monkeypatch.setattr(first_order, "objective_losses", losses)
    with pytest.raises(NonFiniteLossError, match="loss of step 2 is nan or infinite; lower `learning_rate`"):
        run.fit(module, loader(classification_batch(8)))
    assert run.global_step == 2
    assert all(p.isfinite().all() for p in module.parameters())


# -- processes that Lightning starts


@pytest.mark.parametrize("kind", ["zeroth_order", "mezo", "lora", "tensor_train", "weights"])
def test_the_module_has_what_spawned_processes_trained(model_dir, tmp_path, kind):
    if kind == "lora":
        pytest.importorskip("peft")
    module, other = MODULES[kind](str(model_dir)), MODULES[kind](str(model_dir))
    trainer(tmp_path).fit(other, loader(classification_batch(8)))
    # what the launcher of `ddp_spawn` does in the main process
    module.load_state_dict(other.state_dict(), strict=False)
    (expected,) = trainer(tmp_path).validate(other, loader(classification_batch(8)), verbose=False)
    (found,) = trainer(tmp_path).validate(module, loader(classification_batch(8)), verbose=False)
    assert found == expected
