"""Windows of running text: calibration of a pruning, training and perplexity of language models."""

from hashlib import sha256
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from wandazeta.data.sources import (
    SPLITS,
    Split,
    check_fractions,
    load_tokenizer,
    read_documents,
    split_of,
)
from wandazeta.datamodules.step_sampler import BatchDataset, StepSampler
from wandazeta.utilities.arguments import check_positive

Batch = dict[str, torch.Tensor]


def collate_windows(windows: list[torch.Tensor]) -> Batch:
    """Stack windows into a batch: `input_ids` and `attention_mask` (B, T)."""
    input_ids = torch.stack(windows)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class TextDataModule(LightningDataModule):
    """Equal windows of tokens from whole documents.

    Documents are split (train, val, test) by the hash of their id, so no document is in two splits. Within a split they
    are joined in order with a blank line between them and cut into windows that do not overlap.

    Batches hold `input_ids` and `attention_mask`, both (B, T) int64.

    Args:
        source: Text: "sample:wikipedia", "sample:brown", a file, folder or glob of .txt, .jsonl or .parquet files, or
            a hub dataset.
        tokenizer: Model directory or hub name of the tokenizer; by default the model's own.
        sequence_length: Tokens per window.
        num_calibration_samples: Windows of the training split that `calibration_dataloader` gives.
        batch_size: Windows per batch.
        calibration_batch_size: Windows per calibration batch.
        eval_windows: Take at most so many windows for validation and for test; by default all.
        text_column: Column with the text, in .jsonl, .parquet and hub sources.
        dataset_config: Configuration of a hub dataset.
        max_documents: Read no more documents than these.
        split_fractions: Shares of train, val and test.
        add_bos: Start every window with the beginning-of-sequence token, which some models (Gemma) cannot do without.
        seed: Seed of the choice of calibration windows and of the order of training.

    Raises:
        ValueError: If an argument is out of range; in `setup`, if the source holds too little text.
    """

    def __init__(
        self,
        source: str = "sample:wikipedia",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        sequence_length: int = 512,
        num_calibration_samples: int = 128,
        batch_size: int = 8,
        calibration_batch_size: int = 1,
        eval_windows: int | None = None,
        text_column: str = "text",
        dataset_config: str | None = None,
        max_documents: int | None = None,
        split_fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        add_bos: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(
            sequence_length=sequence_length,
            num_calibration_samples=num_calibration_samples,
            batch_size=batch_size,
            calibration_batch_size=calibration_batch_size,
            eval_windows=eval_windows,
            max_documents=max_documents,
        )
        check_fractions(split_fractions)
        self.source = source
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.num_calibration_samples = num_calibration_samples
        self.batch_size = batch_size
        self.calibration_batch_size = calibration_batch_size
        self.eval_windows = eval_windows
        self.text_column = text_column
        self.dataset_config = dataset_config
        self.max_documents = max_documents
        self.split_fractions = split_fractions
        self.add_bos = add_bos
        self.seed = seed
        self._texts: dict[Split, list[str]] | None = None
        self._windows: dict[Split, list[torch.Tensor]] = {}

    @override
    def prepare_data(self) -> None:
        self._read()

    @override
    def setup(self, stage: str | None = None) -> None:
        self.tokenizer = load_tokenizer(self.tokenizer, self.trainer)
        if self.add_bos and self.tokenizer.bos_token_id is None:
            raise ValueError("Expected argument `add_bos` to be False, but got True: the tokenizer has no such token")

    def windows(self, split: Split) -> list[torch.Tensor]:
        """Return the windows of a split, each (sequence_length,) int64, in the order of the source.

        Raises:
            ValueError: If the split does not fill one window.
        """
        if split not in self._windows:
            tokens = self._tokens(split)
            body = self.sequence_length - self.add_bos
            windows = [tokens[start : start + body] for start in range(0, len(tokens) - body + 1, body)]
            if not windows:
                raise ValueError(
                    f"Expected the {split} split of {self.source!r} to hold a window of `sequence_length` "
                    f"{self.sequence_length} tokens, but got {len(tokens)} tokens; give more text, shorter windows or "
                    "other `split_fractions`"
                )
            bos = [load_tokenizer(self.tokenizer, None).bos_token_id] if self.add_bos else []
            self._windows[split] = [torch.tensor(bos + window, dtype=torch.int64) for window in windows]
        return self._windows[split]

    def fingerprint(self) -> str:
        """Digest the training windows, for ranks to find out whether they have the same."""
        return sha256(torch.stack(self.windows("train")).numpy().tobytes()).hexdigest()

    def calibration_dataloader(self) -> DataLoader[Batch]:
        """Return the calibration windows, drawn from the training split without replacement.

        Raises:
            ValueError: If the training split holds fewer windows than asked for.
        """
        windows = self.windows("train")
        if len(windows) < self.num_calibration_samples:
            raise ValueError(
                f"Expected argument `num_calibration_samples` to be at most {len(windows)}, the windows of "
                f"{self.sequence_length} tokens in the train split of {self.source!r}, "
                f"but got {self.num_calibration_samples}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(windows), generator=generator)[: self.num_calibration_samples].tolist()
        return self._loader([windows[index] for index in chosen], self.calibration_batch_size)

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

    def _read(self) -> dict[Split, list[str]]:
        if self._texts is None:
            documents = read_documents(
                self.source,
                text_column=self.text_column,
                dataset_config=self.dataset_config,
                max_documents=self.max_documents,
            )
            self._texts = {split: [] for split in SPLITS}
            for document in documents:
                self._texts[split_of(document.id, self.split_fractions)].append(document.text)
        return self._texts

    def _tokens(self, split: Split) -> list[int]:
        texts = [text + "\n\n" for text in self._read()[split]]
        tokenizer = load_tokenizer(self.tokenizer, self.trainer)
        # `verbose=False`: whole documents are longer than the model's context, which the windows are not
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return [token for row in rows for token in row]
