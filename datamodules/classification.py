"""LightningDataModule with labelled text for a classification head: balanced splits, tokens and labels."""

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
from wandazeta.data.sources import SPLITS, Document, SourceOptions, Split, read_splits
from wandazeta.datamodules.positions import fitting_length
from wandazeta.datamodules.step_sampler import BatchDataset, StepSampler
from wandazeta.datamodules.text import TextDataModule
from wandazeta.datamodules.tokenizer import find_tokenizer
from wandazeta.models.positions import check_positions
from wandazeta.utilities.arguments import check_choice, check_positive, check_range

Batch = dict[str, torch.Tensor]
_FRACTIONS = (0.7, 0.15, 0.15)


@dataclass(frozen=True)
class Example:
    """One labelled text.

    Args:
        input_ids: Its tokens.
        label: Its class.
        example_id: Number that no other example of any split has.
    """

    input_ids: list[int]
    label: int
    example_id: int


_AUTO_SIZES: dict[Split, int] = {"train": 1000, "val": 500, "test": 1000}


class ClassificationDataModule(LightningDataModule):
    """Balanced splits of labelled text, for a model with a classification head.

    A batch of B texts holds `input_ids` and `attention_mask` `(B, T)`, padded on the right, `label` `(B)` and
    `example_id` `(B)`, all int64. Texts have the special tokens that the tokenizer adds.

    Args:
        source: Labelled text: "sample:rotten-tomatoes", "sample:imdb", "sample:bbc-news", "sample:brown-genres", a
            file, folder or glob of .jsonl, .json, .csv or .parquet files, or a hub dataset.
        num_classes: Number of classes; by default that of `reading.label_names`, else 2.
        tokenizer: Model directory or hub name of the tokenizer; by default that of the module. It needs a pad token.
        batch_size: Examples per training batch.
        eval_batch_size: Examples per batch of validation and test.
        num_train: Training examples, balanced over the classes; null for as many as can be balanced, and `auto` for at
            most 1000.
        num_val: Validation examples, balanced; null for as many as can be balanced, and `auto` for at most 500.
        num_test: Test examples, balanced; null for as many as can be balanced, and `auto` for at most 1000.
        max_length: Maximum number of tokens of an example; by default that of the tokenizer's model, and of the
            positions that the module's model has learned.
        truncate: Shorten the text of longer examples; otherwise they are an error.
        padding: "fixed" pads every training batch to the longest example of all, "batch" to its own longest example,
            as it is always done for validation and test.
        reading: How the source is read and split.
        calibration: Text to calibrate a pruning on; by default the training examples.
        seed: Seed of the choice of examples and of the order of training.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if the source has too few examples, a text is too
            long, or there is no pad token.
    """

    def __init__(
        self,
        source: str = "sample:rotten-tomatoes",
        num_classes: int | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        num_train: int | Literal["auto"] | None = "auto",
        num_val: int | Literal["auto"] | None = "auto",
        num_test: int | Literal["auto"] | None = "auto",
        max_length: int | None = None,
        truncate: bool = False,
        padding: Literal["fixed", "batch"] = "fixed",
        reading: SourceOptions | None = None,
        calibration: TextDataModule | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(batch_size=batch_size, eval_batch_size=eval_batch_size, max_length=max_length)
        reading = reading or SourceOptions()
        if num_classes is None:
            num_classes = 2 if reading.label_names is None else len(reading.label_names)
        check_range("num_classes", num_classes, num_classes >= 2, "at least 2")
        if reading.label_names is not None and len(reading.label_names) != num_classes:
            raise ValueError(
                f"Expected argument `label_names` to have one name per class ({num_classes}), but got "
                f"{reading.label_names}"
            )
        self._sizes: dict[Split, int | Literal["auto"] | None] = {"train": num_train, "val": num_val, "test": num_test}
        for split, size in self._sizes.items():
            if isinstance(size, int) and (size < num_classes or size % num_classes):
                raise ValueError(
                    f"Expected argument `num_{split}` to be a multiple of the number of classes ({num_classes}), "
                    f"because the split is balanced, but got {size}"
                )
        check_choice("padding", padding, ("fixed", "batch"))
        self.source = source
        self.num_classes = num_classes
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_length = max_length
        self.truncate = truncate
        self.padding = padding
        self.reading = reading
        self.calibration = calibration
        self.seed = seed
        self._chosen: dict[Split, list[tuple[str, int]]] | None = None
        self._examples: dict[Split, list[Example]] = {}
        self._limit = max_length
        self._spare = 0
        self._length = 0

    @override
    def prepare_data(self) -> None:
        self._choose()
        if self.calibration is not None:
            self.calibration.prepare_data()

    @override
    def setup(self, stage: str | None = None) -> None:
        self._limit = fitting_length(self.trainer, "max_length", self.max_length, self._spare)
        if self.calibration is not None:
            self.calibration.trainer = self.calibration.trainer or self.trainer
        if self._examples:
            # from an earlier setup, which may have been for another model
            check_positions(self._length, self._limit)
            return
        tokenizer = find_tokenizer(self.tokenizer, self.trainer)
        self.tokenizer = tokenizer
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "Expected argument `tokenizer` to have a pad token, but it has none; set `loading.pad_token` of the "
                f"module, for example to the end-of-sequence token {tokenizer.eos_token!r}"
            )
        self._pad_token_id = tokenizer.pad_token_id
        # all splits in every stage, because ids and the padded length depend on all of them
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
        """Return the tokens of one text; subclasses may override it.

        Args:
            tokenizer: The tokenizer.
            text: The text.
        """
        limits = (self.max_length or tokenizer.model_max_length, self._limit)
        return encode_text(tokenizer, text, min(limit for limit in limits if limit is not None), self.truncate)

    def examples(self, split: Split) -> list[Example]:
        """Return the balanced examples of a split, in an order that only the seed decides."""
        return self._examples[split]

    def texts(self, split: Split) -> tuple[list[str], list[int]]:
        """Return the texts and labels of a split, for baselines on the same data."""
        chosen = self._choose()[split]
        return [text for text, _ in chosen], [label for _, label in chosen]

    def fingerprint(self) -> str:
        """Return a digest of the training examples, by which ranks find out whether they have the same ones."""
        digest = sha256()
        for example in self.examples("train"):
            digest.update(repr(example).encode())
        return digest.hexdigest()

    def collate(self, examples: list[Example], to_longest: bool = False) -> Batch:
        """Pad examples and stack them into a batch.

        Args:
            examples: The examples.
            to_longest: Pad to the longest of these examples, whatever `padding` is.
        """
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
        """Return the calibration text if there is one, else all training examples, one per batch and unpadded."""
        if self.calibration is not None:
            return self.calibration.calibration_dataloader()
        rows = [{"input_ids": torch.tensor([example.input_ids])} for example in self.examples("train")]
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
        # by length: otherwise half the tokens of most sources would be padding
        return self._loader(sorted(self.examples(split), key=lambda example: len(example.input_ids)))

    def _loader(self, examples: list[Example]) -> DataLoader[Any]:
        collate = partial(self.collate, to_longest=True)
        return DataLoader(examples, batch_size=self.eval_batch_size, collate_fn=collate)  # type: ignore[arg-type]

    def _choose(self) -> dict[Split, list[tuple[str, int]]]:
        """Draw the balanced examples (text, class) of each split; ids and seed decide, not the order of the source."""
        if self._chosen is None:
            pools: dict[Split, list[list[str]]] = {split: [[] for _ in range(self.num_classes)] for split in SPLITS}
            for split, documents in read_splits(self.source, self.reading, _FRACTIONS, labelled=True).items():
                for document in documents:
                    pools[split][self._class_of(document)].append(document.text)
            self._chosen = {split: self._balanced(split, pools[split]) for split in SPLITS}
        return self._chosen

    def _class_of(self, document: Document) -> int:
        names = self.reading.label_names if self.reading.label_names is not None else range(self.num_classes)
        if document.label not in names:
            raise ValueError(
                f"Expected the labels of {self.source!r} to be among {list(names)}, but got {document.label!r} in "
                f"column {self.reading.label_column!r} of {document.place}; set the number of classes, and "
                "`reading.label_names` if the labels are not 0, 1, …"
            )
        return names.index(document.label)  # type: ignore[arg-type]

    def _balanced(self, split: Split, pools: list[list[str]]) -> list[tuple[str, int]]:
        smallest = min(map(len, pools))
        size = self._sizes[split]
        if isinstance(size, int):
            per_class = size // self.num_classes
        else:
            per_class = smallest if size is None else min(smallest, _AUTO_SIZES[split] // self.num_classes)
        if per_class > smallest or per_class == 0:
            raise ValueError(
                f"Expected argument `num_{split}` to be at most {smallest * self.num_classes}, the balanced "
                f"examples in the {split} split of {self.source!r}, but got {size}; ask for fewer, give more data or "
                "change `reading.split_fractions`"
            )
        generator = random.Random(f"{self.seed}-{split}")
        chosen = [(text, label) for label, pool in enumerate(pools) for text in generator.sample(pool, per_class)]
        generator.shuffle(chosen)
        return chosen
