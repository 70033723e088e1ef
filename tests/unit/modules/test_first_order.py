import pytest
import torch
from helpers.causal_lms import classification_batch, rows_of, save_tiny_lm, step_loader, text_batch, tiny_lm
from helpers.first_order import block_weights, fit, prune
from helpers.masked import is_positive_zero
from lightning.pytorch import Callback, Trainer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from wandazeta.adapters import LoRAAdapters, PeftLoRA, Weights, trainables
from wandazeta.adapters.files import load_adapters
from wandazeta.modules import FirstOrderModule, LanguageModel

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pruned_dir(tmp_path_factory):
    return prune(save_tiny_lm(tmp_path_factory.mktemp("pruned")))


class Batches(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(batch)


def plain_loss(model, batch):
    """The loss, written out with the outputs of the whole model."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if "label" not in batch:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    ends = batch["attention_mask"].sum(1) - 1
    scores = logits[torch.arange(len(ends)), ends][:, batch["option_ids"][:, 0]]
    return F.cross_entropy(scores, batch["label"])


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [False, True], ids=["options", "text"])
def test_full_training_is_what_a_plain_loop_does(model_dir, tmp_path, text):
    batches = Batches()
    _, module = fit(model_dir, tmp_path, batches, trainable=Weights(), text=text, learning_rate=1e-3, weight_decay=0.1)
    model = tiny_lm()
    model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], 1e-3
    )
    for batch in batches.seen:
        optimizer.zero_grad()
        plain_loss(model, batch).backward()
        optimizer.step()
    assert len(batches.seen) == 4
    for name, weight in model.named_parameters():
        # AdamW divides by the root of small squares, which magnifies rounding
        torch.testing.assert_close(module.backbone.get_parameter(name), weight, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("text", [False, True], ids=["options", "text"])
def test_lora_training_is_what_peft_does_by_itself(model_dir, tmp_path, text):
    from peft import LoraConfig, get_peft_model

    batches = Batches()
    _, module = fit(
        model_dir, tmp_path, batches, text=text, trainable=PeftLoRA(2, 6, target_modules=["q_proj", "up_proj"])
    )
    torch.manual_seed(3)
    model = get_peft_model(tiny_lm(), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for batch in batches.seen:
        optimizer.zero_grad()
        plain_loss(model, batch).backward()
        optimizer.step()
    theirs = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    assert {f"backbone.{name}" for name in theirs} == module.adapter_names
    for name, weight in theirs.items():
        torch.testing.assert_close(module.backbone.get_parameter(name), weight, atol=1e-4, rtol=1e-2)


def test_batches_are_those_of_the_zeroth_order_module(model_dir, tmp_path):
    from helpers.zo_run import train

    batches = Batches()
    fit(model_dir, tmp_path / "first", batches, steps=6)
    _, _, recorder = train(model_dir, tmp_path / "zeroth", steps=6)
    assert [batch["input_ids"].flatten().tolist() for batch in batches.seen] == [
        recorder.steps[step]["batch"] for step in range(1, 7)
    ]


@pytest.mark.parametrize("trainable", [PeftLoRA(2), Weights()], ids=["lora", "weights"])
def test_training_lowers_the_loss_and_metrics_are_logged(model_dir, tmp_path, trainable):
    class Losses(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.seen.append(float(trainer.callback_metrics["train/loss"]))

    losses = Losses()
    trainer, module = fit(model_dir, tmp_path, losses, trainable=trainable, steps=30, learning_rate=3e-3)
    assert sum(losses.seen[-5:]) < 0.8 * sum(losses.seen[:5])
    assert trainer.callback_metrics["lr"] == pytest.approx(3e-3)
    (result,) = trainer.validate(module, step_loader(classification_batch(20), 4, None), verbose=False)
    assert result["val/accuracy"] > 0.5
    (result,) = trainer.validate(module, step_loader(text_batch(20), 4, None), verbose=False)
    assert result["val/perplexity"] > 1


def test_learning_rate_scheduler_is_followed(model_dir, tmp_path):
    seen = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    schedule = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))  # noqa: E731
    fit(model_dir, tmp_path, Rates(), lr_scheduler=schedule)
    assert seen == pytest.approx([1e-2 / (1 + step) for step in range(4)])
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        fit(model_dir, tmp_path, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)


def test_lora_starts_from_its_seed_and_leaves_the_random_numbers_alone(model_dir):
    starts = []
    for seed in (3, 3, 4):
        module = FirstOrderModule(str(model_dir), seed=seed)
        before = torch.get_rng_state()
        module.setup("validate")
        assert torch.equal(torch.get_rng_state(), before)
        starts.append({name: module.get_parameter(name) for name in module.adapter_names if "lora_A" in name})
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert not any(torch.equal(starts[0][name], starts[2][name]) for name in starts[0])


def test_dropout_is_on_in_training_and_off_in_validation(model_dir, tmp_path):
    _, module = fit(model_dir, tmp_path, trainable=PeftLoRA(2, dropout=0.5), steps=1)
    dropouts = [m for m in module.backbone.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts
    # the model's own, too, which comes from its files in evaluation mode
    assert all(part.training for part in module.backbone.modules())
    modes = []
    dropouts[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
        module, step_loader(classification_batch(20), 4, None), verbose=False
    )
    assert modes
    assert not any(modes)


def test_adapters_are_fp32_on_a_16_bit_backbone(model_dir, tmp_path):
    _, module = fit(model_dir, tmp_path, dtype="bfloat16")
    assert {module.get_parameter(name).dtype for name in module.adapter_names} == {torch.float32}
    assert module.backbone.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16


# -- pruned backbones -------------------------------------------------------------------------------------------------


def test_adapters_come_after_the_pruning_callback(model_dir, tmp_path):
    from wandazeta.callbacks import WandaPPPruneCallback
    from wandazeta.pruning import RegionalOptimisation, WandaPP

    class Calibration:
        def __iter__(self):
            for row in rows_of(text_batch(8)):
                length = int(row["attention_mask"].sum())
                yield {name: value[None, :length] for name, value in row.items()}

    prune_callback = WandaPPPruneCallback(
        method=WandaPP(optimisation=RegionalOptimisation(rounds=1, samples_per_round=4)),
        num_calibration_samples=8,
        output_dir=str(tmp_path / "pruning"),
    )
    prune_callback.calibration = torch.utils.data.DataLoader(list(Calibration()), batch_size=None)
    _, module = fit(model_dir, tmp_path, prune_callback)
    assert module.backbone_key == prune_callback.key
    weights = block_weights(module.backbone)
    assert weights
    assert all((weight.view(-1, 4) != 0).sum(1).eq(2).all() for weight in weights.values())
    assert all(module.get_parameter(name).any() for name in module.adapter_names)


def test_masked_full_fine_tuning_stays_sparse(pruned_dir, tmp_path):
    from wandazeta.callbacks import KeepSparsity

    _, module = fit(pruned_dir, tmp_path, KeepSparsity(), trainable=Weights(), weight_decay=0.1)
    before = block_weights(AutoModelForCausalLM.from_pretrained(pruned_dir))
    for name, weight in block_weights(module.backbone).items():
        assert is_positive_zero(weight[before[name] == 0])
        assert not torch.equal(weight, before[name])


# -- export -----------------------------------------------------------------------------------------------------------


def logits(model):
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_peft_alone_loads_what_was_saved(pruned_dir, tmp_path):
    from peft import PeftModel

    _, module = fit(pruned_dir, tmp_path)
    module.save_adapters(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"load them by `PeftModel.from_pretrained`"):
        load_adapters(module.backbone, tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned_dir), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(module.backbone))
    assert not torch.allclose(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(pruned_dir)), atol=1e-2)


def test_merging_into_a_dense_backbone(model_dir, tmp_path):
    _, module = fit(model_dir, tmp_path)
    before = logits(module.backbone)
    module.merge()
    torch.testing.assert_close(logits(module.backbone), before, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in module.named_parameters())
    module.backbone.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(module.backbone))


def test_merging_into_a_pruned_backbone(pruned_dir, tmp_path):
    _, module = fit(pruned_dir, tmp_path)
    before = logits(module.backbone)
    with pytest.raises(ValueError, match="a sparse weight becomes dense, and 21 layers such as"):
        module.merge()
    assert torch.equal(logits(module.backbone), before), "refused means that nothing was done"
    sparse = block_weights(AutoModelForCausalLM.from_pretrained(pruned_dir))
    layers = {name: m for name, m in module.backbone.named_modules() if hasattr(m, "lora_A")}
    products = {f"{name}.weight": layer.get_delta_weight("default") for name, layer in layers.items()}
    module.merge(keep_mask=True)
    for name, weight in block_weights(module.backbone).items():
        assert is_positive_zero(weight[sparse[name] == 0])
        kept = sparse[name] != 0
        torch.testing.assert_close(weight[kept], (sparse[name] + products[name])[kept])
    # as a plain model, which is neither merged nor trained again
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.validate(module, step_loader(classification_batch(20), 4, None), verbose=False)
    for action in (module.merge, lambda: module.save_adapters(tmp_path), lambda: module.setup("fit")):
        with pytest.raises(ValueError, match="Expected LoRA adapters to"):
            action()


def test_a_zero_by_chance_is_not_a_pruning(model_dir, tmp_path):
    _, module = fit(model_dir, tmp_path)
    with torch.no_grad():
        module.backbone.model.layers[0].mlp.up_proj.base_layer.weight[0, 0] = 0.0
    module.merge()


def test_full_training_has_no_adapters(model_dir, tmp_path):
    module = FirstOrderModule(str(model_dir), trainable=Weights())
    for action in (module.merge, lambda: module.save_adapters(tmp_path)):
        with pytest.raises(ValueError, match=r"`trainable` to be .*, but got Weights"):
            action()


# -- what a user gets wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("trainable", LoRAAdapters()),
        ("trainable", "lora"),
        ("learning_rate", 0.0),
        ("weight_decay", -0.1),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(argument, value):
    with pytest.raises(ValueError, match=f"Expected argument `{argument}`"):
        FirstOrderModule("nowhere/at/all", **{argument: value})


def test_parts_of_the_weights_are_refused():
    with pytest.raises(ValueError, match="`parts` to be all to train `Weights` by back-propagation, but got 'biases'"):
        FirstOrderModule("nowhere/at/all", trainable=Weights("biases"))


@pytest.mark.parametrize(
    ("argument", "value"), [("rank", 0), ("alpha", 0), ("dropout", 1.0), ("dropout", -0.1), ("target_modules", [])]
)
def test_bad_arguments_of_lora_are_refused(argument, value):
    with pytest.raises(ValueError, match=f"Expected argument `{argument}`"):
        PeftLoRA(**{argument: value})


def test_unknown_target_modules(model_dir):
    with pytest.raises(ValueError, match=r"but got 'mlp.upp_proj'; did you mean `up_proj`"):
        FirstOrderModule(str(model_dir), trainable=PeftLoRA(target_modules=["q_proj", "mlp.upp_proj"]))
    module = FirstOrderModule(str(model_dir), trainable=PeftLoRA(target_modules=["mlp.up_proj"]))
    module.setup("validate")
    assert len([name for name in module.adapter_names if "lora_A" in name]) == 3


def test_without_peft(monkeypatch, model_dir):
    monkeypatch.setattr(trainables, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install peft"):
        FirstOrderModule("nowhere/at/all")
    assert isinstance(FirstOrderModule(str(model_dir), trainable=Weights()), LanguageModel)
