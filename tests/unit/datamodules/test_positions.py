"""Texts that are longer than the positions that the model has learned, in every data module and command."""

import json

import pytest
import torch
from helpers.causal_lms import SIZES, save_tiny_lm, tiny_lm
from helpers.encoders import save_tiny_encoder
from helpers.tokenizer import byte_tokenizer
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from wandazeta.callbacks import WandaPPPruneCallback
from wandazeta.cli.trainer import PruningTrainer
from wandazeta.datamodules import ClassificationDataModule, PromptedClassificationDataModule, TextDataModule
from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import FirstOrderModule, LanguageModel, ZerothOrderModule

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"num_train": 4, "num_val": 4, "num_test": 4, "batch_size": 2}


@pytest.fixture
def source(tmp_path):
    rows = [{"text": f"{index} " + "word " * 10, "label": index % 2} for index in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "a.jsonl")


def trainer(*callbacks):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "max_steps": 1}
    return PruningTrainer(accelerator="cpu", callbacks=list(callbacks), enable_model_summary=False, **quiet)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "prune"])
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_windows_in_every_command(source, tmp_path, kind, command):
    module = (FirstOrderModule if command == "fit" else LanguageModel)(str(save_tiny_lm(tmp_path / "model", kind)))
    pruning = [WandaPPPruneCallback(method="wanda", output_dir=str(tmp_path / "p"))] if command == "prune" else []
    with pytest.raises(ValueError, match=r"`sequence_length` to be at most 64, .* 64 learned positions, but got 100"):
        getattr(trainer(*pruning), command)(module, datamodule=TextDataModule(source, sequence_length=100))
    assert not (tmp_path / "p").exists()


def test_windows_of_the_calibration(source, tmp_path):
    module = FirstOrderModule(str(save_tiny_lm(tmp_path / "model", "gpt2")))
    data = TextDataModule(source, sequence_length=100)
    pruning = WandaPPPruneCallback(method="wanda", calibration=data, output_dir=str(tmp_path / "p"))
    with pytest.raises(ValueError, match="`sequence_length` to be at most 64"):
        trainer(pruning).fit(module, TextDataModule(source, sequence_length=32))
    data = PromptedClassificationDataModule(source, "{text}:", calibration=data, **SMALL)
    with pytest.raises(ValueError, match="`sequence_length` to be at most 64"):
        trainer().fit(FirstOrderModule(str(tmp_path / "model")), data)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_text_for_a_head(source, tmp_path, kind):
    model = str(save_tiny_encoder(tmp_path / "model", kind))
    limit = {"bert": 66, "roberta": 63}[kind]
    for more, message in (
        ({"max_length": 100}, f"`max_length` to be at most {limit}, .*{limit} learned positions, but got 100"),
        ({}, None),
    ):
        data = ClassificationDataModule(source, **SMALL, **more)
        module = FirstOrderModule(model, LoadingOptions(num_classes=2))
        if message is None:
            trainer().fit(module, data)
        else:
            with pytest.raises(ValueError, match=message):
                trainer().fit(module, data)
    # the model's positions are the default, whatever the tokenizer says
    with open(source, "a") as file:
        file.writelines(json.dumps({"text": f"{i} " + "long " * 30, "label": i % 2}) + "\n" for i in range(3000))
    data = ClassificationDataModule(source, **SMALL, seed=1)
    with pytest.raises(ValueError, match=f"`max_length` {limit} tokens, but got 1"):
        trainer().fit(FirstOrderModule(model, LoadingOptions(num_classes=2)), data)
    cut = ClassificationDataModule(source, **SMALL, seed=1, truncate=True)
    trainer().fit(FirstOrderModule(model, LoadingOptions(num_classes=2)), cut)


def test_prompts_with_their_options(source, tmp_path):
    model = str(save_tiny_lm(tmp_path / "model", "gpt2"))

    def fit(options, **more):
        data = PromptedClassificationDataModule(source, "{text}:", options, **SMALL, **more)
        trainer().fit(ZerothOrderModule(model), data)
        return data

    assert fit(["a", "b"], max_length=64)._length <= 64
    with pytest.raises(ValueError, match=r"`max_length` to be at most 61, .* but got 64 and 3 more"):
        fit(["abcd", "b"], max_length=64)
    with pytest.raises(ValueError, match="`max_length` 44 tokens, but got"):
        fit(["a", "x" * 21])
    assert fit(["a", "x" * 21], truncate=True)._length <= 44


def test_a_module_of_somebody_else_and_loaders_without_a_data_module(source, tmp_path):
    class Foreign(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_lm("gpt2")

        def forward(self, input_ids):
            return self.model(input_ids=input_ids)

        training_step = configure_optimizers = lambda self, *args: None

    data = TextDataModule(source, byte_tokenizer(), sequence_length=100)
    with pytest.raises(ValueError, match=r"`sequence_length` to be at most 64, because Foreign has a model"):
        trainer().fit(Foreign(), data)
    batches = [{"input_ids": torch.ones(1, 100, dtype=torch.int64)}]
    pruning = WandaPPPruneCallback(
        method="wanda", calibration=batches, num_calibration_samples=1, output_dir=str(tmp_path / "p")
    )
    with pytest.raises(ValueError, match=r"at most 64 tokens, the number of positions .* but got 100"):
        trainer(pruning).fit(Foreign(), batches)
    batches[0]["attention_mask"] = torch.ones_like(batches[0]["input_ids"])
    module = LanguageModel(str(save_tiny_lm(tmp_path / "model", "gpt2")))
    with pytest.raises(ValueError, match=r"at most 64 tokens, the number of positions .* but got 100"):
        trainer().validate(module, DataLoader(batches, batch_size=None))


def test_the_limit_is_known_before_the_weights_are_loaded(tmp_path):
    module = LanguageModel(str(save_tiny_lm(tmp_path / "model", "opt")), LoadingOptions(shard_on_load=True))
    assert module.max_positions == 64
    module = LanguageModel(str(save_tiny_lm(tmp_path / "rotary", **SIZES)), LoadingOptions(shard_on_load=True))
    assert module.max_positions is None
