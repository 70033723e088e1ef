"""Error reports of the command line: one line and an exit code instead of a traceback."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGES = ("deepspeed", "gguf", "jinja2", "lm_eval", "matplotlib", "peft", "sklearn", "tensorboard")
"""Packages that only some options need."""
_DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextmanager
def reported_errors() -> Iterator[None]:
    """Context manager that reports errors of the user or of the disk in one line.

    With the environment variable `WANDAZETA_DEBUG` errors keep their traceback.

    Raises:
        SystemExit: With code 2 for an argument that does not fit (a ValueError or a MisconfigurationException) or that
            needs a package that is not installed, and with code 1 for a file that cannot be used, if there is a remedy
            to name. Other errors pass unchanged.
    """
    try:
        yield
    except _user_errors() as error:
        if os.environ.get("WANDAZETA_DEBUG"):
            raise
        sys.stderr.write(f"error: {_innermost(error)}\n")
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES or os.environ.get("WANDAZETA_DEBUG"):
            raise
        sys.stderr.write(f"error: {error}; this option needs the package `{package}`: `pip install {package}`\n")
        raise SystemExit(2) from None
    except OSError as error:
        remedy = _remedy(error)
        if remedy is None or os.environ.get("WANDAZETA_DEBUG"):
            raise
        where = f": '{error.filename}'" if error.filename else ""
        sys.stderr.write(f"error: {error.strerror or error}{where}; {remedy}\n")
        raise SystemExit(1) from None


def _user_errors() -> tuple[type[Exception], ...]:
    """The types of errors of the user; importing Lightning for its own takes seconds where nothing else needs it."""
    module = sys.modules.get("lightning.fabric.utilities.exceptions")
    return (ValueError,) if module is None else (ValueError, module.MisconfigurationException)


def _innermost(error: BaseException) -> BaseException:
    """Return the error of a class's own check, which jsonargparse wraps where an argument can have several types."""
    while str(error).startswith("Does not validate against any") and isinstance(error.__cause__, ValueError):
        error = error.__cause__
    return error


def _remedy(error: OSError) -> str | None:
    if error.errno in _DISK_ERRORS:
        return "free some space and start again, finished work is kept"
    if error.errno == errno.EISDIR and any(Path(error.filename).glob("checkpoint/*_model_states.pt")):
        return "DeepSpeed wrote this checkpoint and only DeepSpeed reads it: use its strategy or another `ckpt_path`"
    if "not a valid DeepSpeed checkpoint" in str(error):
        return "another strategy wrote this checkpoint: use that strategy or another `ckpt_path`"
    return None
