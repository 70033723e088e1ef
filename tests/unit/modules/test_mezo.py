"""`ZerothOrderModule` with the model's own weights: MeZO."""

import pytest
import torch
from helpers.causal_lms import classification_batch, save_tiny_lm, text_batch
from helpers.zo_run import train
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy

from wandazeta.adapters import Weights
from wandazeta.modules import ZerothOrderModule
from wandazeta.modules.strategies import refuse_sharded_weights
from wandazeta.scoring.scorer import option_losses
from wandazeta.zeroth_order import SGDUpdate


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


def weights_of(module):
    return {name: weight.detach().clone() for name, weight in module.backbone.named_parameters()}


@pytest.mark.parametrize("text", [False, True], ids=["options", "text"])
def test_one_step_is_the_update_written_out(model_dir, tmp_path, text):
    options = {"trainable": Weights(), "update": SGDUpdate(weight_decay=100.0), "learning_rate": 1e-4, "seed": 5}
    _, module, recorder = train(model_dir, tmp_path, steps=1, queries=2, text=text, **options)
    plain = ZerothOrderModule(str(model_dir))
    start = weights_of(plain)
    rows = torch.tensor(recorder.steps[1]["batch"]).view(4, -1)
    pool = text_batch(20) if text else classification_batch(20)
    places = [int((pool["input_ids"] == row).all(1).nonzero()) for row in rows]
    batch = {k: v[places] if len(v) == 20 else v for k, v in pool.items()}

    def go(steps):
        with torch.no_grad():
            for name, weight in plain.backbone.named_parameters():
                weight.copy_(start[name] + steps[name])

    def direction(query):
        """What one step along it changes, from zero."""
        vector, coordinates = Weights().insert(plain.backbone, 5), torch.zeros(2)
        with torch.no_grad():
            for weight in plain.backbone.parameters():
                weight.zero_()
        vector.start_step(5, 0, 2)
        coordinates[query] = 1.0
        vector.apply_update(coordinates, 0.0, [], [])
        return weights_of(plain)

    def loss(steps):
        go(steps)
        with torch.no_grad():
            prepared = plain.scorer.prepare(batch)
            if not text:
                return option_losses(plain.scorer.option_scores(prepared).values, batch["label"])[0].item()
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            return plain.backbone(**batch, labels=labels).loss.item()

    gradient = {name: torch.zeros_like(weight) for name, weight in start.items()}
    for query in range(2):
        z = direction(query)
        plus, minus = (loss({name: sign * 1e-3 * z[name] for name in z}) for sign in (1, -1))
        for name in z:
            gradient[name] += (plus - minus) / 2e-3 * z[name] / 2
    for name, weight in module.backbone.named_parameters():
        decay = 100.0 * start[name] if weight.ndim == 2 else 0.0
        # losses are equal to about 1e-6, which epsilon = 1e-3 magnifies in the slopes
        torch.testing.assert_close(weight, start[name] - 1e-4 * (gradient[name] + decay), atol=1e-6, rtol=1e-3)
        assert not torch.equal(weight, start[name])


def test_training_lowers_the_loss(model_dir, tmp_path):
    options = {"trainable": Weights(), "learning_rate": 2e-4}
    _, _, recorder = train(model_dir, tmp_path, steps=40, queries=8, **options)
    losses = [recorder.steps[step]["loss"] for step in range(1, 41)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_resumed_equals_undisturbed(model_dir, tmp_path):
    options = {"trainable": Weights(), "learning_rate": 1e-4, "update": SGDUpdate(weight_decay=0.1)}
    _, whole, _ = train(model_dir, tmp_path / "whole", steps=7, **options)
    train(model_dir, tmp_path / "parts", steps=4, save_every=4, **options)
    file = tmp_path / "parts" / "last.ckpt"
    assert file.stat().st_size <= 4 * whole.adapters.num_parameters + 64 * 1024
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert {f"backbone.{name}" for name in whole.adapters.parameter_names} < set(saved)
    _, resumed, _ = train(model_dir, tmp_path / "parts", steps=7, save_every=9, resume=True, **options)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, resumed.backbone.get_parameter(name)), name
    with pytest.raises(ValueError, match="the kind of `trainable` differs"):
        train(model_dir, tmp_path / "parts", steps=8, save_every=9, resume=True)


def test_a_step_without_finite_query_changes_nothing(model_dir, tmp_path):
    class Spoil(Callback):
        def on_fit_start(self, trainer, module):
            module.losses = lambda theta_pd, prepared: torch.full((len(theta_pd),), torch.nan)

    start = weights_of(ZerothOrderModule(str(model_dir)))
    options = {"trainable": Weights(), "update": SGDUpdate(weight_decay=0.1), "callbacks": [Spoil()]}
    _, module, _ = train(model_dir, tmp_path, steps=1, **options)
    assert module.progress.tolist()[0] == 1
    assert all(torch.equal(start[name], weight) for name, weight in weights_of(module).items())


def test_weights_that_are_cast_or_sharded_are_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match="in float32"):
        train(model_dir, tmp_path, steps=1, trainable=Weights(), trainer_options={"precision": "bf16-true"})
    with pytest.raises(ValueError, match="FSDPStrategy"):
        refuse_sharded_weights(FSDPStrategy())
    module = ZerothOrderModule(str(model_dir), trainable=Weights())
    module.setup("test")
    for action in (module.save_adapters, module.load_adapters):
        with pytest.raises(ValueError, match="Expected adapters to"):
            action(tmp_path)
