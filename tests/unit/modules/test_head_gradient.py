"""The head's gradient in closed form, against autograd and over ranks."""

import pytest
import torch
from helpers.encoders import SIZES, labelled_batch, save_tiny_encoder, tiny_encoder
from helpers.processes import run
from helpers.zo_run import components, train, trainable_of
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from wandazeta.adapters import Weights
from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import ZerothOrderModule
from wandazeta.zeroth_order import OneSided, RAdaZOUpdate, SGDUpdate, TrainedHead, TwoSided

NUM_CLASSES, WIDTH = 3, SIZES["hidden_size"]
HEAD = NUM_CLASSES * (WIDTH + 1)
LOADING = {"num_classes": NUM_CLASSES}
EXACT = {"estimator": ["OneSided", {}], "head": {"gradient": "exact"}, "loading": LOADING}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(save_tiny_encoder(tmp_path_factory.mktemp("model")))


def head_gradient(batch, theta):
    """Autograd's on the plain encoder, one unpadded example at a time; adapters that change nothing are left out."""
    weight = theta[-HEAD:-NUM_CLASSES].view(NUM_CLASSES, WIDTH).clone().requires_grad_()
    bias = theta[-NUM_CLASSES:].clone().requires_grad_()
    encoder = tiny_encoder()
    logits = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        hidden = encoder(input_ids=ids[mask.bool()][None]).last_hidden_state[0].detach()
        logits.append(weight @ hidden.mean(0) + bias)
    F.cross_entropy(torch.stack(logits), batch["label"]).backward()
    return torch.cat([weight.grad.flatten(), bias.grad])


@pytest.mark.parametrize("aggregation", ["mean", "fzoo"])
def test_first_step_moves_the_head_by_the_gradient_of_autograd(model_dir, tmp_path, aggregation):
    batch = labelled_batch(4)
    chosen = EXACT | {"estimator": OneSided(aggregation=aggregation), "identity_start": True, "queries": 2}
    _, module, _ = train(model_dir, tmp_path, steps=1, batch=batch, batch_size=4, **chosen)
    theta = module.adapters.theta
    expected = -3e-3 * head_gradient(batch, torch.zeros_like(theta))
    torch.testing.assert_close(theta[-HEAD:], expected, atol=1e-7, rtol=1e-4)
    assert expected.norm() > 1e-4
    # under a head of zeros the loss does not depend on the adapters
    start = ZerothOrderModule(model_dir, LoadingOptions(**LOADING), trainable=module.trainable)
    start.setup("test")
    assert torch.equal(theta[:-HEAD], start.adapters.theta[:-HEAD])


@pytest.mark.parametrize("kind", ["estimated", "exact"])
@pytest.mark.parametrize("update", [SGDUpdate, RAdaZOUpdate])
def test_the_head_moves_at_a_rate_of_its_own(model_dir, tmp_path, kind, update):
    # from a head of zeros, a first step: the rates cannot change what is measured
    chosen = EXACT | {"update": update(), "batch": labelled_batch(4), "batch_size": 4, "steps": 1}
    heads = (TrainedHead(gradient=kind, learning_rate=rate) for rate in (None, 3e-2))
    plain, faster = (
        train(model_dir, tmp_path / str(head.learning_rate), **chosen | {"head": head})[1].adapters.theta
        for head in heads
    )
    start = ZerothOrderModule(model_dir, LoadingOptions(**LOADING), trainable=trainable_of({}))
    start.setup("test")
    torch.testing.assert_close(faster[-HEAD:], 10 * plain[-HEAD:])
    assert plain[-HEAD:].norm() > 1e-4
    assert torch.equal(faster[:-HEAD], plain[:-HEAD])
    if kind == "estimated":
        assert not torch.equal(plain[:-HEAD], start.adapters.theta[:-HEAD])


def test_a_scheduler_moves_the_heads_rate_too(model_dir, tmp_path):
    def halved(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)

    chosen = EXACT | {"batch": labelled_batch(4), "batch_size": 4, "steps": 1}
    chosen["head"] = TrainedHead(gradient="exact", learning_rate=3e-2)
    plain, half = (
        train(model_dir, tmp_path / str(index), lr_scheduler=scheduler, **chosen)[1].adapters.theta
        for index, scheduler in enumerate((None, halved))
    )
    torch.testing.assert_close(half[-HEAD:], plain[-HEAD:] / 2)


def test_directions_leave_the_head_alone(model_dir, tmp_path):
    seen = []

    class Watching(ZerothOrderModule):
        def losses(self, theta_Pd, prepared, on_scores=None):
            seen.append(theta_Pd - self.adapters.theta)
            return super().losses(theta_Pd, prepared, on_scores)

    import helpers.zo_run

    import wandazeta.modules

    original = wandazeta.modules.ZerothOrderModule
    wandazeta.modules.ZerothOrderModule = Watching
    try:
        helpers.zo_run.train(
            model_dir, tmp_path, steps=3, batch=labelled_batch(6), batch_size=3, query_chunk_size=8, **EXACT
        )
    finally:
        wandazeta.modules.ZerothOrderModule = original
    for moves in seen:
        assert not moves[:, -HEAD:].any()
        assert moves[1:, :-HEAD].any(1).all()


def test_learns_faster_than_by_estimates(model_dir, tmp_path):
    chosen = {
        "batch": labelled_batch(12),
        "batch_size": 6,
        "steps": 30,
        "learning_rate": 3e-2,
        "estimator": OneSided(),
    }
    losses = {}
    for kind in ("estimated", "exact"):
        options = chosen | {"loading": LOADING, "head": {"gradient": kind}}
        losses[kind] = train(model_dir, tmp_path / kind, **options)[2].steps[30]["loss"]
    assert losses["exact"] < losses["estimated"] < 1.2


@pytest.mark.parametrize("parallel", ["queries", "data"])
def test_two_ranks_train_as_one(model_dir, tmp_path, parallel):
    settings = EXACT | {"model_dir": model_dir, "steps": 4, "queries": 3, "parallel": parallel, "batch_size": 4}
    (alone,) = run("zo_run", settings, tmp_path / "alone")
    shared = settings | {"devices": 2, "strategy": "ddp"}
    if parallel == "data":
        # the loader gives each rank a half of a batch
        shared["batch_size"] = 2
    ranks = run("zo_run", shared, tmp_path / "two")
    assert torch.equal(ranks[0]["theta"], ranks[1]["theta"])
    if parallel == "queries":
        assert torch.equal(ranks[0]["theta"], alone["theta"])
    else:
        torch.testing.assert_close(ranks[0]["theta"], alone["theta"], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loading": None}, "`num_classes` or `num_answers`"),
        ({"estimator": TwoSided()}, "`estimator` OneSided for a head .* but TwoSided has no base forward"),
        ({"estimator": OneSided(aggregation="align")}, "`aggregation` mean or fzoo"),
        ({"objective": MulticlassAccuracy(3), "estimator": OneSided(0.1)}, "no `objective`"),
        ({"trainable": Weights()}, "adapters in `trainable`"),
        ({"head": TrainedHead(learning_rate=0.1), "loading": None}, "but got neither, so there is no head"),
        ({"head": TrainedHead(learning_rate=0.1), "trainable": Weights()}, "Weights, which have one learning rate"),
    ],
)
def test_what_does_not_go_together_is_refused_before_loading(change, message):
    with pytest.raises(ValueError, match=message):
        ZerothOrderModule("nowhere/at/all", **components(EXACT | change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "closed"}, "`gradient` to be one of estimated, exact"),
        ({"learning_rate": 0.0}, "`learning_rate` to be above 0"),
        ({"num_answers": 1}, "`num_answers` to be at least 2"),
    ],
)
def test_options_of_a_head_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TrainedHead(**options)
