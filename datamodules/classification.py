"""Labelled text for a classification head: balanced splits, tokens and labels."""

import random
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from wandazeta.data.prompts import encode_text
from wandazeta.data.sources import (
    SPLITS,
    Document,
    Split,
    check_fractions,
    load_tokenizer,
    read_documents,
    split_of,
)
from wandazeta.datamodules.step_sampler import BatchDataset, StepSampler
from wandazeta.datamodules.text import TextDataModule
from wandazeta.utilities.arguments import check_positive

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """One text: its tokens, its class and a number that no other example of any split has."""

    input_ids: list[int]
    label: int
    example_id: int


class ClassificationDataModule(LightningDataModule):
    """Balanced splits of a labelled source as text for a model with a classification head.

    A batch of B texts holds `input_ids` and `attention_mask` (B, T), padded on the right, `label` (B) and `example_id`
    (B), all int64. The text has the special tokens that the tokenizer puts around it.

    Args:
        source: Labelled text: "sample:rotten-tomatoes", "sample:imdb", "sample:bbc-news", "sample:brown-genres", a
            file, folder or glob of .jsonl or .parquet files, or a hub dataset.
        num_classes: Number of classes.
        tokenizer: Model directory or hub name of the tokenizer; by default the model's own.
        batch_size: Examples per training batch.
        eval_batch_size: Examples per batch of validation and test.
        num_train: Training examples, balanced over the classes; null for all that can be balanced.
        num_val: Validation examples, balanced; null for all that can be balanced.
        num_test: Test examples, balanced; null for all that can be balanced.
        max_length: Most tokens of an example; by default what the tokenizer says that its model takes.
        truncate: Shorten the text of examples that exceed max_length; otherwise they are an error.
        padding: "fixed" pads every training batch to the length of the longest example, "batch" to its own longest,
            as it is done for validation and test.
        pad_token: Token to pad with where the tokenizer has none.
        text_column: Column with the text.
        label_column: Column with the class: its number, or one of the names in label_names.
        label_names: What stands in the label column for each class; by default the numbers 0, 1, ….
        dataset_config: Configuration of a hub dataset.
        max_documents: Read no more rows than these.
        split_fractions: Shares of train, val and test, by the hash of each example's id.
        calibration: Text to calibrate a pruning with; by default the training examples.
        num_calibration_samples: Training examples that `calibration_dataloader` gives when there is no such text.
        seed: Seed of the choice of examples and of the order of training.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if the source has too few examples, a text is too
            long, or there is no pad token.
    """

    def __init__(
        self,
        source: str = "sample:rotten-tomatoes",
        num_classes: int = 2,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        num_train: int | None = 1000,
        num_val: int | None = 500,
        num_test: int | None = 1000,
        max_length: int | None = None,
        truncate: bool = False,
        padding: Literal["fixed", "batch"] = "fixed",
        pad_token: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        label_names: list[str] | None = None,
        dataset_config: str | None = None,
        max_documents: int | None = None,
        split_fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
        calibration: TextDataModule | None = None,
        num_calibration_samples: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            max_length=max_length,
            max_documents=max_documents,
            num_calibration_samples=num_calibration_samples,
        )
        check_fractions(split_fractions)
        if num_classes < 2:
            raise ValueError(f"Expected argument `num_classes` to be at least 2, but got {num_classes}")
        if label_names is not None and len(label_names) != num_classes:
            raise ValueError(
                f"Expected argument `label_names` to have one name per class ({num_classes}), but got {label_names}"
            )
        self._sizes: dict[Split, int | None] = {"train": num_train, "val": num_val, "test": num_test}
        for split, size in self._sizes.items():
            if size is not None and (size < num_classes or size % num_classes):
                raise ValueError(
                    f"Expected argument `num_{split}` to be a multiple of the number of classes ({num_classes}), "
                    f"for the split is balanced, but got {size}"
                )
        if padding not in ("fixed", "batch"):
            raise ValueError(f'Expected argument `padding` to be "fixed" or "batch", but got {padding!r}')
        self.source = source
        self.num_classes = num_classes
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_length = max_length
        self.truncate = truncate
        self.padding = padding
        self.pad_token = pad_token
        self.text_column = text_column
        self.label_column = label_column
        self.label_names = label_names
        self.dataset_config = dataset_config
        self.max_documents = max_documents
        self.split_fractions = split_fractions
        self.calibration = calibration
        self.num_calibration_samples = num_calibration_samples
        self.seed = seed
        self._chosen: dict[Split, list[tuple[str, int]]] | None = None
        self._examples: dict[Split, list[Example]] = {}

    @override
    def prepare_data(self) -> None:
        self._choose()
        if self.calibration is not None:
            self.calibration.prepare_data()

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._examples:
            return
        tokenizer = load_tokenizer(self.tokenizer, self.trainer)
        self.tokenizer = tokenizer
        pad_token_id = tokenizer.pad_token_id
        if self.pad_token is not None:
            pad_token_id = tokenizer.get_vocab().get(self.pad_token)
        if pad_token_id is None:
            raise ValueError(
                "Expected the tokenizer to have a pad token, but got "
                f"{'none' if self.pad_token is None else f'no token {self.pad_token!r}'}; "
                "set `pad_token` to a token of its vocabulary, for instance its end-of-text token"
            )
        self._pad_token_id = pad_token_id
        # all splits whatever the stage: ids and the padded length must not depend on it
        count = 0
        for split, chosen in self._choose().items():
            encoded = [self.encode(tokenizer, text) for text, _ in chosen]
            self._examples[split] = [
                Example(tokens, label, count + index)
                for index, (tokens, (_, label)) in enumerate(zip(encoded, chosen, strict=True))
            ]
            count += len(chosen)
        self._length = max(len(example.input_ids) for rows in self._examples.values() for example in rows)
        if self.calibration is not None:
            self.calibration.tokenizer = self.calibration.tokenizer or tokenizer
            self.calibration.setup(stage)

    def encode(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Return the tokens of one text; overridable."""
        return encode_text(tokenizer, text, self.max_length or tokenizer.model_max_length, self.truncate)

    def examples(self, split: Split) -> list[Example]:
        """Return the examples of a split, in a fixed shuffled order, classes balanced."""
        return self._examples[split]

    def texts(self, split: Split) -> tuple[list[str], list[int]]:
        """Return the texts and labels of a split as they are in the source, for baselines on the same data."""
        chosen = self._choose()[split]
        return [text for text, _ in chosen], [label for _, label in chosen]

    def fingerprint(self) -> str:
        """Digest the training examples, for ranks to find out whether they have the same."""
        digest = sha256()
        for example in self.examples("train"):
            digest.update(repr(example).encode())
        return digest.hexdigest()

    def collate(self, examples: list[Example], to_longest: bool = False) -> Batch:
        """Pad examples into a batch, as `padding` says or `to_longest` of them."""
        longest = max(len(example.input_ids) for example in examples)
        length = longest if to_longest or self.padding == "batch" else self._length
        input_ids = torch.full((len(examples), length), self._pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, example in enumerate(examples):
            input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
            attention_mask[row, : len(example.input_ids)] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "label": torch.tensor([example.label for example in examples]),
            "example_id": torch.tensor([example.example_id for example in examples]),
        }

    def calibration_dataloader(self) -> DataLoader[Batch]:
        """Return the calibration text, or without one the first training examples, one to a batch and unpadded."""
        if self.calibration is not None:
            return self.calibration.calibration_dataloader()
        examples = self.examples("train")[: self.num_calibration_samples]
        if len(examples) < self.num_calibration_samples:
            raise ValueError(
                f"Expected argument `num_calibration_samples` to be at most the {len(examples)} training examples, "
                f"but got {self.num_calibration_samples}"
            )
        rows = [{"input_ids": torch.tensor([example.input_ids])} for example in examples]
        batches = [row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        examples = self.examples("train")
        sampler = StepSampler(examples, self.batch_size, self.seed, self.trainer)
        return DataLoader(BatchDataset(examples, self.collate), sampler=sampler, batch_size=None)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader("val")

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.examples("test"))

    def _eval_loader(self, split: Split) -> DataLoader[Any]:
        # neighbours of one length: half the tokens of most sources would be padding otherwise
        return self._loader(sorted(self.examples(split), key=lambda example: len(example.input_ids)))

    def _loader(self, examples: list[Example]) -> DataLoader[Any]:
        collate = partial(self.collate, to_longest=True)
        return DataLoader(examples, batch_size=self.eval_batch_size, collate_fn=collate)  # type: ignore[arg-type]

    def _choose(self) -> dict[Split, list[tuple[str, int]]]:
        """Draw each split's balanced examples (text, class); by id and seed, not by the order of the source."""
        if self._chosen is None:
            documents = read_documents(
                self.source,
                text_column=self.text_column,
                label_column=self.label_column,
                dataset_config=self.dataset_config,
                max_documents=self.max_documents,
            )
            pools: dict[Split, list[list[str]]] = {split: [[] for _ in range(self.num_classes)] for split in SPLITS}
            for document in documents:
                pools[split_of(document.id, self.split_fractions)][self._class_of(document)].append(document.text)
            self._chosen = {split: self._balanced(split, pools[split]) for split in SPLITS}
        return self._chosen

    def _class_of(self, document: Document) -> int:
        names = self.label_names if self.label_names is not None else range(self.num_classes)
        if document.label not in names:
            raise ValueError(
                f"Expected the labels of {self.source!r} to be among {list(names)}, but got {document.label!r}; "
                "set the number of classes, and `label_names` where the labels are not 0, 1, …"
            )
        return names.index(document.label)  # type: ignore[arg-type]

    def _balanced(self, split: Split, pools: list[list[str]]) -> list[tuple[str, int]]:
        smallest = min(map(len, pools))
        size = self._sizes[split]
        per_class = smallest if size is None else size // self.num_classes
        if per_class > smallest or per_class == 0:
            raise ValueError(
                f"Expected argument `num_{split}` to be at most {smallest * self.num_classes}, what the {split} split "
                f"of {self.source!r} has in balance, but got {size}; ask for fewer, give more data or change "
                "`split_fractions`"
            )
        generator = random.Random(f"{self.seed}-{split}")
        chosen = [(text, label) for label, pool in enumerate(pools) for text in generator.sample(pool, per_class)]
        generator.shuffle(chosen)
        return chosen
