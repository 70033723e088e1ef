"""What the records of `benchmarks/zo_step.py` say, a row for each setting."""

from statistics import median
from typing import Any

STEP_HEADING = ["adapters in", "batch", "tokens", "queries", "seconds a step", "x its forwards", "faster than the loop"]


def step_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each setting: ratios of the medians over its runs, with the lowest and the highest of a run."""
    names = ("layers", "batch", "prompt_tokens", "num_queries")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)

    def ratio(runs: list[dict[str, Any]], over: str, under: str) -> str:
        found = [run[over] / run[under] for run in runs]
        middle = median(run[over] for run in runs) / median(run[under] for run in runs)
        return f"{middle:.2f} ({min(found):.2f} to {max(found):.2f})"

    return [
        [
            *map(str, key),
            f"{median(run['seconds_step'] for run in runs):.3f}",
            ratio(runs, "seconds_step", "seconds_forwards"),
            ratio(runs, "seconds_loop", "seconds_step"),
        ]
        for key, runs in groups.items()
    ]
