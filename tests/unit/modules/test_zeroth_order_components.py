"""The choices of the zeroth-order step, in the module."""

import pytest
import torch
from helpers.causal_lms import classification_batch, save_tiny_lm
from helpers.zo_run import train
from lightning.pytorch import Callback

from wandazeta.adapters import TensorTrainAdapters, Weights
from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import ZerothOrderModule
from wandazeta.zeroth_order import (
    DEFAULT_EPSILON,
    ConstantSchedule,
    ForwardMode,
    OneSided,
    RAdaZOUpdate,
    TwoSided,
    VarianceSchedule,
    direction,
    rademacher,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("name", "value", "estimator"),
    [
        ("estimator", "ForwardMode", ForwardMode()),
        ("directions", "rademacher", TwoSided(directions="rademacher")),
        ("aggregation", "align", OneSided(aggregation="align")),
    ],
)
def test_what_needs_whole_directions_is_refused_for_the_models_own_weights(model_dir, name, value, estimator):
    with pytest.raises(ValueError, match=rf"`{name}` to be .* if `Weights` are trained, but got '{value}'"):
        ZerothOrderModule(str(model_dir), trainable=Weights(), estimator=estimator)


def loss_and_start(model_dir, recorder, seed):
    """The loss of the first step's batch as a function of the adapters, by the plain model, and their start."""
    module = ZerothOrderModule(
        str(model_dir), trainable=TensorTrainAdapters(2, 8, identity_start=False), prefix_cache_gib=0, seed=seed
    )
    module.setup("test")
    pool = classification_batch(20)
    rows = torch.tensor(recorder.steps[1]["batch"]).view(4, -1)
    places = [int((pool["input_ids"] == row).all(1).nonzero()) for row in rows]
    prepared = module.scorer.prepare({k: v[places] if len(v) == 20 else v for k, v in pool.items()})
    return lambda theta: module.losses(theta[None], prepared)[0], module.adapters.theta.clone()


def test_one_sided_step_is_the_update_written_out(model_dir, tmp_path):
    options = {"estimator": OneSided(directions="rademacher", aggregation="align"), "seed": 5}
    trainer, module, recorder = train(model_dir, tmp_path, steps=1, queries=3, **options)
    loss, theta = loss_and_start(model_dir, recorder, 5)
    epsilon = DEFAULT_EPSILON[torch.float32]
    z = torch.stack([rademacher(5, 0, query, len(theta)) for query in range(3)])
    with torch.no_grad():
        base = loss(theta)
        slopes = torch.stack([(loss(theta + epsilon * row) - base) / epsilon for row in z])
    # the shortest vector with these slopes, scaled to the length of the gradient
    gradient = torch.linalg.lstsq(z, slopes.float()[:, None], driver="gelsd").solution[:, 0] * len(theta) / 3
    torch.testing.assert_close(module.adapters.theta, theta - 3e-3 * gradient, atol=2e-5, rtol=1e-3)
    assert recorder.steps[1]["loss"] == pytest.approx(base.item(), rel=1e-6), "the loss at the adapters themselves"
    assert trainer.callback_metrics["zo/forwards"] == 4


def test_forward_mode_step_follows_the_gradient_of_autograd(model_dir, tmp_path):
    options = {"estimator": ForwardMode(aggregation="fzoo"), "seed": 5}
    trainer, module, recorder = train(model_dir, tmp_path, steps=1, queries=3, **options)
    loss, theta = loss_and_start(model_dir, recorder, 5)
    theta.requires_grad_()
    (exact,) = torch.autograd.grad(loss(theta), theta)
    z = torch.stack([direction(5, 0, query, len(theta)) for query in range(3)])
    slopes = z @ exact
    expected = theta - 3e-3 * slopes @ z / 3 / slopes.std()
    torch.testing.assert_close(module.adapters.theta, expected.detach(), atol=1e-6, rtol=1e-4)
    assert trainer.callback_metrics["zo/forwards"] == 6


def test_variance_schedule_follows_the_slopes(model_dir, tmp_path):
    schedule = VarianceSchedule(2, 6, window=3)
    trainer, module, recorder = train(model_dir, tmp_path, steps=12, schedule=schedule)
    states = module.adapters.get_buffer("schedule_states")
    queries = [recorder.steps[step]["queries"] for step in range(1, 13)]
    assert queries[:4] == [2] * 4
    assert len(set(queries)) > 1
    assert int(states[0]) == 12
    assert trainer.callback_metrics["zo/forwards"] == 2 * sum(queries)


@pytest.mark.parametrize(
    ("estimator", "per_step"), [(TwoSided(), 6), (OneSided(), 4), (ForwardMode(), 6)], ids=lambda v: str(v)
)
def test_budget_is_never_exceeded_and_kept_by_a_resumed_run(model_dir, tmp_path, estimator, per_step):
    options = {"estimator": estimator, "max_forwards": 4 * per_step - 1, "save_every": 1}
    trainer, module, recorder = train(model_dir, tmp_path, steps=9, **options)
    assert sorted(recorder.steps) == [1, 2, 3]
    assert module.progress.tolist() == [3, 3 * per_step, 3]
    assert trainer.callback_metrics["zo/forwards"] == 3 * per_step
    _, resumed, later = train(model_dir, tmp_path, steps=9, resume=True, **options)
    assert not later.steps
    assert torch.equal(resumed.adapters.theta, module.adapters.theta)
    _, resumed, later = train(model_dir, tmp_path, steps=9, resume=True, **options | {"max_forwards": 4 * per_step})
    assert sorted(later.steps) == [4]
    assert int(resumed.progress[1]) == 4 * per_step


def test_budget_holds_where_the_trainer_may_not_stop(model_dir, tmp_path):
    options = {"max_forwards": 13, "trainer_options": {"min_steps": 6}}
    _, module, _ = train(model_dir, tmp_path, steps=9, **options)
    assert int(module.progress[1]) == 12


class SpoilAll(Callback):
    """Makes every loss of chosen steps not finite: of the base alone where there is one."""

    def __init__(self, steps, only=None):
        self.steps, self.only = steps, only

    def on_train_start(self, trainer, module):
        losses, call = module.losses, [0, -1]

        def spoiled(theta_Pd, prepared):
            call[:] = [0 if trainer.global_step != call[1] else call[0] + 1, trainer.global_step]
            if trainer.global_step in self.steps and self.only in (None, call[0]):
                return losses(theta_Pd, prepared) * torch.nan
            return losses(theta_Pd, prepared)

        module.losses = spoiled


@pytest.mark.parametrize(
    ("estimator", "only"), [(TwoSided(), None), (OneSided(), None), (OneSided(), 0), (ForwardMode(), None)], ids=str
)
def test_a_step_without_finite_query_changes_nothing(model_dir, tmp_path, estimator, only):
    options = {"update": RAdaZOUpdate(weight_decay=0.1), "schedule": VarianceSchedule(2, 6, window=2)}
    options |= {"estimator": estimator, "adapter_layers": "last:1"}
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            vector = module.adapters
            seen.append([t.clone() for t in (vector.theta, vector.update_states, vector.schedule_states)])

    spoil = SpoilAll({2, 3}, only)
    _, module, _ = train(model_dir, tmp_path, steps=5, callbacks=[Watch(), spoil], **options)
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[3], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen[3], seen[4], strict=True))
    # the moments of R-AdaZO are corrected for the steps that they have seen
    assert module.progress[[0, 2]].tolist() == [5, 3]


def test_steps_that_stay_without_a_finite_base_end_the_run(model_dir, tmp_path):
    with pytest.raises(ValueError, match="Expected finite losses, but for 10 steps"):
        train(model_dir, tmp_path, steps=15, estimator=OneSided(), callbacks=[SpoilAll(set(range(3, 15)), 0)])


def test_moments_are_corrected_for_updates_not_for_steps(model_dir, tmp_path):
    """The first update is that of a run whose first step it is: its moments forget what they did not see."""
    rates = []
    for spoiled in (set(), {0, 1, 2}):
        start = ZerothOrderModule(str(model_dir), trainable=TensorTrainAdapters(2, 8, identity_start=False))
        start.setup("test")
        steps = len(spoiled) + 1
        options = {"update": RAdaZOUpdate(), "callbacks": [SpoilAll(spoiled)], "adapter_layers": "all"}
        _, module, _ = train(model_dir, tmp_path, steps=steps, **options)
        rates.append((module.adapters.theta - start.adapters.theta).abs().median().item())
    # in a first step the mean is corrected and its square is of the uncorrected one, a tenth of the gradient
    assert rates == pytest.approx([3e-2, 3e-2], rel=1e-2)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("estimator", {"estimator": "two_sided"}),
        ("schedule", {"estimator": TwoSided(aggregation="fzoo"), "schedule": ConstantSchedule(1)}),
        ("max_forwards", {"schedule": ConstantSchedule(4), "max_forwards": 7}),
        ("max_forwards", {"schedule": ConstantSchedule(4), "estimator": OneSided(), "max_forwards": 4}),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(argument, options):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        ZerothOrderModule("nowhere/at/all", **options)


def test_weights_of_a_file_that_are_streamed_cannot_be_trained():
    with pytest.raises(ValueError, match="`stream_weights` to be false for ZerothOrderModule"):
        ZerothOrderModule("nowhere/at/all", LoadingOptions(stream_weights=True))
