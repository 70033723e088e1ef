"""Write the README's tables and picture from the result files.

    python benchmarks/render.py

A test compares the tables with what this writes.
"""

import json
import re
from statistics import mean
from typing import Any

from records import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "demo.svg"
METHODS = {"dense": "dense", "magnitude": "magnitude", "wanda": "Wanda", "wanda++": "Wanda++"}
ACCURACIES = {
    "majority": "majority class",
    "zero_shot": "pruned model, zero-shot",
    "fine_tuned": "pruned model, fine-tuned by forward passes alone",
    "zero_shot_dense": "for comparison: dense model, zero-shot",
    "tfidf_logistic_regression": "for comparison: TF-IDF with logistic regression",
}


def load(name: str) -> dict[str, Any]:
    """Read a result file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def rows(heading: list[str], body: list[list[str]]) -> str:
    """A Markdown table, all columns but the first aligned to the right."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo_table(result: dict[str, Any]) -> str:
    """Perplexities, accuracies and costs of every seed, and their means."""
    records = result["records"]

    def line(name: str, values: list[float], form: str) -> list[str]:
        return [name, *(format(value, form) for value in values), f"**{format(mean(values), form)}**"]

    first = records[0]
    body = [[f"perplexity, {first['perplexity']['num_tokens']:,} held-out tokens", *[""] * (len(records) + 1)]]
    body += [line(name, [r["perplexity"][key] for r in records], ",.1f") for key, name in METHODS.items()]
    body += [[f"accuracy, {first['accuracy']['num_examples']:,} test examples", *[""] * (len(records) + 1)]]
    body += [line(name, [r["accuracy"][key] for r in records], ".3f") for key, name in ACCURACIES.items()]
    body += [line("minutes in all", [r["minutes"]["total"] for r in records], ".1f")]
    body += [line("peak memory, GiB", [max(r["peak_memory_gib"].values()) for r in records], ".2f")]
    gain, hardware = result["gain"], result["hardware"]
    text = rows(["", *(f"seed {r['seed']}" for r in records), "mean"], body)
    return (
        f"{text}\n\nGain over the better of zero-shot and majority: {100 * gain['mean']:.1f} points, 95% interval over "
        f"the seeds {100 * gain['lower_95']:.1f} to {100 * gain['upper_95']:.1f}. Fine-tuned were "
        f"{first['trainable_parameters']:,} values by {first['forward_passes']:,} forward passes of "
        f"{first['train_batch_size']} examples. {hardware['cpu']}, {hardware['threads']} threads."
    )


def prompt_table(result: dict[str, Any]) -> str:
    """Zero-shot accuracy of every candidate."""
    body = [
        [f"`{r['template']!r}`", ", ".join(f"`{option!r}`" for option in r["options"]), f"{r['accuracy']:.3f}"]
        for r in result["records"]
    ]
    return rows(["prompt", "answers", f"accuracy, {result['num_examples']} validation examples"], body)


def blocks() -> dict[str, str]:
    """What stands between the README's markers, by name."""
    return {"demo": demo_table(load("demo_seeds")), "prompts": prompt_table(load("prompts"))}


def rendered(text: str) -> str:
    """The README with its tables made anew."""
    for name, block in blocks().items():
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda match: f"{match[1]}{block}\n{match[2]}", text, flags=re.DOTALL)  # noqa: B023
        if found != 1:
            raise ValueError(f"Expected one place for the table {name!r} in {README.name}, but found {found}")
    return text


def picture(result: dict[str, Any]) -> None:
    """Bars of the perplexities and accuracies, means over the seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "wandazeta"
    from matplotlib import pyplot as plt

    records = result["records"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    values = [mean(r["perplexity"][key] for r in records) for key in METHODS]
    bars = left.barh(list(METHODS.values()), values, color=["#9aa0a6", "#9aa0a6", "#9aa0a6", "#1a73e8"])
    left.bar_label(bars, fmt="{:,.0f}", padding=3)
    left.set(xscale="log", title="perplexity at 2:4, log scale (lower is better)")
    left.set_xlim(right=max(values) * 4)
    names = {
        "majority": "majority class",
        "zero_shot": "pruned, zero-shot",
        "fine_tuned": "pruned, forward-only\nfine-tuning",
    }
    values = [mean(r["accuracy"][key] for r in records) for key in names]
    bars = right.barh(list(names.values()), values, color=["#9aa0a6", "#9aa0a6", "#1a73e8"])
    right.bar_label(bars, fmt="{:.3f}", padding=3)
    right.set(xlim=(0, 1), title="accuracy, sentiment (higher is better)")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    """Write both."""
    README.write_text(rendered(README.read_text()))
    picture(load("demo_seeds"))


if __name__ == "__main__":
    main()
