"""`FirstOrderModule` with tensor trains: LoRETTA."""

import pytest
import torch
from helpers.causal_lms import classification_batch, save_tiny_lm, step_loader
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from wandazeta.adapters import TensorTrainAdapters, TTLinear, Weights
from wandazeta.adapters.files import load_adapters
from wandazeta.modules import FirstOrderModule, ZerothOrderModule


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("model"))


def settings(**changes):
    return TensorTrainAdapters(**{"rank": 2, "bottleneck": 8, "identity_start": False} | changes)


def fit(directory, root, *callbacks, steps=4, resume=False, save=False, trainer_options=None, **options):
    options = {"trainable": settings(), "learning_rate": 1e-2, "seed": 3} | options
    module = FirstOrderModule(str(directory), **options)
    saving = [ModelCheckpoint(root, every_n_train_steps=2, save_top_k=0, save_last=True)] if save else []
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_checkpointing=save, default_root_dir=root,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, *saving],
        **(trainer_options or {}),
    )  # fmt: skip
    trainer.fit(module, step_loader(classification_batch(20), 4, trainer), ckpt_path="last" if resume else None)
    return trainer, module


class Batches(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(batch)


class Adapted(torch.nn.Module):
    """A Linear with an adapter of its own behind it, cores as parameters."""

    def __init__(self, linear, width):
        super().__init__()
        self.linear, self.down, self.up = linear, TTLinear(width, 8, 2), TTLinear(8, width, 2)

    def forward(self, x):
        y = self.linear(x)
        return y + self.up(F.relu(self.down(y)))


def test_training_is_that_of_adapters_with_parameters_of_their_own(model_dir, tmp_path):
    batches = Batches()
    site = settings(sites=["after:mlp.down_proj"], layers="last:1")
    _, module = fit(model_dir, tmp_path, batches, trainable=site)
    start = ZerothOrderModule(str(model_dir), trainable=site, seed=3)
    start.setup("test")
    ((slices_down, slices_up),) = [[layer[1] for layer in g.layers] for g in start.adapters.layout.groups]
    model = AutoModelForCausalLM.from_pretrained(model_dir).requires_grad_(False)
    adapted = Adapted(model.model.layers[-1].mlp.down_proj, 32)
    model.model.layers[-1].mlp.down_proj = adapted
    owned = [*adapted.down.cores, adapted.down.bias, *adapted.up.cores, adapted.up.bias]
    adapted.up.shape = adapted.down.shape.mirrored()
    for parameter, (where, size) in zip(owned, [*slices_down, *slices_up], strict=True):
        parameter.data = start.adapters.theta[where].view(size[1:]).squeeze(0 if parameter.ndim == 1 else ()).clone()
    optimizer = torch.optim.AdamW(owned, lr=1e-2, weight_decay=0.0)
    for batch in batches.seen:
        optimizer.zero_grad()
        ends = batch["attention_mask"].sum(1) - 1
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        scores = logits[torch.arange(4), ends][:, batch["option_ids"][:, 0]]
        F.cross_entropy(scores, batch["label"]).backward()
        optimizer.step()
    expected = torch.cat([parameter.detach().flatten() for parameter in owned])
    assert not torch.allclose(expected, start.adapters.theta, atol=1e-3)
    # AdamW divides by the root of small squares, which magnifies rounding
    torch.testing.assert_close(module.adapters.theta.detach(), expected, atol=1e-4, rtol=1e-2)
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["adapters.theta"]


def test_checkpoints_hold_the_vector_and_resume_to_the_same_bits(model_dir, tmp_path):
    _, whole = fit(model_dir, tmp_path / "whole", steps=6)
    fit(model_dir, tmp_path / "parts", steps=4, save=True)
    _, resumed = fit(model_dir, tmp_path / "parts", steps=6, save=True, resume=True)
    assert torch.equal(resumed.adapters.theta, whole.adapters.theta)
    file = tmp_path / "parts" / "last.ckpt"
    assert set(torch.load(file, weights_only=True)["state_dict"]) == {"adapters.theta"}
    assert file.stat().st_size <= 3 * 4 * whole.adapters.num_parameters + 64 * 1024
    for change, message in (
        ({"trainable": Weights()}, "`trainable` differs: saved TensorTrainAdapters, here Weights"),
        ({"trainable": settings(rank=3)}, "`rank` differs"),
        ({"trainable": settings(layers="last:1")}, "`layers`"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(model_dir, tmp_path / "parts", steps=8, save=True, resume=True, **change)


def test_adapters_are_exchanged_with_the_zeroth_order_module(model_dir, tmp_path):
    _, module = fit(model_dir, tmp_path)
    module.save_adapters(tmp_path / "adapter")
    other = ZerothOrderModule(str(model_dir), trainable=settings())
    other.load_adapters(tmp_path / "adapter")
    assert torch.equal(other.adapters.theta, module.adapters.theta)
    plain = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    load_adapters(plain, tmp_path / "adapter")
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, module.backbone.eval()(ids).logits)


def test_the_vector_stays_fp32(model_dir, tmp_path):
    _, module = fit(model_dir, tmp_path, trainer_options={"precision": "bf16-true"})
    assert module.adapters.theta.dtype == torch.float32
    assert module.backbone.dtype == torch.bfloat16


def test_what_does_not_fit_is_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match="`weight_decay` to be 0 for TensorTrainAdapters"):
        FirstOrderModule("nowhere/at/all", trainable=settings(), weight_decay=0.1)
    with pytest.raises(ValueError, match="at most the 3 blocks"):
        FirstOrderModule(str(model_dir), trainable=settings(layers="last:4"))
    module = FirstOrderModule(str(model_dir), trainable=settings())
    with pytest.raises(ValueError, match="`setup` inserts them"):
        module.save_adapters(tmp_path)
    with pytest.raises(ValueError, match="`trainable` to be PeftLoRA"):
        module.merge()
