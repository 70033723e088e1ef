import json

import torch
from helpers.causal_lms import classification_batch, save_tiny_lm
from helpers.pruning import Tiny, loader, trainer
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, IterableDataset

from wandazeta.callbacks import PredictionWriter
from wandazeta.modules import LanguageModel


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


class Labels(LightningModule):
    """Predicts whatever it is told to."""

    def __init__(self, predict):
        super().__init__()
        self.predict = predict

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.predict(batch)


def predict(folder, module, data):
    trainer(PredictionWriter(str(folder))).predict(module, data)
    return lines(folder)


def test_prompts_are_written_with_text_label_answer_and_scores(tmp_path):
    module = LanguageModel(str(save_tiny_lm(tmp_path / "model")))
    batches = [classification_batch(4), classification_batch(4, seed=1)]
    found = predict(tmp_path, module, DataLoader(batches, batch_size=None))
    assert len(found) == 8
    for line, row in zip(found, [row for batch in batches for row in range(4) if batch], strict=True):
        assert line["label"] == row % 2
        assert line["example_id"] == row
        assert line["prediction"] == max((0, 1), key=line["scores"].__getitem__)
        assert line["answer"] == module.tokenizer.decode([(7, 9)[line["prediction"]]])
        assert line["text"]


def test_running_text_is_written_with_its_loss(tmp_path):
    module = LanguageModel(str(save_tiny_lm(tmp_path / "model")))
    batch = {name: classification_batch(4)[name] for name in ("input_ids", "attention_mask")}
    found = predict(tmp_path, module, DataLoader([batch], batch_size=None))
    assert [set(line) for line in found] == [{"text", "loss"}] * 4


def test_examples_keep_the_order_of_the_data_however_they_are_batched(tmp_path):
    expected = [row.tolist() for (batch,) in loader() for row in Tiny().eval()(batch)]
    found = predict(tmp_path, Tiny(), loader(shuffle=True))
    assert [line["index"] for line in found] == list(range(16))
    for line, logits in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(line["prediction"]), torch.tensor(logits))


def test_several_loaders_are_told_apart(tmp_path):
    data = [DataLoader(range(3), batch_size=2), DataLoader(range(10, 12))]
    found = predict(tmp_path, Labels(lambda batch: batch), data)
    assert [(line["dataloader"], line["index"], line["prediction"]) for line in found] == [
        *((0, index, index) for index in range(3)),
        *((1, index, 10 + index) for index in range(2)),
    ]


def test_data_without_positions_and_predictions_of_any_kind(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    found = predict(tmp_path, Labels(lambda batch: {"name": "of all", "value": batch.sum()}), DataLoader(Stream(), 2))
    assert found == [{"name": "of all", "value": 1}, {"name": "of all", "value": 2}]
    assert predict(tmp_path, Labels(lambda batch: None), DataLoader(range(2))) == []
