"""Read rows from text, JSON, CSV and Parquet files, with errors that name the file, the row and the column."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".txt.gz", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
"""How the names of files that can be read end."""

_BOM = b"\xef\xbb\xbf"
# fields of a CSV file are documents; Python's default is 128 KiB
_MAX_FIELD = 10**9


class Row(NamedTuple):
    """One row of a source.

    Args:
        place: Where it is, such as "line 3 of 'reviews.jsonl'", for error messages.
        values: Its columns.
    """

    place: str
    values: dict[str, Any]


def kind_of(file: Path) -> str | None:
    """Return the kind of a file by its name: "txt", "jsonl", "json", "csv" or "parquet", or None for any other."""
    ending = next((suffix for suffix in SUFFIXES if file.name.endswith(suffix)), None)
    return None if ending is None else ending.removesuffix(".gz").removeprefix(".")


def read_rows(files: list[Path]) -> Iterator[Row]:
    """Yield the rows of files, those of text files first.

    Each of several text files is one row; a single one has a row for each paragraph, because a single document would be
    in a single split. A `.json` file has an array of objects, or an object on each line as `.jsonl` files have. Text is
    UTF-8, with or without a byte-order mark.

    Args:
        files: The files, whose names end as `SUFFIXES` says.

    Raises:
        ValueError: If a file cannot be read, is damaged or has another content than its name says; the message names
            the file and the place in it.
    """
    texts = [file for file in files if kind_of(file) == "txt"]
    for file in texts:
        text = _decode(_read_bytes(file), file).replace("\r\n", "\n").replace("\r", "\n")
        if len(texts) > 1:
            yield Row(repr(str(file)), {"id": file.name, "text": text})
        else:
            for number, paragraph in enumerate(text.split("\n\n"), start=1):
                yield Row(f"paragraph {number} of {str(file)!r}", {"text": paragraph})
    readers = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet}
    for file in files:
        if file not in texts:
            yield from readers[kind_of(file) or ""](file)


def _open(file: Path) -> Any:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def _read_bytes(file: Path) -> bytes:
    return b"".join(_lines(file))


def _lines(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file, without a byte-order mark at its start."""
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines):
                yield line.removeprefix(_BOM) if number == 0 else line
    except (OSError, EOFError, zlib.error) as error:
        # the errors of gzip do not name the file
        raise ValueError(f"Expected {str(file)!r} to be a file that can be read, but got: {error}") from error


def _decode(content: bytes, file: Path, first_line: int = 1) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content[: error.start].count(b"\n")
        raise ValueError(
            f"Expected UTF-8 on line {line} of {str(file)!r}, but got: {error.reason} "
            f"({content[error.start : error.start + 1]!r}); convert the file to UTF-8"
        ) from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.lineno > 1:
            place += f", line {error.lineno}"
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise ValueError(f"Expected JSON on {place}, but got {shown.strip()!r} ({error})") from error


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"Expected a JSON object with a value for each column on {place}, but got {_type(value)}")
    return Row(place, value)


def _type(value: Any) -> str:
    return type(value).__name__


def _read_jsonl(file: Path, lines: Iterable[bytes] | None = None) -> Iterator[Row]:
    for number, line in enumerate(_lines(file) if lines is None else lines, start=1):
        text, place = _decode(line, file, number), f"line {number} of {str(file)!r}"
        if text.strip():
            yield _object(_parse(text, place), place)


def _read_json(file: Path) -> Iterator[Row]:
    content = _read_bytes(file)
    if not content.lstrip().startswith(b"["):
        yield from _read_jsonl(file, io.BytesIO(content))
        return
    for number, value in enumerate(_parse(_decode(content, file), repr(str(file))), start=1):
        yield _object(value, f"item {number} of {str(file)!r}")


def _read_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD))
    reader = csv.reader(io.StringIO(_decode(_read_bytes(file), file), newline=""), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f"Expected different names of columns on line 1 of {str(file)!r}, but got {names}")
        for values in reader:
            place = f"line {reader.line_num} of {str(file)!r}"
            if values and len(values) != len(names):
                raise ValueError(f"Expected {len(names)} columns on {place}, but got {len(values)}; quote the commas")
            if values:
                yield Row(place, dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise ValueError(f"Expected CSV on line {reader.line_num} of {str(file)!r}, but got: {error}") from error


def _read_parquet(file: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for values in _rows_of(batch, file, number):
                    number += 1
                    yield Row(f"row {number} of {str(file)!r}", values)
    except (ArrowException, OSError) as error:
        raise ValueError(
            f"Expected {str(file)!r} to be a complete Parquet file, but after row {number} got: "
            f"{str(error).splitlines()[0]}; copy it again"
        ) from error


def _rows_of(batch: Any, file: Path, before: int) -> list[dict[str, Any]]:
    """Return the rows of a batch of a Parquet file, `before` of whose rows precede it."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for number, value in enumerate(column, start=before + 1):
                try:
                    value.as_py()
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"Expected UTF-8 in column {name!r} of row {number} of {str(file)!r}, but got: {error.reason}"
                    ) from error
        raise
