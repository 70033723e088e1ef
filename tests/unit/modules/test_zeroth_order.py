import pytest
import torch
from helpers.causal_lms import classification_batch, save_tiny_lm, text_batch
from helpers.graphs import RecordedGraphs
from helpers.zo_run import components, train, trainable_of
from lightning.pytorch import Callback
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from wandazeta.adapters import LoRAAdapters, TensorTrainAdapters
from wandazeta.adapters.files import backbone_fingerprint
from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import ZerothOrderModule, zeroth_order
from wandazeta.modules.zeroth_order import NonFiniteLossError
from wandazeta.scoring.scorer import option_losses
from wandazeta.zeroth_order import (
    DEFAULT_EPSILON,
    AdaZetaSchedule,
    ConstantSchedule,
    SGDUpdate,
    TwoSided,
    direction,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("model"))


def ready(model_dir, **options):
    """A module with its adapters in place, outside a trainer."""
    module = ZerothOrderModule(str(model_dir), **components(options))
    module.setup("test")
    return module


@pytest.mark.parametrize("trainable", [None, LoRAAdapters(2)], ids=["tensor_train", "lora"])
@pytest.mark.parametrize("text", [False, True], ids=["options", "text"])
def test_one_step_is_the_update_written_out(model_dir, tmp_path, text, trainable):
    options = {"update": SGDUpdate(weight_decay=0.1), "seed": 5, "trainable": trainable}
    _, module, recorder = train(model_dir, tmp_path, steps=1, queries=3, text=text, **options)
    plain = ready(model_dir, prefix_cache_gib=0, seed=5, trainable=trainable)
    theta = plain.adapters.theta.clone()
    rows = torch.tensor(recorder.steps[1]["batch"]).view(4, -1)
    pool = text_batch(20) if text else classification_batch(20)
    places = [int((pool["input_ids"] == row).all(1).nonzero()) for row in rows]
    batch = {k: v[places] if len(v) == 20 else v for k, v in pool.items()}

    def loss(vector):
        plain.adapters.theta.copy_(vector)
        with torch.no_grad():
            prepared = plain.scorer.prepare(batch)
            if not text:
                return option_losses(plain.scorer.option_scores(prepared).values, batch["label"])[0].item()
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            return plain.backbone(**batch, labels=labels).loss.item()

    epsilon, gradient, losses = DEFAULT_EPSILON[torch.float32], torch.zeros_like(theta), []
    for query in range(3):
        z = direction(5, 0, query, theta.numel())
        plus, minus = loss(theta + epsilon * z), loss(theta - epsilon * z)
        gradient += (plus - minus) / (2 * epsilon) * z / 3
        losses += [plus, minus]
    expected = theta - 3e-3 * (gradient + 0.1 * theta * plain.adapters.decay_mask)
    # losses are equal to about 1e-6, which epsilon = 1e-3 magnifies in the slopes
    torch.testing.assert_close(module.adapters.theta, expected, atol=2e-5, rtol=1e-3)
    assert recorder.steps[1]["loss"] == pytest.approx(sum(losses) / 6, rel=1e-4)


def test_training_lowers_the_loss(model_dir, tmp_path):
    _, _, recorder = train(model_dir, tmp_path, steps=60, queries=8, learning_rate=2e-3, query_chunk_size=8)
    losses = [recorder.steps[step]["loss"] for step in range(1, 61)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("kind", [TensorTrainAdapters, LoRAAdapters])
def test_cached_and_uncached_losses_agree(model_dir, kind):
    batch = classification_batch(6)
    for layers in ("last:1", "last:2", "all"):
        cached, plain = (
            ready(model_dir, trainable=kind(rank=2, layers=layers)),
            ready(model_dir, trainable=kind(rank=2, layers=layers), prefix_cache_gib=0),
        )
        assert plain.scorer.prefix is None
        theta = cached.adapters.theta + 0.1 * torch.randn(5, cached.adapters.num_parameters)
        with torch.no_grad():
            losses = [m.losses(theta, m.scorer.prepare(batch)) for m in (cached, plain)]
        assert losses[0].std() > 1e-3, "the adapters must matter"
        torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-5)


def test_pruned_weights_are_what_the_prefix_holds(model_dir):
    dense, pruned = (
        ready(model_dir, adapter_layers="last:1"),
        ZerothOrderModule(str(model_dir), trainable=trainable_of({"adapter_layers": "last:1"})),
    )
    with torch.no_grad():
        for block in pruned.backbone.model.layers:
            block.mlp.up_proj.weight[:, ::2] = 0  # between construction and setup, as the callback prunes
    pruned.setup("test")
    batch = classification_batch(6)
    with torch.no_grad():
        scores = [m.scorer.option_scores(m.scorer.prepare(batch)).values for m in (dense, pruned)]
        pruned.scorer.prefix = None
        plain = pruned.scorer.option_scores(pruned.scorer.prepare(batch)).values
    assert not torch.allclose(scores[0], scores[1], atol=1e-3)
    torch.testing.assert_close(scores[1], plain, atol=1e-5, rtol=1e-5)


class Watch(Callback):
    """Looks at the module from inside the loss and around every step."""

    def __init__(self):
        self.seen = 0

    def on_fit_start(self, trainer, module):
        losses = module.losses

        def watched(theta_pd, prepared):
            assert torch.equal(module.adapters.theta, self.theta), "the stored adapters were perturbed"
            assert not any(part.training for part in module.backbone.modules())
            assert not torch.is_grad_enabled()
            self.seen += 1
            return losses(theta_pd, prepared)

        module.losses = watched

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.backbone.train()
        module.backbone.model.layers[0].eval()
        self.theta = module.adapters.theta.clone()
        self.rng = torch.get_rng_state()

    def on_train_batch_end(self, trainer, module, *_):
        assert torch.equal(torch.get_rng_state(), self.rng), "the global RNG moved"
        assert not torch.equal(module.adapters.theta, self.theta)
        assert module.backbone.model.layers[1].training
        assert not module.backbone.model.layers[0].mlp.training


def test_nothing_is_disturbed(model_dir, tmp_path):
    watch = Watch()
    train(model_dir, tmp_path, steps=4, queries=2, callbacks=[watch])
    assert watch.seen == 16


def test_backbone_is_frozen_and_adapters_stay_fp32(model_dir, tmp_path):
    before = backbone_fingerprint(ZerothOrderModule(str(model_dir), loading=LoadingOptions(dtype="bfloat16")).backbone)
    _, module, _ = train(model_dir, tmp_path, steps=2, trainer_options={"precision": "bf16-true"})
    assert module.adapters.theta.dtype == torch.float32
    assert module.backbone.dtype == torch.bfloat16
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["anchor"]
    assert module.compute_dtype == torch.bfloat16
    from wandazeta.adapters import remove_adapters

    remove_adapters(module.backbone)
    assert backbone_fingerprint(module.backbone) == before


def test_schedules_follow_completed_steps(model_dir, tmp_path):
    schedule = AdaZetaSchedule(alpha=1.0, beta=1.0, max_queries=3)
    trainer, _, recorder = train(model_dir, tmp_path, steps=22, schedule=schedule)
    assert [recorder.steps[step]["queries"] for step in range(1, 23)] == [1] * 10 + [2] * 5 + [3] * 7
    assert trainer.callback_metrics["zo/forwards"] == 2 * (10 + 2 * 5 + 3 * 7)


def test_learning_rate_scheduler_is_followed(model_dir, tmp_path):
    seen = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    train(
        model_dir,
        tmp_path,
        steps=5,
        learning_rate=1.0,
        callbacks=[Rates()],
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-4 / (1 + step)),
    )
    assert seen == pytest.approx([1e-4 / (1 + step) for step in range(5)])


def test_plateau_scheduler_is_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        train(model_dir, tmp_path, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)


class Spoil(Callback):
    """Makes the losses of chosen calls not finite."""

    def __init__(self, calls):
        self.calls, self.call = calls, 0

    def on_fit_start(self, trainer, module):
        losses = module.losses

        def spoiled(theta_pd, prepared):
            result = losses(theta_pd, prepared)
            if self.call in self.calls:
                result[0] = torch.nan
            self.call += 1
            return result

        module.losses = spoiled


def test_a_query_that_is_not_finite_is_dropped(model_dir, tmp_path):
    trainer, module, _ = train(model_dir, tmp_path, steps=1, queries=3, callbacks=[Spoil({1})])
    assert trainer.callback_metrics["zo/dropped_queries"] == 1
    assert module.adapters.theta.isfinite().all()
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_a_step_without_finite_query_changes_nothing(model_dir, tmp_path):
    start = ready(model_dir).adapters.theta
    _, module, _ = train(
        model_dir, tmp_path, steps=1, queries=2, update=SGDUpdate(weight_decay=0.1), callbacks=[Spoil({1, 2})]
    )
    assert torch.equal(module.adapters.theta, start)
    assert module.progress.tolist() == [1, 4, 0]


def test_losses_that_stay_non_finite_end_the_run(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(zeroth_order, "MAX_NONFINITE_STEPS", 3)
    with pytest.raises(NonFiniteLossError, match="finite losses, but for 3 steps"):
        train(model_dir, tmp_path, steps=9, queries=1, callbacks=[Spoil(set(range(2, 9)))])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("learning_rate", 0.0),
        ("query_chunk_size", 0),
        ("parallel", "both"),
        ("prefix_cache_gib", -1.0),
    ],
)
def test_bad_arguments(model_dir, argument, value):
    with pytest.raises(ValueError, match=argument):
        ZerothOrderModule(str(model_dir), **{argument: value})


def test_unknown_site(model_dir):
    with pytest.raises(ValueError, match=r"mlp\.up_proj"):
        ready(model_dir, adapter_sites=["before:mlp.up"])


def test_tokenizer_without_pad_token(tmp_path):
    directory = save_tiny_lm(tmp_path, pad=False)
    with pytest.raises(ValueError, match="pad_token"):
        ZerothOrderModule(str(directory))
    assert ZerothOrderModule(str(directory), LoadingOptions(pad_token="<eos>")).tokenizer.pad_token == "<eos>"


def test_gradient_accumulation_is_refused(model_dir, tmp_path):
    with pytest.raises(Exception, match="accumul"):
        train(model_dir, tmp_path, trainer_options={"accumulate_grad_batches": 2})


def test_small_epsilon_for_16_bit_warns(model_dir, tmp_path, recwarn):
    with pytest.warns(UserWarning, match="epsilon=0.001 is small"):
        train(model_dir, tmp_path / "bfloat16", steps=1, loading={"dtype": "bfloat16"}, estimator=TwoSided(1e-3))
    train(model_dir, tmp_path / "float32", steps=1, estimator=TwoSided(1e-5))
    assert not [warning for warning in recwarn if "epsilon" in str(warning.message)]


def test_saved_adapters(model_dir, tmp_path):
    _, trained, _ = train(model_dir, tmp_path, steps=2)
    trained.save_adapters(tmp_path / "adapters")
    fresh = ready(model_dir)
    fresh.load_adapters(tmp_path / "adapters")
    assert torch.equal(fresh.adapters.theta, trained.adapters.theta)
    with pytest.raises(ValueError, match="`rank` differs"):
        ready(model_dir, adapter_rank=3).load_adapters(tmp_path / "adapters")
    with pytest.raises(ValueError, match="`layers`"):
        ready(model_dir, adapter_layers="last:1").load_adapters(tmp_path / "adapters")
    with pytest.raises(ValueError, match="is missing"):
        fresh.load_adapters(tmp_path / "elsewhere")
    other = ZerothOrderModule(str(model_dir), trainable=trainable_of({}))
    other.pruned_backbone_key = "another pruning"
    with pytest.raises(ValueError, match="backbone"):
        other.load_adapters(tmp_path / "adapters")


def test_data_sharding_outside_a_trainer(model_dir):
    module = ZerothOrderModule(str(model_dir), parallel="data", schedule=ConstantSchedule(2))
    assert module.data_sharding == (1, 0)


@pytest.mark.parametrize(
    "options", [{}, {"estimator": ["OneSided", {}], "head": {"num_answers": 2, "gradient": "exact"}}], ids=["", "exact"]
)
def test_graphs_change_no_bits(model_dir, tmp_path, monkeypatch, options):
    found = []
    for backend in (None, RecordedGraphs()):
        monkeypatch.setattr(zeroth_order, "graph_backend", lambda device, backend=backend: backend)
        _, module, recorder = train(model_dir, tmp_path, steps=4, queries=3, query_chunk_size=2, **options)
        found.append((module.adapters.theta, [step["loss"] for step in recorder.steps.values()]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert backend.num_replays > 0
    assert module._graphed_losses is None


def test_derivatives_are_not_graphed(model_dir):
    module = ready(model_dir)
    theta_Pd = module.adapters.theta[None]
    with torch.no_grad():
        prepared = module.scorer.prepare(classification_batch(4))
        loss = module.losses(theta_Pd, prepared)
    module._graphed_losses = lambda theta_Pd, prepared, on_scores: torch.zeros(1)
    with torch.no_grad():
        assert module.losses(theta_Pd, prepared) == 0
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            dual = forward_ad.make_dual(theta_Pd, torch.ones_like(theta_Pd))
            assert forward_ad.unpack_dual(module.losses(dual, prepared)).tangent.abs() > 0
    assert torch.allclose(module.losses(theta_Pd.requires_grad_(), prepared), loss)
