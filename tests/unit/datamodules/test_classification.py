import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tokenizer import byte_tokenizer

from wandazeta.data.sources import SourceOptions, split_of
from wandazeta.datamodules import ClassificationDataModule, PromptedClassificationDataModule, TextDataModule

SPLITS = ("train", "val", "test")


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def source(tmp_path):
    # twice as many of class 0 as of class 1
    rows = [
        {"id": f"r{index}", "text": f"{index}{'x' * (index % 9)}", "label": int(index % 3 == 0)} for index in range(300)
    ]
    return write(tmp_path / "reviews.jsonl", rows)


def build(source, words=(" good", " bad"), **kwargs):
    settings = {"num_train": 60, "num_val": 10, "num_test": 10, "batch_size": 8, "eval_batch_size": 3} | kwargs
    data = PromptedClassificationDataModule(
        source, "{text} It was", [" bad", " good"], byte_tokenizer(words), **settings
    )
    data.prepare_data()
    data.setup("fit")
    return data


def test_batches(source):
    data = build(source)
    tokenizer = byte_tokenizer((" good", " bad"))
    for loader, rows in ((data.train_dataloader(), 8), (data.val_dataloader(), 3), (data.test_dataloader(), 3)):
        batch = next(iter(loader))
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (rows, batch["input_ids"].shape[1])
        assert batch["label"].shape == batch["example_id"].shape == (rows,)
        assert tokenizer.batch_decode(batch["option_ids"]) == [" bad", " good"]
        assert batch["option_mask"].all()
        for row in range(rows):
            real = batch["attention_mask"][row].bool()
            # padded on the right
            assert real.tolist() == sorted(real.tolist(), reverse=True)
            assert (batch["input_ids"][row][~real] == tokenizer.pad_token_id).all()
            prompt = tokenizer.decode(batch["input_ids"][row][real])
            number = int(prompt.removesuffix(" It was").rstrip("x"))
            assert int(batch["label"][row]) == int(number % 3 == 0)


def test_text_for_a_head_has_its_special_tokens_and_no_options(source):
    tokenizer = byte_tokenizer(bos=True)
    data = ClassificationDataModule(source, 2, tokenizer, num_train=60, num_val=10, num_test=10, batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.keys() == {"input_ids", "attention_mask", "label", "example_id"}
    texts, labels = data.texts("test")
    for example, text, label in zip(data.examples("test"), texts, labels, strict=True):
        assert tokenizer.decode(example.input_ids) == f"<bos>{text}"
        assert example.label == label
    # the same examples as the prompts are made from
    assert [text for text, _ in data._choose()["train"]] == build(source).texts("train")[0]


def test_text_that_is_too_long_for_the_model(source):
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.model_max_length = 5
    settings = {"num_train": 10, "num_val": 10, "num_test": 10}
    with pytest.raises(ValueError, match="every text to have at most `max_length` 5 tokens"):
        ClassificationDataModule(source, 2, tokenizer, **settings).setup()
    data = ClassificationDataModule(source, 2, tokenizer, truncate=True, **settings)
    data.setup()
    assert data._length == 5


def test_splits_are_balanced_disjoint_and_by_id(source):
    data = build(source)
    seen = set()
    for split, size in zip(SPLITS, (60, 10, 10), strict=True):
        labels = [example.label for example in data.examples(split)]
        assert len(labels) == size
        assert sum(labels) == size // 2
        texts, text_labels = data.texts(split)
        assert text_labels == labels
        assert {split_of(f"r{text.rstrip('x')}", (0.7, 0.15, 0.15)) for text in texts} == {split}
        seen |= {example.example_id for example in data.examples(split)}
    assert seen == set(range(80))


def test_all_that_can_be_balanced(source):
    data = build(source, num_train=None)
    labels = [example.label for example in data.examples("train")]
    assert len(labels) > 60
    assert sum(labels) * 2 == len(labels)


def test_padding(source):
    fixed = {batch["input_ids"].shape[1] for batch in build(source).train_dataloader()}
    assert len(fixed) == 1
    for batch in build(source, padding="batch").train_dataloader():
        assert batch["attention_mask"].any(dim=0).all()


def test_evaluation_sees_neighbours_of_one_length_and_predictions_keep_their_order(source):
    data = build(source)
    lengths, seen = [], []
    for batch in data.val_dataloader():
        assert batch["attention_mask"].any(dim=0).all()
        lengths += batch["attention_mask"].sum(1).tolist()
        seen += batch["example_id"].tolist()
    assert len(set(lengths)) > 1
    assert lengths == sorted(lengths)
    assert sorted(seen) == [example.example_id for example in data.examples("val")]
    predicted = [number for batch in data.predict_dataloader() for number in batch["example_id"].tolist()]
    assert predicted == [example.example_id for example in data.examples("test")]


def test_the_seed_decides_the_choice(source):
    first, again, other = (build(source, seed=seed).texts("train") for seed in (0, 0, 1))
    assert first == again != other


def test_the_fingerprint_is_that_of_the_training_examples(source, tmp_path):
    assert build(source).fingerprint() == build(source, batch_size=4, num_val=20).fingerprint()
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    changed = [row | {"text": row["text"].replace("xxxxxxxx", "xxxxxxxy")} for row in rows]
    assert build(write(tmp_path / "changed.jsonl", changed)).fingerprint() != build(source).fingerprint()


def test_label_names(tmp_path):
    rows = [{"text": f"text {index}", "label": ("neg", "pos")[index % 2]} for index in range(300)]
    source = write(tmp_path / "named.jsonl", rows)
    data = build(source, reading=SourceOptions(label_names=["neg", "pos"]))
    texts, labels = data.texts("train")
    assert all(int(text.removeprefix("text ")) % 2 == label for text, label in zip(texts, labels, strict=True))
    with pytest.raises(ValueError, match=r"among \[0, 1\], but got 'neg'"):
        build(source)


def test_calibration(source, tmp_path):
    data = build(source)
    prompts = list(data.calibration_dataloader())
    assert [batch["input_ids"][0].tolist() for batch in prompts] == [e.input_ids for e in data.examples("train")]
    assert all(batch["input_ids"].shape[0] == 1 and batch["attention_mask"].all() for batch in prompts)
    text = write(tmp_path / "text.jsonl", [{"text": f"{index} " * 30} for index in range(50)])
    calibration = TextDataModule(text, sequence_length=16, num_calibration_samples=7)
    batches = list(build(source, calibration=calibration).calibration_dataloader())
    assert [batch["input_ids"].shape for batch in batches] == [(1, 16)] * 7


def test_the_models_own_tokenizer_is_the_default(source):
    data = PromptedClassificationDataModule(source, num_train=10, num_val=10, num_test=10)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=byte_tokenizer()))
    data.setup("fit")
    assert data.tokenizer is data.trainer.lightning_module.tokenizer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "no place for it"}, r"`template` to contain \{text\}"),
        ({"options": [" yes"]}, "two or more different answers"),
        ({"options": [" yes", " yes"]}, "two or more different answers"),
        ({"num_val": 11}, "`num_val` to be a multiple of the number of classes"),
        ({"num_test": 0}, "`num_test` to be a multiple"),
        ({"reading": SourceOptions(label_names=["a"])}, "one name per class"),
        ({"padding": "left"}, "`padding` to be one of fixed, batch"),
        ({"batch_size": 0}, "`batch_size` to be an integer larger than 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptedClassificationDataModule(**arguments)


def test_bad_number_of_classes(source):
    with pytest.raises(ValueError, match="`num_classes` to be at least 2"):
        ClassificationDataModule(num_classes=1)
    reading = SourceOptions(label_column="id")
    with pytest.raises(ValueError, match=r"among \[0, 1\]"):
        ClassificationDataModule(source, reading=reading, num_train=10, num_val=10, num_test=10).prepare_data()


def test_bad_data(source, tmp_path):
    with pytest.raises(ValueError, match="`num_test` to be at most"):
        build(source, num_test=1000)
    with pytest.raises(ValueError, match="at most `max_length` 8 tokens"):
        build(source, max_length=8)
    with pytest.raises(ValueError, match="'' tokenises to nothing"):
        PromptedClassificationDataModule(
            source, "{text}", ["", " a"], byte_tokenizer(), num_train=10, num_val=10, num_test=10
        ).setup()
    assert build(source, max_length=16, truncate=True)._length <= 16


def test_pad_token(source):
    def data(tokenizer):
        return PromptedClassificationDataModule(source, tokenizer=tokenizer, num_train=10, num_val=10, num_test=10)

    tokenizer = byte_tokenizer(pad=False)
    with pytest.raises(ValueError, match=r"to have a pad token, but it has none; set `loading\.pad_token`"):
        data(tokenizer).setup("fit")
    tokenizer.pad_token = "<eos>"
    padded = data(tokenizer)
    padded.setup("fit")
    batch = padded.collate(padded.examples("train"))
    filled = batch["input_ids"][batch["attention_mask"] == 0]
    assert torch.equal(filled, torch.full_like(filled, byte_tokenizer().eos_token_id))


@pytest.mark.samples
def test_the_sentiment_sample_has_a_thousand_balanced_test_items():
    from wandazeta.data.samples import sample_model

    data = PromptedClassificationDataModule(tokenizer=str(sample_model()), num_train=2000)
    data.setup("fit")
    assert len(data.examples("test")) == 1000
    assert next(iter(data.train_dataloader()))["option_mask"].shape == (2, 1)
