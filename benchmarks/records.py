"""The common form of the files under `benchmarks/results/`."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wandazeta.utilities.environment import command, commit, hardware, versions

ROOT = Path(__file__).resolve().parents[1]


def describe(name: str, records: Any, **more: Any) -> dict[str, Any]:
    """Records, and what is needed to make them again."""
    return {
        "name": name,
        "command": command(),
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
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
