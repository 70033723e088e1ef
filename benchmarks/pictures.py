"""The pictures of README and docs."""

from pathlib import Path
from statistics import mean
from typing import Any

from prune_tables import METHODS

PLAIN, OURS = "#9aa0a6", "#1a73e8"


def pyplot() -> Any:
    """Matplotlib, writing the same file from the same figures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "wandazeta"
    from matplotlib import pyplot as plt

    return plt


def demo_bars(result: dict[str, Any], path: Path) -> None:
    """Bars of the perplexities and accuracies, means over the seeds."""
    plt = pyplot()
    records = result["records"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    values = [mean(r["perplexity"][key] for r in records) for key in METHODS]
    bars = left.barh(list(METHODS.values()), values, color=[PLAIN, PLAIN, PLAIN, OURS])
    left.bar_label(bars, fmt="{:,.0f}", padding=3)
    left.set(xscale="log", title="perplexity at 2:4, log scale (lower is better)")
    left.set_xlim(right=max(values) * 4)
    names = {
        "majority": "majority class",
        "zero_shot": "pruned, zero-shot",
        "fine_tuned": "pruned, forward-only\nfine-tuning",
    }
    values = [mean(r["accuracy"][key] for r in records) for key in names]
    bars = right.barh(list(names.values()), values, color=[PLAIN, PLAIN, OURS])
    right.bar_label(bars, fmt="{:.3f}", padding=3)
    right.set(xlim=(0, 1), title="accuracy, sentiment (higher is better)")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def finetune_curves(result: dict[str, Any], path: Path) -> None:
    """Accuracy on validation against forwards: a panel for each task, model and pattern, the seeds' mean as a line."""
    trained = [r for r in result["records"] if r["phase"] == "final" and r["curve"]]
    panels = list(dict.fromkeys((r["model"], r["pattern"], r["task"]) for r in trained))
    methods = list(dict.fromkeys(r["method"] for r in trained))
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained", squeeze=False)
    for panel, ax in zip(panels, axes[0], strict=True):
        for index, method in enumerate(methods):
            curves = [
                r["curve"] for r in trained if (r["model"], r["pattern"], r["task"]) == panel and r["method"] == method
            ]
            for curve in curves:
                ax.plot(*zip(*curve, strict=True), color=f"C{index}", alpha=0.25, linewidth=0.8)
            if curves:
                # the seeds spend alike, so their points lie over one another
                points = [
                    (mean(f for f, _ in at), mean(a for _, a in at))
                    for at in (list(points) for points in zip(*curves, strict=False))
                ]
                ax.plot(*zip(*points, strict=True), color=f"C{index}", label=method)
        ax.set(title=", ".join(panel), xlabel="forwards", ylabel="accuracy, validation")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
