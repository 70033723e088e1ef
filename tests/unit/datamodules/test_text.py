import json
from pathlib import Path

import pytest
import torch
from helpers.tokenizer import byte_tokenizer

from wandazeta.data.sources import SourceOptions, split_of
from wandazeta.datamodules import TextDataModule
from wandazeta.pruning.progress.key import digest_batches


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "text.jsonl"
    rows = [{"id": f"d{index}", "text": f"document {index} " + "word " * (20 + index % 7)} for index in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def build(source, **kwargs):
    settings = {"sequence_length": 32, "num_calibration_samples": 10, "batch_size": 4} | kwargs
    data = TextDataModule(source, byte_tokenizer(), **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def test_windows_are_the_documents_of_the_split_without_overlap(source):
    data = build(source)
    tokenizer = byte_tokenizer()
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
        own = [row["text"] for row in rows if split_of(row["id"], (0.8, 0.1, 0.1)) == split]
        expected = tokenizer("".join(text + "\n\n" for text in own), add_special_tokens=False)["input_ids"]
        windows = torch.cat(data.windows(split)).tolist()
        assert len(windows) == len(expected) // 32 * 32
        assert windows == expected[: len(windows)]


def test_batches(source):
    data = build(source)
    for loader, rows in ((data.train_dataloader(), 4), (data.calibration_dataloader(), 1), (data.val_dataloader(), 4)):
        batch = next(iter(loader))
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (rows, 32)
        assert batch["input_ids"].dtype == torch.int64
        assert batch["attention_mask"].all()


def test_calibration_is_drawn_from_train_by_seed(source):
    first, again, other = (
        [tuple(batch["input_ids"][0].tolist()) for batch in build(source, seed=seed).calibration_dataloader()]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    train = {tuple(window.tolist()) for window in build(source).windows("train")}
    assert len(first) == 10
    assert set(first) <= train
    # by default all of them, in an order that begins with the same ones
    loader = build(source, num_calibration_samples=None).calibration_dataloader()
    every = [tuple(batch["input_ids"][0].tolist()) for batch in loader]
    assert every[:10] == first
    assert set(every) == train


def test_eval_windows_and_bos(source):
    data = build(source, eval_windows=3, add_bos=True)
    assert sum(len(batch["input_ids"]) for batch in data.test_dataloader()) == 3
    bos = byte_tokenizer().bos_token_id
    windows = torch.stack(data.windows("val"))
    assert windows.shape[1] == 32
    assert (windows[:, 0] == bos).all()
    assert (windows[:, 1:] != bos).all()


def test_the_start_of_the_windows_is_the_tokenizers_and_part_of_the_key_of_a_pruning(source):
    def digest(tokenizer, add_bos=None):
        data = TextDataModule(source, tokenizer, sequence_length=32, num_calibration_samples=4, add_bos=add_bos)
        return digest_batches(
            list(data.calibration_dataloader()), lambda batch: batch["attention_mask"]
        ), data.starts_with_bos

    adding, plain = byte_tokenizer(bos=True), byte_tokenizer()
    assert digest(adding) == digest(plain, add_bos=True) == digest(adding, add_bos=True)
    assert digest(plain) == digest(adding, add_bos=False)
    assert digest(adding)[0] != digest(plain)[0]
    assert (digest(adding)[1], digest(plain)[1]) == (True, False)


def test_too_little_text(source):
    with pytest.raises(ValueError, match=r"`num_calibration_samples` to be at most \d+"):
        build(source, num_calibration_samples=10_000).calibration_dataloader()
    with pytest.raises(ValueError, match=r"fills a window of `sequence_length` 100000 .* in the train split"):
        build(source, sequence_length=100_000).train_dataloader()
    with pytest.raises(ValueError, match="the test split"):
        build(source, reading=SourceOptions(split_fractions=(0.9, 0.1, 0.0))).test_dataloader()


@pytest.mark.parametrize("name", ["sequence_length", "num_calibration_samples", "batch_size", "eval_windows"])
def test_bad_numbers(name):
    with pytest.raises(ValueError, match=f"Expected argument `{name}` to be an integer larger than 0, but got 0"):
        TextDataModule(**{name: 0})


@pytest.mark.samples
def test_the_wikipedia_sample():
    from wandazeta.data.samples import sample_model

    data = TextDataModule(tokenizer=str(sample_model()), sequence_length=512)
    data.setup()
    sizes = {split: len(data.windows(split)) for split in ("train", "val", "test")}
    assert sizes["train"] >= 128
    assert min(sizes.values()) >= 24, sizes
