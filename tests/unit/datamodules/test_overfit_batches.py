import json

import pytest
import torch
from helpers.tokenizer import byte_tokenizer
from lightning import LightningModule, Trainer

from wandazeta.datamodules import ClassificationDataModule, PromptedClassificationDataModule, TextDataModule


class Recorder(LightningModule):
    """Writes down the batches that it is trained and validated with."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(batch["input_ids"].tolist())
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch["input_ids"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data_module(kind, source):
    if kind == "text":
        return TextDataModule(source, byte_tokenizer(), sequence_length=16, batch_size=2)
    sizes = {"num_train": 20, "num_val": 8, "num_test": 2, "batch_size": 2, "eval_batch_size": 2}
    if kind == "classification":
        return ClassificationDataModule(source, 2, byte_tokenizer(), **sizes)
    return PromptedClassificationDataModule(source, tokenizer=byte_tokenizer(), **sizes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [2, 0.5])
@pytest.mark.parametrize("kind", ["text", "classification", "prompted"])
def test_every_epoch_has_the_same_batches(tmp_path, kind, limit):
    rows = [{"text": f"document {index}", "label": index % 2} for index in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module, data = Recorder(), data_module(kind, str(tmp_path / "a.jsonl"))
    trainer = Trainer(
        overfit_batches=limit,
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    seen = trainer.num_training_batches
    assert seen == 2 or limit == 0.5
    assert len(module.trained) == 3 * seen
    assert module.trained == module.trained[:seen] * 3
    assert len({str(batch) for batch in module.trained}) == seen
    checked = trainer.num_val_batches[0]
    assert module.validated[-3 * checked :] == module.validated[-checked:] * 3
