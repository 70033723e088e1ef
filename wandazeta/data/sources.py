"""Read documents from offline samples, local files or datasets of the hub, and split them."""

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from wandazeta.data.samples import sample_text
from wandazeta.utilities.arguments import check_positive

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_SAMPLE_PREFIX = "sample:"


@dataclass(frozen=True)
class SourceOptions:
    """How documents are read from a source and split.

    Args:
        text_column: Column with the text, in .jsonl, .parquet and hub sources.
        label_column: Column with the class, in labelled sources: its number, or one of `label_names`.
        label_names: Value of the label column for each class; by default the numbers 0, 1, ….
        dataset_config: Configuration of a hub dataset.
        max_documents: Read at most this many documents.
        split_fractions: Fractions of the documents for training, validation and test. Documents are assigned by the
            hash of their id, so that each is in one split, whatever the seed. By default 0.8, 0.1 and 0.1 of running
            text, and 0.7, 0.15 and 0.15 of labelled text.

    Raises:
        ValueError: If `max_documents` is smaller than 1, or the fractions are negative or do not add up to 1.

    Example:
        >>> SourceOptions(split_fractions=(0.9, 0.1, 0.1))
        Traceback (most recent call last):
        ValueError: Expected argument `split_fractions` to be three fractions that add up to 1, but got (0.9, 0.1, 0.1)
    """

    text_column: str = "text"
    label_column: str = "label"
    label_names: list[str] | None = None
    dataset_config: str | None = None
    max_documents: int | None = None
    split_fractions: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        check_positive(max_documents=self.max_documents)
        given = self.split_fractions
        if given is not None and (len(given) != 3 or min(given) < 0 or abs(sum(given) - 1) > 1e-6):
            raise ValueError(
                f"Expected argument `split_fractions` to be three fractions that add up to 1, but got {given}"
            )


@dataclass(frozen=True)
class Document:
    """One document of a source.

    Args:
        id: Identifier, which decides the split.
        text: The text.
        label: The class, in labelled sources.
    """

    id: str
    text: str
    label: int | str | None = None


def is_local(source: str) -> bool:
    """Return whether a source is a path or glob of text files, as opposed to the name of a hub dataset."""
    return source.endswith(_SUFFIXES) or glob.has_magic(source) or Path(source).expanduser().exists()


def _local_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
    elif path.exists():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not found:
        raise ValueError(f"Expected argument `source` to name existing files, but got {source!r}, which matches none")
    for file in found:
        if file.suffix not in _SUFFIXES:
            raise ValueError(f"Expected argument `source` to name {', '.join(_SUFFIXES)} files, but got {str(file)!r}")
    return found


def _read_txt(files: list[Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        text = file.read_text(encoding="utf-8")
        if len(files) > 1:
            yield {"id": file.name, "text": text}
        else:
            # a single document would be in a single split, so the paragraphs of a single file are the documents
            yield from ({"text": paragraph} for paragraph in text.split("\n\n"))


def _read_local(source: str) -> Iterator[dict[str, Any]]:
    files = _local_files(source)
    yield from _read_txt([file for file in files if file.suffix == ".txt"])
    for file in files:
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        row = json.loads(line) if line.strip() else None
                    except json.JSONDecodeError as error:
                        raise ValueError(f"Expected JSON on line {number} of {file}, but got {line[:40]!r}") from error
                    if row is not None:
                        yield row
        elif file.suffix == ".parquet":
            from pyarrow import parquet

            for batch in parquet.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()


def _read_hub(source: str, config: str | None) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    try:
        # streamed, so that reading a few documents of a large corpus does not download all of it
        return load_dataset(source, config, split="train", streaming=True)
    except Exception as error:
        # datasets raises errors of many types: no network, unknown dataset, unknown configuration
        raise ValueError(
            f"Could not read `source` {source!r}: neither local files nor a hub dataset that loads "
            f"({type(error).__name__}: {error})"
        ) from error


def read_documents(source: str, reading: SourceOptions | None = None, labelled: bool = False) -> list[Document]:
    """Read all documents of a source that hold text.

    A column `id` identifies the documents; without it their text does, so that copies are in the same split.

    Args:
        source: "sample:NAME", a folder, file or glob of .txt, .jsonl or .parquet files, or a hub dataset. Each of
            several .txt files is a document; a single one is cut into documents at its blank lines.
        reading: How the source is read; by default as `SourceOptions()` says.
        labelled: Read labels too.

    Raises:
        ValueError: If nothing is found, a column is missing or no document holds text.
    """
    reading = reading or SourceOptions()
    text_column, label_column = reading.text_column, reading.label_column if labelled else None
    if source.startswith(_SAMPLE_PREFIX):
        rows: Iterable[dict[str, Any]] = _read_local(str(sample_text(source.removeprefix(_SAMPLE_PREFIX))))
    elif is_local(source):
        rows = _read_local(source)
    else:
        rows = _read_hub(source, reading.dataset_config)
    documents = []
    for row in islice(rows, reading.max_documents):
        for column in (text_column, label_column):
            if column is not None and column not in row:
                raise ValueError(f"Expected a column {column!r} in {source!r}, but got {', '.join(map(repr, row))}")
        text = str(row[text_column] or "")
        if text.strip():
            label = None if label_column is None else row[label_column]
            documents.append(Document(str(row.get("id") or text), text, label))
    if not documents:
        raise ValueError(f"Expected `source` {source!r} to hold text, but all of it is empty")
    return documents


def split_of(document_id: str, fractions: tuple[float, float, float]) -> Split:
    """Return the split of a document by the hash of its id, which is the same on every machine and for every seed.

    Args:
        document_id: Identifier of the document.
        fractions: Fractions of the documents for training, validation and test.
    """
    place = int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big") / 2**64
    train, val, _ = fractions
    return "train" if place < train else "val" if place < train + val else "test"


def read_splits(
    source: str, reading: SourceOptions, fractions: tuple[float, float, float], labelled: bool = False
) -> dict[Split, list[Document]]:
    """Read all documents of a source, by split, in the order of the source.

    Args:
        source: As for `read_documents`.
        reading: How the source is read.
        fractions: Fractions of the splits, unless `reading` has its own.
        labelled: Read labels too.

    Raises:
        ValueError: As for `read_documents`.
    """
    splits: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    for document in read_documents(source, reading, labelled):
        splits[split_of(document.id, reading.split_fractions or fractions)].append(document)
    return splits
