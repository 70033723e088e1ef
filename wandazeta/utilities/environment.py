"""Environment of a run: command line, versions, commit and hardware, without user names or home folders."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from wandazeta.version import __version__

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "safetensors", "deepspeed", "peft")


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of its dependencies, without those that are not installed."""
    found = {"python": platform.python_version(), "wandazeta": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return the name and number of the processors, and of the GPUs that torch can use."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    gpus = torch.cuda.device_count()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu, "gpus": gpus}


def commit() -> str | None:
    """Return the commit of the checkout, or None for an installed package or without git.

    It ends in `-dirty` if files differ from the commit. Results of benchmarks do not count, as a benchmark writes them.
    """
    if not (_ROOT / ".git").exists():  # git would answer for any checkout around the virtual environment
        return None
    differing = ["git", "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"]
    try:
        done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=_ROOT, capture_output=True)
        changed = subprocess.run(differing, cwd=_ROOT, capture_output=True).returncode != 0
    except FileNotFoundError:
        return None
    return done.stdout.decode().strip() + ("-dirty" if changed else "") if done.returncode == 0 else None


def command() -> str:
    """Return the command line, with paths relative to the working directory or the checkout, else reduced to names."""

    def portable(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        path = Path(value)
        if path.is_absolute():
            inside = (path.relative_to(base) for base in (Path.cwd(), _ROOT) if path.is_relative_to(base))
            value = str(next(inside, path.name))
        return f"{option}{equals}{value}"

    program = ["python"] if sys.argv[0].endswith(".py") else []
    return shlex.join([*program, *map(portable, sys.argv)])
