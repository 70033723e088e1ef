"""Write the tables and pictures of README and docs from the result files.

    python benchmarks/render.py

A test fails when a page is not what this script writes.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from records import RESULTS, ROOT
from tables import (
    METHODS,
    ablation_table,
    bf16_table,
    cost_list,
    defaults_table,
    demo_table,
    distil_table,
    epsilon_table,
    finetune_table,
    gpu_kernels_table,
    gpu_peer_table,
    gpu_phases_table,
    gpu_table,
    gpu_zo_table,
    memory_sentence,
    memory_table,
    projection_table,
    prompt_table,
    quality_table,
    readme_table,
    recovery_table,
    replication_table,
    revisions_table,
    scaling_table,
    speed_table,
    zo_memory_table,
    zo_step_table,
)

PAGES = tuple(
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "written by benchmarks/render.py" in page.read_text()
)
METHOD_NAMES = {
    "adazeta": "AdaZeta, the paper's settings",
    "adazeta_identity_start": "AdaZeta, identity start",
    "best": "recommended settings",
    "best_estimated_head": "recommended, estimated head",
    "lora": "LoRA, back-propagation",
    "mezo_lora": "MeZO-LoRA",
}
MODEL_NAMES = {"minilm-l6": "MiniLM-L6", "smollm2-135m": "SmolLM2-135M"}
TASK_NAMES = {"topics": "topics of news", "sentences": "sentiment of sentences"}
PLAIN, OURS = "#9aa0a6", "#1a73e8"

# marker in the pages -> names of its result files, and the function that makes the text of them
BLOCKS: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "cost": (("demo_seeds", "prune_quality", "prune_memory"), cost_list),
    "summary": (("prune_quality", "finetune"), readme_table),
    "demo": (("demo_seeds",), demo_table),
    "prompts": (("prompts",), prompt_table),
    "quality": (("prune_quality",), quality_table),
    "memory": (("prune_memory",), memory_sentence),
    "bf16": (("prune_bf16",), bf16_table),
    "speed": (("prune_speed",), speed_table),
    "revisions": (("revisions",), revisions_table),
    "speed_amx": (("prune_speed_amx",), speed_table),
    "ablation": (("ablation",), ablation_table),
    "recovery": (("recovery",), recovery_table),
    "distil": (("distil",), distil_table),
    "replication": (("prune_quality", "recovery", "finetune", "zo_memory"), replication_table),
    "finetune": (("finetune",), finetune_table),
    "defaults": (("defaults",), defaults_table),
    "epsilon": (("epsilon",), epsilon_table),
    "zo_memory": (("zo_memory",), zo_memory_table),
    "zo_step": (("zo_step",), zo_step_table),
    "scaling": (("scaling",), scaling_table),
    "scaling_projection": (("scaling",), projection_table),
    "scaling_memory": (("scaling",), memory_table),
    "gpu": (("prune_gpu", "prune_gpu_home_cpu", "kernels_gpu"), gpu_table),
    "gpu_phases": (("prune_gpu", "prune_gpu_home_cpu"), gpu_phases_table),
    "gpu_peer": (("peer_gpu",), gpu_peer_table),
    "gpu_zo": (("zo_gpu",), gpu_zo_table),
    "gpu_kernels": (("kernels_gpu",), gpu_kernels_table),
}


def load(name: str) -> dict[str, Any]:
    """Read a result file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def rendered(text: str) -> str:
    """Return a page with the text between its markers made anew."""

    def fill(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"Expected a marker to be one of {', '.join(BLOCKS)}, but got {match[2]!r}")
        names, make = BLOCKS[match[2]]
        return f"{match[1]}{make(*map(load, names))}\n{match[3]}"

    return re.sub(r"(<!-- (\w+): written by [^>]*-->\n).*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def pyplot() -> Any:
    """Return pyplot, set up to write the same file from the same records."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "wandazeta"
    from matplotlib import pyplot as plt

    return plt


def demo_bars(result: dict[str, Any], path: Path) -> None:
    """Draw bars of the perplexities and accuracies, means over the seeds."""
    plt = pyplot()
    records = result["records"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    values = [mean(r["perplexity"][key] for r in records) for key in METHODS]
    bars = left.barh(list(METHODS.values()), values, color=[PLAIN, PLAIN, PLAIN, OURS])
    left.bar_label(bars, fmt="{:,.0f}", padding=3)
    # 1 is the smallest perplexity
    left.set(xscale="log", xlim=(1, max(values) * 8), title="SmolLM2-135M pruned to 2:4: lower is better")
    left.set_xlabel("perplexity, log scale from 1 (certain of every token)")
    left.xaxis.set_major_formatter("{x:,.0f}")
    names = {
        "zero_shot": "pruned, zero-shot",
        "fine_tuned": "pruned, fine-tuned with\nforward passes alone",
        "tfidf_logistic_regression": "TF-IDF with logistic\nregression",
    }
    values = [mean(r["accuracy"][key] for r in records) for key in names]
    (chance,) = {r["accuracy"]["majority"] for r in records}
    bars = right.barh(list(names.values()), values, color=[PLAIN, OURS, PLAIN])
    right.bar_label(bars, fmt="{:.3f}", padding=3)
    right.set(xlim=(chance, 1), title="Sentiment of reviews: higher is better")
    right.set_xlabel(f"accuracy, from {chance:g} (majority class) to 1")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def finetune_curves(result: dict[str, Any], path: Path) -> None:
    """Draw validation accuracy against forward passes, one panel per task, model and pattern, with the seeds' mean.

    The accuracy starts at chance (the examples are balanced over the classes) or at the smallest value below it, and
    the passes at 0. Curves have their names beside their ends.
    """
    trained = [r for r in result["records"] if r["phase"] == "final" and r["curve"]]
    panels = list(dict.fromkeys((r["model"], r["pattern"], r["task"]) for r in trained))
    methods = list(dict.fromkeys(r["method"] for r in trained))
    plt = pyplot()
    height = math.ceil(len(panels) / 2)
    figure, axes = plt.subplots(height, 2, figsize=(12, 3.4 * height), layout="constrained", squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for (model, pattern, task), ax in zip(panels, axes.flat, strict=False):
        found = [r for r in trained if (r["model"], r["pattern"], r["task"]) == (model, pattern, task)]
        chance = 1 / len(found[0]["data"]["options"])
        ends = {}
        for index, method in enumerate(methods):
            curves = [r["curve"] for r in found if r["method"] == method]
            for curve in curves:
                ax.plot(*zip(*curve, strict=True), color=f"C{index}", alpha=0.25, linewidth=0.8)
            if curves:
                # all seeds have points at the same numbers of forward passes
                points = [
                    (mean(f for f, _ in at), mean(a for _, a in at))
                    for at in (list(points) for points in zip(*curves, strict=False))
                ]
                ax.plot(*zip(*points, strict=True), color=f"C{index}")
                ends[f"C{index}", METHOD_NAMES[method]] = points[-1]
        right = max(x for x, _ in ends.values())
        lowest = min(chance, *(a for r in found for _, a in r["curve"]))
        ax.axhline(chance, color=PLAIN, linewidth=0.8, linestyle="--")
        ax.annotate("chance", (right, chance), (-4, 4), textcoords="offset points", ha="right", color=PLAIN)
        places = spread_out([y for _, y in ends.values()], 0.075 * (1 - lowest), lowest, 1)
        for ((color, name), (_, y)), place in zip(ends.items(), places, strict=True):
            ax.plot([right, 1.03 * right], [y, place], color=color, linewidth=0.8, clip_on=False)
            ax.text(1.04 * right, place, name, color=color, va="center")
        state = "dense" if pattern == "dense" else f"pruned to {pattern}"
        ax.set_title(f"{MODEL_NAMES[model]}, {state}: {TASK_NAMES[task]}", loc="left")
        ax.set(xlim=(0, right), ylim=(lowest, 1), xlabel="forward passes over a batch", ylabel="validation accuracy")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def spread_out(values: list[float], distance: float, lowest: float, highest: float) -> list[float]:
    """Return places near the values, in the same order and at least a distance from each other.

    Args:
        values: The values that the places are for.
        distance: Smallest distance of two places.
        lowest: Smallest place.
        highest: Largest place.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    places = list(values)
    last = lowest - distance
    for index in order:
        places[index] = last = max(places[index], last + distance)
    limit = highest + distance
    for index in reversed(order):
        places[index] = limit = min(places[index], limit - distance)
    return places


def main() -> None:
    """Write all pages and pictures."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text()))
    demo_bars(load("demo_seeds"), ROOT / "docs" / "demo.svg")
    finetune_curves(load("finetune"), ROOT / "docs" / "finetune.svg")


if __name__ == "__main__":
    main()
