"""LightningDataModule with windows of running text."""

from hashlib import sha256
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from wandazeta.data.prompts import adds_bos
from wandazeta.data.sources import Document, SourceOptions, Split, read_splits
from wandazeta.data.windows import collate_windows, cut_windows, shuffle_windows
from wandazeta.datamodules.positions import fitting_length
from wandazeta.datamodules.step_sampler import BatchDataset, StepSampler
from wandazeta.datamodules.tokenizer import find_tokenizer
from wandazeta.utilities.arguments import check_positive

Batch = dict[str, torch.Tensor]
_FRACTIONS = (0.8, 0.1, 0.1)


class TextDataModule(LightningDataModule):
    """Windows of running text, to calibrate a pruning, to train on and to measure perplexity.

    Documents are split by the hash of their id, so that no document is in two splits. The documents of a split are
    joined in order, with a blank line in between, and cut into windows that do not overlap. Batches hold `input_ids`
    and `attention_mask`, both `(B, T)` int64.

    Args:
        source: Text: "sample:wikipedia", "sample:brown", a file, folder or glob of .txt, .jsonl, .json, .csv or
            .parquet files, or a hub dataset.
        tokenizer: Model directory or hub name of the tokenizer; by default that of the module.
        sequence_length: Tokens per window, T.
        batch_size: Windows per batch.
        eval_windows: Windows for validation and for test; by default all.
        num_calibration_samples: Windows for calibration, drawn from the training split; by default all, in random
            order, of which a pruning takes as many as it needs.
        calibration_batch_size: Windows per calibration batch.
        add_bos: Start every window with the beginning-of-sequence token, which some models (Gemma) need; by default
            what the tokenizer does by itself.
        reading: How the source is read and split.
        seed: Seed of the calibration windows and of the order of training.

    Raises:
        ValueError: If an argument is out of range; in `setup` or later, if the source holds too little text, or
            windows are longer than the positions that the model has learned.
    """

    def __init__(
        self,
        source: str = "sample:wikipedia",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        sequence_length: int = 512,
        batch_size: int = 8,
        eval_windows: int | None = None,
        num_calibration_samples: int | None = None,
        calibration_batch_size: int = 1,
        add_bos: bool | None = None,
        reading: SourceOptions | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(
            sequence_length=sequence_length,
            batch_size=batch_size,
            eval_windows=eval_windows,
            num_calibration_samples=num_calibration_samples,
            calibration_batch_size=calibration_batch_size,
        )
        self.source = source
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.eval_windows = eval_windows
        self.num_calibration_samples = num_calibration_samples
        self.calibration_batch_size = calibration_batch_size
        self.add_bos = add_bos
        self.reading = reading or SourceOptions()
        self.seed = seed
        self._documents: dict[Split, list[Document]] | None = None
        self._windows: dict[Split, list[torch.Tensor]] = {}

    @override
    def prepare_data(self) -> None:
        self._read()

    @override
    def setup(self, stage: str | None = None) -> None:
        self.tokenizer = find_tokenizer(self.tokenizer, self.trainer)
        fitting_length(self.trainer, "sequence_length", self.sequence_length)
        if self.add_bos and self.tokenizer.bos_token_id is None:
            raise ValueError(
                "Expected argument `add_bos` to be False or null, but got True: the tokenizer has no such token"
            )

    @property
    def starts_with_bos(self) -> bool:
        """Whether windows start with the beginning-of-sequence token, which a record of a perplexity has to state."""
        return adds_bos(find_tokenizer(self.tokenizer, self.trainer)) if self.add_bos is None else self.add_bos

    def windows(self, split: Split) -> list[torch.Tensor]:
        """Return the windows of a split, each `(T,)` int64, in the order of the source.

        Args:
            split: "train", "val" or "test".

        Raises:
            ValueError: If the split does not fill one window.
        """
        if split not in self._windows:
            texts = [document.text for document in self._read()[split]]
            tokenizer = find_tokenizer(self.tokenizer, self.trainer)
            try:
                self._windows[split] = cut_windows(tokenizer, texts, self.sequence_length, self.starts_with_bos)
            except ValueError as error:
                raise ValueError(
                    f"{error} in the {split} split of {self.source!r}; give more text, shorter windows or other "
                    "`split_fractions`"
                ) from error
        return self._windows[split]

    def fingerprint(self) -> str:
        """Return a digest of the training windows, by which ranks find out whether they have the same ones."""
        return sha256(torch.stack(self.windows("train")).numpy().tobytes()).hexdigest()

    def calibration_dataloader(self) -> DataLoader[Batch]:
        """Return the calibration windows, drawn from the training split without replacement.

        Raises:
            ValueError: If the training split holds fewer windows than asked for.
        """
        windows = self.windows("train")
        number = self.num_calibration_samples or len(windows)
        if number > len(windows):
            raise ValueError(
                f"Expected argument `num_calibration_samples` to be at most {len(windows)}, the windows of "
                f"{self.sequence_length} tokens in the train split of {self.source!r}, but got {number}"
            )
        return self._loader(shuffle_windows(windows, self.seed)[:number], self.calibration_batch_size)

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        windows = self.windows("train")
        sampler = StepSampler(windows, self.batch_size, self.seed, self.trainer)
        return DataLoader(BatchDataset(windows, collate_windows), sampler=sampler, batch_size=None)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.windows("val")[: self.eval_windows], self.batch_size)

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.windows("test")[: self.eval_windows], self.batch_size)

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.test_dataloader()

    def _loader(self, windows: list[torch.Tensor], batch_size: int) -> DataLoader[Any]:
        return DataLoader(windows, batch_size=batch_size, collate_fn=collate_windows)  # type: ignore[arg-type]

    def _read(self) -> dict[Split, list[Document]]:
        if self._documents is None:
            self._documents = read_splits(self.source, self.reading, _FRACTIONS)
        return self._documents
