"""Write files and directories atomically, and check that a directory can hold them.

A file is written under a temporary name, flushed to the disk and renamed, so that a process that is killed at any
instant leaves complete files only.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

__all__ = [
    "TEMPORARY_NAME",
    "check_writable",
    "open_atomically",
    "replace_directory",
    "write_atomically",
    "write_json",
]

# one name for all files of a directory: the next write replaces what a killed process left, and the leading dot and
# the ending keep it out of patterns such as `*.safetensors`
TEMPORARY_NAME = ".writing.tmp"


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only once it is complete and on the disk.

    If the block raises, the temporary file is deleted and what `path` held before is left unchanged.

    Args:
        path: Where the file goes.

    Yields:
        The temporary file, open for binary writing.

    Raises:
        OSError: If the file cannot be written, for example on a full disk; the error names `path`.
    """
    temporary = path.with_name(TEMPORARY_NAME)
    with _removed_on_error(temporary, path):
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        # the rename itself has to reach the disk
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only once it is complete and on the disk.

    Args:
        path: Where the file goes.
        content: Its bytes.

    Raises:
        OSError: As `open_atomically` does.
    """
    with open_atomically(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON with `write_atomically`.

    Args:
        path: Where the file goes.
        content: Dictionaries, lists, strings and numbers.

    Raises:
        OSError: As `open_atomically` does.
    """
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


@contextmanager
def replace_directory(directory: Path) -> Iterator[Path]:
    """Write a directory that appears under its name only once it is complete; what it held before is deleted.

    If the block raises, the temporary directory is deleted and `directory` is left unchanged.

    Args:
        directory: Where the directory goes.

    Yields:
        A new, empty directory beside it to write to.

    Raises:
        OSError: If a file cannot be written, for example on a full disk; the error names a file or `directory`.
    """
    temporary = directory.with_name(f".{directory.name}.new")
    replaced = directory.with_name(f".{directory.name}.old")
    # what a killed process left
    shutil.rmtree(temporary, ignore_errors=True)
    with _removed_on_error(temporary, directory):
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(replaced, ignore_errors=True)
        if directory.exists():
            directory.rename(replaced)
        temporary.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _removed_on_error(temporary: Path, path: Path) -> Iterator[None]:
    """Delete `temporary` if the block raises, and make errors of the disk `OSError`s that name a file."""
    try:
        yield
    except BaseException as error:
        # on a full disk it would take the space that the next attempt needs
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        # safetensors gives the error number in its message alone; errors of an open file name no file
        code = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
        number = int(code[1]) if code else getattr(error, "errno", None)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def check_writable(directory: Path, argument: str = "output_dir", needed_bytes: int = 0) -> None:
    """Create a directory if it is missing, and check that it is writable and has enough free space.

    Args:
        directory: The directory.
        argument: Name of the argument in error messages.
        needed_bytes: Free space that is needed, in bytes.

    Raises:
        ValueError: If the directory cannot be created or written to, or the disk has too little space.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"Expected argument `{argument}` to be a folder that can be written to, but got '{directory}' "
            f"({error.strerror}); choose another folder."
        ) from error
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise ValueError(
            f"Expected argument `{argument}` to have {_size(needed_bytes)} of room, but '{directory}' is on a disk "
            f"with {_size(free)} of free space; choose another folder or free some space."
        )


def _size(num_bytes: int) -> str:
    unit, power = next(((u, p) for u, p in (("GiB", 30), ("MiB", 20)) if num_bytes >= 2**p), ("KiB", 10))
    return f"{num_bytes / 2**power:.1f} {unit}"
