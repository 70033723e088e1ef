"""What a zeroth-order fit says about itself: the cost of a step, and what is trained."""

import re

import pytest
from helpers.causal_lms import save_tiny_lm
from helpers.zo_run import train
from lightning.pytorch.callbacks import ModelSummary

from wandazeta.adapters import Weights
from wandazeta.lightning_compat import num_training_steps


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("model"))


def said(caplog):
    return [message for message in caplog.messages if message.startswith("A step ")]


def test_a_step_is_described_before_the_first_and_timed_after_the_second(model_dir, tmp_path, caplog):
    train(model_dir, tmp_path, steps=5, queries=3, batch_size=4, prefix_cache_gib=0)
    first, second = said(caplog)
    assert first == "A step is 6 forwards of 4 examples."
    assert re.fullmatch(r"A step takes [\d.]+ (ms|s); 3 more steps take about [\d.]+ (ms|s|min)\.", second)


def test_the_end_of_a_resumed_fit_and_that_of_a_budget_are_told(model_dir, tmp_path, caplog):
    without = {"prefix_cache_gib": 0}
    train(model_dir, tmp_path, steps=3, queries=3, save_every=3, **without)
    caplog.clear()
    train(model_dir, tmp_path, steps=9, queries=3, save_every=3, resume=True, **without)
    assert said(caplog)[1].endswith(tuple(f"{unit}." for unit in ("ms", "s", "min")))
    assert "; 4 more steps take" in said(caplog)[1]
    caplog.clear()
    # 4 steps of 6 forwards
    trainer, _, _ = train(model_dir, tmp_path / "budget", steps=-1, queries=3, max_forwards=25, **without)
    assert trainer.global_step == num_training_steps(trainer) == 4
    assert "; 2 more steps take" in said(caplog)[1]


def test_the_time_left_is_that_of_steps_that_find_all_prefixes(model_dir, tmp_path, caplog):
    # 5 steps run through the 20 examples
    train(model_dir, tmp_path, steps=8, batch_size=4, num_examples=20, adapter_layers="last:1")
    _, filling, finding = said(caplog)
    assert "at first, while the layers below the adapters run once for each example" in filling
    assert "; 2 more steps take" in finding


def test_the_only_step_is_timed(model_dir, tmp_path, caplog):
    train(model_dir, tmp_path, steps=1)
    assert re.fullmatch(r"A step takes [\d.]+ (ms|s)\.", said(caplog)[1])


class Recorded(ModelSummary):
    shown = None

    @staticmethod
    def summarize(summary_data, total_parameters, trainable_parameters, *others, **options):
        Recorded.shown = (dict(summary_data), total_parameters, trainable_parameters)


@pytest.mark.parametrize("trainable", [None, Weights()], ids=["adapters", "weights"])
def test_the_summary_has_the_trained_values(model_dir, tmp_path, trainable):
    summary = Recorded()
    trainer, module, _ = train(model_dir, tmp_path, steps=1, callbacks=[summary], trainable=trainable)
    columns, total, trained = Recorded.shown
    assert trained == module.adapters.num_parameters > 1
    outside = trained if trainable is None else 0
    assert total == sum(weight.numel() for weight in module.backbone.parameters()) + outside
    if trainable is None:
        assert columns["Params"][columns["Name"].index("adapters")] not in ("0", "")
    # a second fit shows the same
    module.configure_callbacks()
    summary.on_fit_start(trainer, module)
    assert Recorded.shown[1:] == (total, trained)
