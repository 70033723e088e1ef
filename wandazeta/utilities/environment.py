"""What something was run with: command, versions, commit and hardware, without names of users or their folders."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from wandazeta import __version__

_ROOT = Path(__file__).resolve().parent
_PACKAGES = ("torch", "lightning", "transformers", "datasets", "torchmetrics", "safetensors", "deepspeed", "peft")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those of its dependencies that are installed."""
    found = {"python": platform.python_version(), "wandazeta": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra
            continue
    return found


def hardware() -> dict[str, Any]:
    """Name and number of the processors, and of the GPUs that torch sees."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    gpus = torch.cuda.device_count()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu, "gpus": gpus}


def commit() -> str | None:
    """Commit of the checkout; None for an installed package or without git.

    Marked where files differ from it, other than results of benchmarks: those are being written.
    """
    if not (_ROOT / ".git").exists():  # git would answer for whatever checkout the environment lies in
        return None
    differing = ["git", "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"]
    try:
        done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=_ROOT, capture_output=True)
        changed = subprocess.run(differing, cwd=_ROOT, capture_output=True).returncode != 0
    except FileNotFoundError:
        return None
    return done.stdout.decode().strip() + ("-dirty" if changed else "") if done.returncode == 0 else None


def command() -> str:
    """The command line; of a path outside the working directory and the checkout only the name."""

    def portable(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        path = Path(value)
        if path.is_absolute():
            inside = (path.relative_to(base) for base in (Path.cwd(), _ROOT) if path.is_relative_to(base))
            value = str(next(inside, path.name))
        return f"{option}{equals}{value}"

    program = ["python"] if sys.argv[0].endswith(".py") else []
    return shlex.join([*program, *map(portable, sys.argv)])
