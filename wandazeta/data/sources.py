"""Read documents from offline samples, local files or datasets of the hub, and split them."""

import glob
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from wandazeta.data.files import SUFFIXES, Row, kind_of, read_rows
from wandazeta.data.samples import sample_text
from wandazeta.utilities.arguments import check_positive
from wandazeta.utilities.hub import offline_without_hub

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_SAMPLE_PREFIX = "sample:"


@dataclass(frozen=True)
class SourceOptions:
    """How documents are read from a source and split.

    Args:
        text_column: Column with the text, in all sources other than .txt files.
        label_column: Column with the class, in labelled sources: its number, or one of `label_names`.
        label_names: Value of the label column for each class; by default the numbers 0, 1, ….
        dataset_config: Configuration of a hub dataset.
        max_documents: Read at most this many documents.
        split_fractions: Fractions of the documents for training, validation and test. Documents are assigned by the
            hash of their id, so that each is in one split, whatever the seed. By default 0.8, 0.1 and 0.1 of running
            text, and 0.7, 0.15 and 0.15 of labelled text.

    Raises:
        ValueError: If `max_documents` is smaller than 1, or the fractions are negative or do not add up to 1.

    Examples:
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
        place: File and row that it was read from, for error messages.
    """

    id: str
    text: str
    label: int | str | None = None
    place: str = field(default="", compare=False)


def is_local(source: str) -> bool:
    """Return whether a source is a path or glob of text files, as opposed to the name of a hub dataset."""
    return source.endswith(SUFFIXES) or glob.has_magic(source) or Path(source).expanduser().exists()


def _local_files(source: str, argument: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if kind_of(file) is not None)
    elif path.exists():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not found:
        raise ValueError(
            f"Expected argument `{argument}` to name existing files, but got {source!r}, which matches none"
        )
    for file in found:
        if kind_of(file) is None:
            raise ValueError(
                f"Expected argument `{argument}` to name {', '.join(SUFFIXES)} files, but got {str(file)!r}"
            )
    return found


def _read_hub(source: str, config: str | None, argument: str) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        # streamed, so that reading a few documents of a large corpus does not download all of it
        with offline_without_hub():
            rows = load_dataset(source, config, split="train", streaming=True)
        for number, values in enumerate(rows, start=1):
            yield Row(f"row {number} of {source!r}", values)
    except Exception as error:
        # datasets raises errors of many types: no network, unknown dataset, unknown configuration
        raise ValueError(
            f"Could not read `{argument}` {source!r}: neither local files nor a hub dataset that loads "
            f"({type(error).__name__}: {error})"
        ) from error


def read_documents(
    source: str, reading: SourceOptions | None = None, labelled: bool = False, argument: str = "source"
) -> list[Document]:
    """Read all documents of a source that hold text.

    A column `id` identifies the documents; without it their text does, so that copies are in the same split.

    Args:
        source: "sample:NAME", a folder, file or glob of .txt, .jsonl, .json, .csv or .parquet files, or a hub dataset;
            text, JSON and CSV files may be compressed (.gz). Each of several .txt files is a document; a single one is
            cut into documents at its blank lines.
        reading: How the source is read; by default as `SourceOptions()` says.
        labelled: Read labels too.
        argument: Name of the user's argument that `source` comes from, for error messages.

    Raises:
        ValueError: If nothing is found, a file cannot be read, a column is missing or holds something other than text,
            or no document holds text.
    """
    reading = reading or SourceOptions()
    if source.startswith(_SAMPLE_PREFIX):
        rows: Iterable[Row] = read_rows([sample_text(source.removeprefix(_SAMPLE_PREFIX))])
    elif is_local(source):
        rows = read_rows(_local_files(source, argument))
    else:
        rows = _read_hub(source, reading.dataset_config, argument)
    documents = []
    for row in islice(rows, reading.max_documents):
        text = _text(row, reading.text_column)
        if text.strip():
            label = _label(row, reading) if labelled else None
            documents.append(Document(_identifier(row, text), text, label, row.place))
        elif labelled:
            _column(row, reading.label_column)
    if not documents:
        raise ValueError(f"Expected `{argument}` {source!r} to hold text, but all of it is empty")
    return documents


def _column(row: Row, column: str) -> Any:
    if column not in row.values:
        raise ValueError(f"Expected a column {column!r} in {row.place}, but got {', '.join(map(repr, row.values))}")
    return _encodable(row.values[column], column, row)


def _encodable(value: Any, column: str, row: Row) -> Any:
    """Check that a string is valid Unicode: escapes in JSON can make a lone surrogate, which has no encoding."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Expected Unicode text in column {column!r} of {row.place}, but got {error.object[error.start]!r}, "
                "half of a surrogate pair; replace it"
            ) from error
    return value


def _text(row: Row, column: str) -> str:
    value = _column(row, column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"Expected text in column {column!r} of {row.place}, but got {type(value).__name__}; choose another "
            "`text_column`, or convert the rows first (those of a chat with the tokenizer's `apply_chat_template`)"
        )
    return value


def _label(row: Row, reading: SourceOptions) -> int | str | None:
    label = _column(row, reading.label_column)
    # a CSV file has no numbers
    is_number = reading.label_names is None and isinstance(label, str) and label.strip().isdecimal()
    return int(label) if is_number else label


def _identifier(row: Row, text: str) -> str:
    return str(_encodable(row.values.get("id"), "id", row) or text)


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
