"""Where documents come from: offline samples, local files, datasets of the hub; and how they are split."""

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from wandazeta.data.samples import sample_text

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_SUFFIXES = (".txt", ".jsonl", ".parquet")
_SAMPLE_PREFIX = "sample:"


@dataclass(frozen=True)
class Document:
    """One document: its id decides the split, the label is there for labelled sources."""

    id: str
    text: str
    label: int | str | None = None


def is_local(source: str) -> bool:
    """Tell a path or glob of text files from the name of a hub dataset."""
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
            # a lone file would be one document, hence all train or all test: its paragraphs are the documents
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
        # streamed, so that taking some documents of a large corpus does not fetch all of it
        return load_dataset(source, config, split="train", streaming=True)
    except Exception as error:
        # datasets raises many kinds here: no network, no such dataset, no such configuration
        raise ValueError(
            f"Could not read `source` {source!r}: neither local files nor a hub dataset that loads "
            f"({type(error).__name__}: {error})"
        ) from error


def read_documents(
    source: str,
    *,
    text_column: str = "text",
    label_column: str | None = None,
    dataset_config: str | None = None,
    max_documents: int | None = None,
) -> list[Document]:
    """Read every non-empty document of a source.

    A column `id` names the documents; without it their text does, so that copies fall into the same split.

    Args:
        source: "sample:NAME", a folder, a file or a glob of .txt, .jsonl or .parquet files, or a hub dataset. Of
            several .txt files each is a document; a single one is cut at its blank lines.
        text_column: Column with the text.
        label_column: Column with the label; None for unlabelled text.
        dataset_config: Configuration of a hub dataset.
        max_documents: Read no more than these.

    Raises:
        ValueError: If nothing is found, a column is missing or no document holds text.
    """
    if source.startswith(_SAMPLE_PREFIX):
        rows: Iterable[dict[str, Any]] = _read_local(str(sample_text(source.removeprefix(_SAMPLE_PREFIX))))
    elif is_local(source):
        rows = _read_local(source)
    else:
        rows = _read_hub(source, dataset_config)
    documents = []
    for row in islice(rows, max_documents):
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
    """Return the split of a document, by the hash of its id: the same on every machine and for every seed."""
    place = int.from_bytes(hashlib.sha256(document_id.encode()).digest()[:8], "big") / 2**64
    train, val, _ = fractions
    return "train" if place < train else "val" if place < train + val else "test"


def check_fractions(fractions: tuple[float, float, float]) -> None:
    """Refuse fractions that are no split.

    Raises:
        ValueError: If they are not three non-negative numbers that add up to one.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            "Expected argument `split_fractions` to be three fractions (train, val, test) that add up to 1, "
            f"but got {fractions}"
        )


def load_tokenizer(tokenizer: str | PreTrainedTokenizerBase | None, trainer: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer that is given, named, or (None) the trained module's own attribute `tokenizer`.

    Raises:
        ValueError: If there is none or it cannot be loaded.
    """
    if isinstance(tokenizer, str):
        try:
            return AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Expected argument `tokenizer` to be a model directory or hub name, but got {tokenizer!r} ({error})"
            ) from error
    if tokenizer is None:
        tokenizer = getattr(getattr(trainer, "lightning_module", None), "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            "Expected argument `tokenizer` to be set, but got None and the model has no attribute `tokenizer`; "
            "give the model's directory or hub name"
        )
    return tokenizer
