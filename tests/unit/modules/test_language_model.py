import math

import pytest
import torch
from helpers.causal_lms import classification_batch, collate, rows_of, save_tiny_lm, text_batch
from helpers.tokenizer import byte_tokenizer
from lightning.pytorch import Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader

from wandazeta.datamodules import TextDataModule
from wandazeta.models.loading import LoadingOptions
from wandazeta.modules import LanguageModel


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("model"))


def loader(batch, batch_size=2):
    return DataLoader(rows_of(batch), batch_size=batch_size, collate_fn=collate)


def trainer():
    return Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)


def test_perplexity_weighs_tokens_not_batches(model_dir):
    module = LanguageModel(str(model_dir))
    batch = text_batch(5)
    (metrics,) = trainer().validate(module, loader(batch), verbose=False)
    nll = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[mask.bool()]
        with torch.no_grad():
            logits = module.backbone(ids[None]).logits[0, :-1]
        nll += F.cross_entropy(logits, ids[1:], reduction="none").tolist()
    assert metrics["val/loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    # and what it was measured with
    assert metrics["val/sequence_length"] == pytest.approx(batch["attention_mask"].sum(1).double().mean().item())
    assert metrics["val/bos"] == 0.0


def test_accuracy_and_predictions(model_dir):
    module = LanguageModel(str(model_dir))
    batch = classification_batch(7)
    (metrics,) = trainer().test(module, loader(batch), verbose=False)
    predictions = trainer().predict(module, loader(batch))
    predicted = torch.cat([p["prediction"] for p in predictions])
    assert torch.cat([p["example_id"] for p in predictions]).tolist() == list(range(7))
    assert metrics["test/accuracy"] == pytest.approx((predicted == batch["label"]).float().mean().item())
    scores = torch.cat([p["scores"] for p in predictions])
    assert metrics["test/option_loss"] == pytest.approx(F.cross_entropy(scores, batch["label"]).item())


def test_text_and_classification_side_by_side(model_dir):
    module = LanguageModel(str(model_dir))
    results = trainer().validate(module, [loader(text_batch(4)), loader(classification_batch(4))], verbose=False)
    names = set().union(*results)
    assert names == {
        "val/loss/dataloader_idx_0",
        "val/perplexity/dataloader_idx_0",
        "val/sequence_length/dataloader_idx_0",
        "val/bos/dataloader_idx_0",
        "val/accuracy/dataloader_idx_1",
        "val/option_loss/dataloader_idx_1",
    }


@pytest.mark.parametrize("bos", [True, False])
def test_a_perplexity_states_length_and_start_of_its_windows(model_dir, tmp_path, bos):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {index} {"word " * 9}"}}\n' for index in range(40)))
    data = TextDataModule(str(tmp_path / "a.jsonl"), byte_tokenizer(bos=bos), sequence_length=24)
    (metrics,) = trainer().test(LanguageModel(str(model_dir)), data, verbose=False)
    assert metrics["test/sequence_length"] == 24
    assert metrics["test/bos"] == data.starts_with_bos == bos


def test_text_predictions_are_mean_losses(model_dir):
    module = LanguageModel(str(model_dir))
    batch = text_batch(1)
    (prediction,) = trainer().predict(module, loader(batch))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    torch.testing.assert_close(prediction["loss"][0], module.backbone(**batch, labels=labels).loss.detach())


def test_calibration_runs_the_backbone_on_any_batch(model_dir):
    module = LanguageModel(str(model_dir))
    for batch in (text_batch(), classification_batch()):
        assert module.calibration_forward(batch).logits.shape[:2] == batch["input_ids"].shape


def test_dtype(model_dir):
    assert LanguageModel(str(model_dir), LoadingOptions("bfloat16")).backbone.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype"):
        LoadingOptions("int8")


def test_a_missing_model_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="model_name_or_path") as error:
        LanguageModel(str(tmp_path / "nothing"))
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused(tmp_path, model_dir):
    module = LanguageModel(str(model_dir))
    module.backbone.config.save_pretrained(tmp_path)
    module.tokenizer.save_pretrained(tmp_path)
    torch.save(module.backbone.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        LanguageModel(str(tmp_path))


def test_pad_token(tmp_path):
    directory = str(save_tiny_lm(tmp_path, pad=False))
    assert LanguageModel(directory).tokenizer.pad_token is None
    assert LanguageModel(directory, LoadingOptions(pad_token="<eos>")).tokenizer.pad_token == "<eos>"
    with pytest.raises(ValueError, match="pad_token"):
        LanguageModel(directory, LoadingOptions(pad_token="<nonsense>"))
    # as GPT-2 has it
    tokenizer = LanguageModel(directory).tokenizer
    tokenizer.unk_token = "<eos>"
    tokenizer.save_pretrained(directory)
    assert LanguageModel(directory, LoadingOptions(pad_token="<eos>")).tokenizer.pad_token == "<eos>"
