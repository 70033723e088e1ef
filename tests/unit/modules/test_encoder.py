import math

import pytest
import torch
from helpers.causal_lms import collate, rows_of, save_tiny_lm, step_loader, text_batch
from helpers.encoders import KINDS, SIZES, labelled_batch, save_tiny_encoder, tiny_encoder
from helpers.zo_run import components, train, trainable_of
from lightning.pytorch import Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModel

from wandazeta.adapters import LoRAAdapters, PeftLoRA, TensorTrainAdapters, Weights, remove_adapters
from wandazeta.callbacks import WandaPPPruneCallback
from wandazeta.cli.main import PruningTrainer
from wandazeta.models.encoder import EncoderClassifier
from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import FirstOrderModule, LanguageModel, ZerothOrderModule
from wandazeta.zeroth_order import direction

NUM_CLASSES, WIDTH = 3, SIZES["hidden_size"]
HEAD = NUM_CLASSES * WIDTH + NUM_CLASSES
LOADING = LoadingOptions(num_classes=NUM_CLASSES)


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    return {kind: save_tiny_encoder(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def ready(directory, **options):
    """A module with its adapters in place, outside a trainer."""
    module = ZerothOrderModule(str(directory), **components({"loading": LOADING} | options))
    module.setup("test")
    return module


def reference_losses(module, thetas, batch):
    """One vector and one unpadded example at a time; the head is sliced off by hand."""
    stored, losses = module.adapters.theta.clone(), []
    for theta in thetas:
        module.adapters.theta.copy_(theta)
        weight, bias = theta[-HEAD:-NUM_CLASSES].view(NUM_CLASSES, WIDTH), theta[-NUM_CLASSES:]
        logits = []
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            hidden = module.backbone.encoder(input_ids=ids[mask.bool()][None]).last_hidden_state[0]
            logits.append(weight @ hidden.mean(0) + bias)
        losses.append(F.cross_entropy(torch.stack(logits), batch["label"]))
    module.adapters.theta.copy_(stored)
    return torch.stack(losses).double()


def copies(module, num):
    generator = torch.Generator().manual_seed(1)
    return module.adapters.theta + 0.1 * torch.randn(num, module.adapters.num_parameters, generator=generator)


@pytest.mark.parametrize("layers", ["all", "last:2", "last:1"])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_losses_are_those_of_one_copy_and_one_example_at_a_time(model_dirs, kind, layers):
    module, batch = ready(model_dirs[kind], adapter_layers=layers), labelled_batch()
    thetas = copies(module, 4)
    with torch.no_grad():
        losses = module.losses(thetas, module.scorer.prepare(batch))
        assert module.scorer.prefix is not None
        assert module.scorer.prefix.num_bytes > 0
        expected = reference_losses(module, thetas, batch)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


def test_lora_factors_and_the_head_fold_too(model_dirs):
    module, batch = ready(model_dirs["bert"], trainable=LoRAAdapters(2)), labelled_batch()
    assert module.adapters.num_parameters == module.adapters.layout.num_parameters + HEAD
    assert not any("pooler" in site.name for site in module.adapters.sites)
    thetas = copies(module, 4)
    with torch.no_grad():
        losses = module.losses(thetas, module.scorer.prepare(batch))
        expected = reference_losses(module, thetas, batch)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


def test_a_head_starts_with_equal_classes_and_the_sites_are_the_papers(model_dirs):
    module, batch = ready(model_dirs["bert"]), labelled_batch()
    with torch.no_grad():
        loss = module.losses(module.adapters.theta[None], module.scorer.prepare(batch))
    torch.testing.assert_close(loss.exp(), torch.tensor([3.0], dtype=torch.float64))
    places = {(site.position, site.name) for site in module.adapters.sites}
    assert places == {("after", "attention.output.dense"), ("after", "output.dense")}
    assert module.adapters.num_parameters == module.adapters.layout.num_parameters + HEAD
    # biases do not decay
    assert module.adapters.decay_mask[-HEAD:-NUM_CLASSES].all()
    assert not module.adapters.decay_mask[-NUM_CLASSES:].any()


def test_one_step_moves_adapters_and_head(model_dirs, tmp_path):
    pool = labelled_batch(12)
    _, module, recorder = train(model_dirs["bert"], tmp_path, steps=1, queries=2, batch=pool, loading=LOADING, seed=5)
    plain = ready(model_dirs["bert"], prefix_cache_gib=0, seed=5)
    rows = torch.tensor(recorder.steps[1]["batch"]).view(4, -1)
    places = [int((pool["input_ids"] == row).all(1).nonzero()) for row in rows]
    batch = {name: values[places] for name, values in pool.items()}
    theta, gradient = plain.adapters.theta, torch.zeros_like(plain.adapters.theta)
    with torch.no_grad():
        for query in range(2):
            z = direction(5, 0, query, theta.numel())
            plus, minus = reference_losses(plain, torch.stack([theta + 1e-3 * z, theta - 1e-3 * z]), batch)
            gradient += (plus - minus).float() / 2e-3 * z / 2
    torch.testing.assert_close(module.adapters.theta, theta - 3e-3 * gradient, atol=2e-5, rtol=1e-3)
    assert (module.adapters.theta[-HEAD:] != 0).all()


def test_training_lowers_the_loss_and_adapters_come_back(model_dirs, tmp_path):
    settings = {"batch": labelled_batch(12), "loading": LOADING, "query_chunk_size": 8}
    _, module, recorder = train(
        model_dirs["mpnet"], tmp_path, steps=60, queries=8, learning_rate=2e-2, save_every=30, **settings
    )
    losses = [recorder.steps[step]["loss"] for step in range(1, 61)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    module.save_adapters(tmp_path / "adapters")
    fresh = ready(model_dirs["mpnet"])
    fresh.load_adapters(tmp_path / "adapters")
    assert torch.equal(fresh.adapters.theta, module.adapters.theta)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if "backbone" in name]
    other = ZerothOrderModule(str(model_dirs["mpnet"]), LoadingOptions(num_classes=2), trainable=trainable_of({}))
    with pytest.raises(ValueError, match="new head"):
        other.load_adapters(tmp_path / "adapters")


@pytest.mark.parametrize("trainable", [TensorTrainAdapters(2, 8), LoRAAdapters(2)], ids=["tensor_train", "lora"])
def test_exported_adapters_bring_their_head(model_dirs, tmp_path, monkeypatch, trainable):
    module, batch = ready(model_dirs["bert"], trainable=trainable), labelled_batch()
    module.adapters.theta.copy_(copies(module, 1)[0])
    module.save_adapters(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"`head` ({WIDTH} to {NUM_CLASSES})" in card
    scope = {}
    monkeypatch.chdir(tmp_path)
    exec(card.split("```python\n")[1].split("```")[0], scope)
    model = scope["model"].eval()
    inputs = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        logits = module.backbone(*inputs).logits
        torch.testing.assert_close(model(*inputs).logits, logits)
        if isinstance(trainable, LoRAAdapters):
            peft = pytest.importorskip("peft")
            model = EncoderClassifier(AutoModel.from_pretrained(model_dirs["bert"]), NUM_CLASSES).eval()
            again = peft.PeftModel.from_pretrained(model, tmp_path)
            torch.testing.assert_close(again(*inputs).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", ["all", "biases_and_head"])
def test_weights_are_trained_with_the_head(model_dirs, tmp_path, parts):
    start = ZerothOrderModule(str(model_dirs["mpnet"]), LOADING).backbone.state_dict()
    settings = {"batch": labelled_batch(12), "loading": LOADING, "trainable": Weights(parts)}
    _, module, _ = train(model_dirs["mpnet"], tmp_path, steps=3, save_every=3, **settings)
    moved = {name for name, value in module.backbone.state_dict().items() if not torch.equal(value, start[name])}
    assert {"head.weight", "head.bias"} <= moved
    assert not any("pooler" in name for name in moved)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["backbone.head.weight"], module.backbone.head.weight)


def test_evaluation_and_predictions(model_dirs):
    module, batch = ready(model_dirs["roberta"], prefix_cache_gib=0), labelled_batch(7)
    module.adapters.theta.copy_(copies(module, 1)[0])
    loader = DataLoader(rows_of(batch), batch_size=2, collate_fn=collate)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (metrics,) = trainer.test(module, loader, verbose=False)
    with torch.no_grad():
        expected = reference_losses(module, module.adapters.theta[None], batch)[0].item()
    assert metrics["test/option_loss"] == pytest.approx(expected, rel=1e-5)
    predicted = torch.cat([p["prediction"] for p in trainer.predict(module, loader)])
    assert metrics["test/accuracy"] == pytest.approx((predicted == batch["label"]).float().mean().item())


def test_adapters_come_out_again(model_dirs):
    module, batch = ready(model_dirs["bert"]), labelled_batch()
    module.adapters.theta.copy_(copies(module, 1)[0])
    remove_adapters(module.backbone)
    plain = EncoderClassifier(tiny_encoder("bert"), NUM_CLASSES)
    plain.load_state_dict(module.backbone.state_dict())
    with torch.no_grad():
        assert not plain(batch["input_ids"], batch["attention_mask"]).logits.any()


def test_a_pruned_encoder_is_fine_tuned(model_dirs, tmp_path):
    prune = WandaPPPruneCallback(
        method="wanda",
        num_calibration_samples=8,
        calibration=DataLoader(rows_of(labelled_batch(8)), batch_size=1, collate_fn=collate),
        output_dir=str(tmp_path / "pruning"),
    )
    settings = {"batch": labelled_batch(12), "loading": LOADING, "steps": 2}
    _, module, _ = train(model_dirs["mpnet"], tmp_path, callbacks=[prune], **settings)
    remove_adapters(module.backbone)
    weights = [p for n, p in module.backbone.encoder.named_parameters() if ".layer." in n and p.ndim == 2]
    assert len(weights) == 3 * 6
    assert all(((w.view(-1, 4) == 0).sum(1) == 2).all() for w in weights)
    assert module.backbone_key == module.pruned_backbone_key != ""


def test_a_pruned_encoder_is_exported_without_the_head(model_dirs, tmp_path):
    batches = [{name: values[:1] for name, values in labelled_batch(8, seed=seed).items()} for seed in range(4)]
    prune = WandaPPPruneCallback(
        method="magnitude",
        num_calibration_samples=4,
        calibration=DataLoader(batches, batch_size=None),
        output_dir=str(tmp_path / "pruning"),
    )
    trainer = PruningTrainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[prune])
    module = LanguageModel(str(model_dirs["bert"]), LOADING)
    trainer.prune(module, output_dir=str(tmp_path / "pruned"))
    state = LanguageModel(str(tmp_path / "pruned"), LOADING).backbone.state_dict()
    assert state.keys() == module.backbone.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.backbone.state_dict().items())
    assert prune.report.sparsity == 0.5


@pytest.mark.parametrize("trainable", [PeftLoRA(2), TensorTrainAdapters(), Weights()])
def test_back_propagation_trains_the_head_too(model_dirs, tmp_path, trainable):
    pytest.importorskip("peft")
    module = FirstOrderModule(str(model_dirs["bert"]), LOADING, trainable=trainable, learning_rate=1e-2, seed=3)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0  # layers as small as these learn little beside it
    trainer = Trainer(
        accelerator="cpu",
        max_steps=60,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    batch = labelled_batch(12)
    trainer.fit(module, step_loader(batch, 4, trainer))
    assert trainer.callback_metrics["train/loss"] < 0.7 * math.log(NUM_CLASSES)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    if isinstance(trainable, TensorTrainAdapters):
        assert trained == {"adapters.theta"}
        assert (module.adapters.theta[-HEAD:] != 0).all()
        return
    assert any("head" in name for name in trained)
    assert not any("pooler" in name for name in trained)
    if isinstance(trainable, Weights):
        return
    assert len([name for name in trained if "lora_A" in name]) == 3 * 6
    module.eval()
    with torch.no_grad():
        logits = module.backbone(batch["input_ids"], batch["attention_mask"]).logits
        module.save_adapters(tmp_path / "adapter")
        module.merge()
        merged = module.backbone(batch["input_ids"], batch["attention_mask"]).logits
        assert isinstance(module.backbone.head, torch.nn.Linear)
        torch.testing.assert_close(merged, logits, atol=1e-4, rtol=1e-4)

        from peft import PeftModel

        again = PeftModel.from_pretrained(
            EncoderClassifier(AutoModel.from_pretrained(model_dirs["bert"]), NUM_CLASSES).eval(), tmp_path / "adapter"
        )
        loaded = again(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(loaded, logits)


def test_16_bit_encoders_have_a_head_in_fp32(model_dirs):
    module, batch = (
        ready(model_dirs["bert"], loading=LoadingOptions("bfloat16", num_classes=NUM_CLASSES)),
        labelled_batch(),
    )
    thetas = copies(module, 2)
    with torch.no_grad():
        prepared = module.scorer.prepare(batch)
        with module.adapters.use(thetas):
            scores = module.scorer.option_scores(prepared, 2).values
    assert not torch.equal(scores, scores.bfloat16().double())


def test_what_does_not_fit_is_refused(model_dirs, tmp_path):
    with pytest.raises(ValueError, match="`num_classes` to be at least 2"):
        LoadingOptions(num_classes=1)
    with pytest.raises(ValueError, match="leave `num_classes` out"):
        LanguageModel(str(save_tiny_lm(tmp_path)), LoadingOptions(num_classes=2))
    with pytest.raises(ValueError, match="`stream_weights`"):
        LoadingOptions(num_classes=2, stream_weights=True)
    with pytest.raises(ValueError, match="`parts` to be all or biases_and_head"):
        ZerothOrderModule(str(model_dirs["bert"]), LoadingOptions(num_classes=2), Weights("biases"))
    scorer = LanguageModel(str(model_dirs["bert"]), LoadingOptions(num_classes=2)).scorer
    with pytest.raises(ValueError, match="batch with `label`"):
        scorer.prepare(text_batch())
    batch = labelled_batch()
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="right-padded"):
        scorer.prepare(batch)
