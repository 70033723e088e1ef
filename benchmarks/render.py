"""Write the tables and pictures of README and docs from the result files.

    python benchmarks/render.py

A test compares the tables with what this writes.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from pictures import demo_bars, finetune_curves
from prune_tables import (
    ablation_table,
    bf16_table,
    demo_table,
    memory_sentence,
    prompt_table,
    quality_table,
    recovery_table,
    speed_table,
)
from records import ROOT
from scaling_tables import memory_table, projection_table, scaling_table
from zo_tables import epsilon_table, finetune_table, zo_memory_table, zo_step_table

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("ablation", "estimators", "finetune", "recovery", "scaling", "trainables")),
)

# what stands between the pages' markers: the name there, the result file, and what is made of it
BLOCKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("demo_seeds", demo_table),
    "prompts": ("prompts", prompt_table),
    "quality": ("prune_quality", quality_table),
    "memory": ("prune_memory", memory_sentence),
    "bf16": ("prune_bf16", bf16_table),
    "speed": ("prune_speed", speed_table),
    "speed_amx": ("prune_speed_amx", speed_table),
    "ablation": ("ablation", ablation_table),
    "recovery": ("recovery", recovery_table),
    "finetune": ("finetune", finetune_table),
    "epsilon": ("epsilon", epsilon_table),
    "zo_memory": ("zo_memory", zo_memory_table),
    "zo_step": ("zo_step", zo_step_table),
    "scaling": ("scaling", scaling_table),
    "scaling_projection": ("scaling", projection_table),
    "scaling_memory": ("scaling", memory_table),
}


def load(name: str) -> dict[str, Any]:
    """Read a result file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def rendered(text: str) -> str:
    """A page with its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"Expected a marker to be one of {', '.join(BLOCKS)}, but got {match[2]!r}")
        name, make = BLOCKS[match[2]]
        return f"{match[1]}{make(load(name))}\n{match[3]}"

    return re.sub(r"(<!-- (\w+): written by [^>]*-->\n).*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def main() -> None:
    """Write all of them."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text()))
    demo_bars(load("demo_seeds"), ROOT / "docs" / "demo.svg")
    if (RESULTS / "finetune.json").exists():
        finetune_curves(load("finetune"), ROOT / "docs" / "finetune.svg")


if __name__ == "__main__":
    main()
