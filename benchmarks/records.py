"""The common form of the files under `benchmarks/results/`."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("wandazeta", "torch", "lightning", "transformers", "datasets", "torchmetrics", "safetensors")


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":", 1)[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def commit() -> str:
    """Commit of the checkout, marked where files differ from it, other than results: those are being written."""
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True)
    differing = ["git", "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"]
    changed = subprocess.run(differing, cwd=ROOT).returncode != 0
    return done.stdout.decode().strip() + ("-dirty" if changed else "") if done.returncode == 0 else "unknown"


def command() -> str:
    """The command line; of a path outside the checkout only the name, the rest says nothing elsewhere."""

    def portable(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        path = Path(value)
        if path.is_absolute():
            value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        return f"{option}{equals}{value}"

    return shlex.join(["python", *map(portable, sys.argv)])


def describe(name: str, records: Any, **more: Any) -> dict[str, Any]:
    """Records, and what is needed to make them again."""
    return {
        "name": name,
        "command": command(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in _PACKAGES},
        "hardware": hardware(),
        **more,
        "records": records,
    }


def finished(path: Path) -> list[dict[str, Any]]:
    """The records that a result file holds so far, none where there is no file."""
    records: list[dict[str, Any]] = json.loads(path.read_text())["records"] if path.exists() else []
    return records


def is_finished(settings: dict[str, Any], records: list[dict[str, Any]]) -> bool:
    """Whether one of the records was made with all these settings."""
    return any(record.items() >= settings.items() for record in records)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=2) + "\n")
    fresh.replace(path)
