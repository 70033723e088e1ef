"""Files that are written whole or not at all, and folders that can hold them.

A file is written under another name, flushed to the disk and renamed, so that a process killed at any instant leaves
whole files or none.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# the name of a file that is being written, the half file of a kill
WRITING = ".writing.tmp"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it exists whole or not at all, even if the machine stops.

    Args:
        path: Where the file goes.
        content: What it holds.

    Raises:
        OSError: If it cannot be written, as on a full disk; the error names the file, and nothing is left of it.
    """
    # the same for all files of a folder: what a kill leaves is written over, and no pattern of a name finds it
    temporary = path.with_name(WRITING)
    with removed_if_unwritten(temporary, path):
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def removed_if_unwritten(temporary: Path, path: Path) -> Iterator[None]:
    """Removes what was written so far where writing fails: on a full disk it would take the room of the next try.

    Args:
        temporary: The file or folder that is written.
        path: What it is to become.

    Raises:
        OSError: For an error of the disk, whoever noticed it, naming `path` where it names no file.
    """
    try:
        yield
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        # safetensors says it in words, and errors of a file that is open name none
        code = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
        number = int(code[1]) if code else getattr(error, "errno", None)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON with `write_atomically`.

    Args:
        path: Where the file goes.
        content: Dictionaries, lists, strings, numbers.
    """
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def check_writable(directory: Path, argument: str = "output_dir", needed_bytes: int = 0) -> None:
    """Makes a folder and checks that it can be written to and has room.

    Args:
        directory: The folder.
        argument: What the user calls it.
        needed_bytes: The space that will be filled.

    Raises:
        ValueError: If it cannot be made or written to, or the disk has less room.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"Expected argument `{argument}` to be a folder that can be written to, but got '{directory}' "
            f"({error.strerror}); choose another one."
        ) from error
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise ValueError(
            f"Expected argument `{argument}` to have {_size(needed_bytes)} of room, but '{directory}' is on a "
            f"disk with {_size(free)} left; choose another one or make room."
        )


def _size(num_bytes: int) -> str:
    unit, power = next(((u, p) for u, p in (("GiB", 30), ("MiB", 20)) if num_bytes >= 2**p), ("KiB", 10))
    return f"{num_bytes / 2**power:.1f} {unit}"
