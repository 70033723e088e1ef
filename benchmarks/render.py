"""Write the tables and pictures of README and docs from the result files.

    python benchmarks/render.py

A test compares the tables with what this writes.
"""

import json
import re
from collections.abc import Callable
from statistics import mean
from typing import Any

from records import ROOT
from scaling_rows import (
    COPIES,
    MEASURED_HEADING,
    MEMORY_HEADING,
    PROJECTED_HEADING,
    PROMPTS,
    TOKENS,
    measured_rows,
    memory_rows,
    projected_rows,
)
from step_rows import STEP_HEADING, step_rows

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("ablation", "estimators", "finetune", "scaling", "trainables")),
)
PICTURE = ROOT / "docs" / "demo.svg"
CURVES = ROOT / "docs" / "finetune.svg"
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


def quality_table(result: dict[str, Any]) -> str:
    """Means over the seeds with their range, a row for each pattern and method, a column for each text."""
    records = result["records"]
    texts = list(dict.fromkeys(r["text"] for r in records))
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["pattern"], record["method"]), []).append(record)
    patterns = ["dense", *dict.fromkeys(pattern for pattern, _ in groups if pattern != "dense")]
    methods = ["dense", "magnitude", "wanda", "sparsegpt", "paper", "best"]
    body = []
    for pattern, method in ((p, m) for p in patterns for m in methods if (p, m) in groups):
        found = groups[pattern, method]
        values = [spread([r["perplexity"] for r in found if r["text"] == text], ",.1f") for text in texts]
        minutes = spread([r["seconds"] / 60 for r in found if r["text"] == texts[0]], ",.1f")
        seeds = len({r["seed"] for r in found})
        body.append([f"{pattern}, {method}" if method != "dense" else method, *values, minutes, str(seeds)])
    heading = ["", *(f"perplexity, {text}" for text in texts), "minutes", "seeds"]
    hardware = result["hardware"]
    ratios = "\n".join(quality_ratios(records, texts, patterns[1:]))
    return f"{rows(heading, body)}\n\n{hardware['cpu']}, threads: {hardware['threads']}.\n\n{ratios}"


def quality_ratios(records: list[dict[str, Any]], texts: list[str], patterns: list[str]) -> list[str]:
    """What `best` has of the others' perplexities with the same seed: a line for each pattern."""
    known = {(r["pattern"], r["method"], r["text"], r["seed"]): r["perplexity"] for r in records}
    seeds = sorted({r["seed"] for r in records})
    lines = []
    for pattern in patterns:
        parts = []
        for method, name in (("wanda", "Wanda's perplexity"), ("sparsegpt", "SparseGPT's")):
            for text in texts:
                pairs = [[known.get((pattern, m, text, seed)) for m in ("best", method)] for seed in seeds]
                found = [best / other for best, other in pairs if best is not None and other is not None]
                if found:
                    parts.append(f"{spread(found, '.2f')} of {name} on {text}")
        if parts:
            lines.append(f"- {pattern}: `best` has {', '.join(parts)}.")
    return lines


def spread(values: list[float], form: str) -> str:
    """Mean, and lowest to highest where they differ."""
    text = format(mean(values), form)
    if len(values) == 1 or min(values) == max(values):
        return text
    return f"{text} ({format(min(values), form)} to {format(max(values), form)})"


def ablation_table(result: dict[str, Any]) -> str:
    """Every variant, the best first within its setting."""
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in result["records"]:
        key = tuple(record[name] for name in ("pattern", "blocks", "samples", "tokens", "eval_windows"))
        settings.setdefault(key, []).append(record)
    parts = []
    for (pattern, blocks, samples, tokens, windows), records in settings.items():
        records.sort(key=lambda r: r.get("perplexity", float("inf")))
        body = [
            [
                r["name"],
                "; ".join(f"{key} {value}" for key, value in r["changes"].items()) or "the base",
                f"{r['perplexity']:.2f}" if "perplexity" in r else r["failure"],
                f"{r['processor_seconds']:.0f}" if "processor_seconds" in r else "",
                f"`{r['commit']}`",
            ]
            for r in records
        ]
        title = (
            f"### {pattern}: the first {blocks} blocks, {samples} x {tokens} tokens, {windows} windows of validation"
        )
        heading = ["variant", "what it changes", "perplexity", "processor seconds", "commit"]
        parts.append(f"{title}\n\n{rows(heading, body)}")
    return "\n\n".join(parts)


def memory_sentence(result: dict[str, Any]) -> str:
    """What the largest model took that was pruned from its files."""
    record = max(result["records"], key=lambda r: r["model_gib"])
    return (
        f"Larger than memory: {record['model']} ({record['model_gib']:.1f} GiB in {record['dtype']}), pruned by "
        f"{record['method']} to {record['pattern']} from its files and exported: {record['peak_gib']:.2f} GiB resident "
        f"at the peak, {record['seconds'] / 60:.0f} minutes beside other work on {record['threads']} threads "
        f"({record['samples']} x {record['tokens']} tokens)."
    )


def speed_table(result: dict[str, Any]) -> str:
    """Seconds of this project and of llm-compressor for the same pruning, every kind of run."""
    tools = {"wandazeta": "wandazeta", "llmcompressor": "llm-compressor"}
    body = [
        [
            f"{row['method']}, {tools[row['tool']]}",
            "bfloat16" if row["compute_dtype"] == "bfloat16" else row["dtype"],
            str(row["batch_size"]),
            f"{row['median']:.1f}"
            if row["runs"] == 1
            else f"{row['median']:.1f} ({row['min']:.1f} to {row['max']:.1f})",
            str(row["runs"]),
            f"{row['perplexity']:.1f}",
        ]
        for row in sorted(result["summary"]["rows"], key=lambda row: row["method"], reverse=True)
    ]
    first = result["records"][0]
    compared = [
        f"{row['method']}{', products in bfloat16' if row['compute_dtype'] == 'bfloat16' else ''} "
        f"{row['times_faster']:.2f} times"
        for row in result["summary"]["compared"]
    ]
    heading = ["", "products in", "batch", "seconds", "runs", "perplexity"]
    return (
        f"{rows(heading, body)}\n\n{first['sparsity_pattern']}, {first['num_samples']} x {first['sequence_length']} "
        f"tokens, {first['threads']} threads, {result['hardware']['cpu']}. As fast as llm-compressor's fastest: "
        f"{'; '.join(compared)}."
    )


def bf16_table(result: dict[str, Any]) -> str:
    """What computing in bfloat16 changes, by method."""
    body = [
        [
            r["method"],
            *(f"{r['perplexity'][precision]:.2f}" for precision in ("fp32", "bf16")),
            f"{r['perplexity_change']:+.2%}",
            f"{r['differing_mask_share']:.2%}",
        ]
        for r in result["records"]
    ]
    heading = ["", "perplexity, fp32", "bf16 compute", "change", "places of the mask that differ"]
    first = result["records"][0]
    return (
        f"{rows(heading, body)}\n\nSmolLM2-135M, its first {first['num_blocks_pruned']} blocks at {first['pattern']}, "
        f"{first['num_samples']} x {first['sequence_length']} tokens."
    )


def finetune_table(result: dict[str, Any]) -> str:
    """Test accuracy of every method, means over the seeds with their range; a table for each model and pattern."""
    final = [r for r in result["records"] if r["phase"] == "final"]
    tasks = list(dict.fromkeys(r["task"] for r in final))
    text_baseline = [r for r in final if r["model"] == "none"]
    parts = []
    for model, pattern in dict.fromkeys((r["model"], r["pattern"]) for r in final if r["model"] != "none"):
        found = [r for r in final if (r["model"], r["pattern"]) == (model, pattern)] + text_baseline
        body = []
        for method in dict.fromkeys(r["method"] for r in found):
            chosen = [r for r in found if r["method"] == method]
            cells = [[r["accuracy"] for r in chosen if r["task"] == task] for task in tasks]
            forwards = f"{max(r['forwards'] for r in chosen):,}"
            seeds = len({r["seed"] for r in chosen})
            body.append([f"`{method}`", *(spread(c, ".3f") if c else "" for c in cells), forwards, str(seeds)])
        parts.append(f"### {model}, {pattern}\n\n{rows(['', *tasks, 'forwards', 'seeds'], body)}")
    return "\n\n".join(parts)


def finetune_curves(result: dict[str, Any]) -> None:
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
    figure.savefig(CURVES, metadata={"Date": None})


def epsilon_table(result: dict[str, Any]) -> str:
    """Correlations over epsilon, a column for each precision, start and estimator; recommended ones in bold."""
    records = result["records"]
    heading, columns = ["epsilon"], []
    for record in records:
        start = "identity" if record["identity_start"] else "random"
        for name, epsilon in record["recommended"].items():
            heading.append(f"{record['dtype']}, {start} start, {name}")
            found = {row["epsilon"]: row["correlation"] for row in record["rows"] if row["estimator"] == name}
            columns.append({e: f"**{c:.3f}**" if e == epsilon else f"{c:.3f}" for e, c in found.items()})
    body = [[f"{epsilon:g}", *(column[epsilon] for column in columns)] for epsilon in columns[0]]
    first = records[0]
    return (
        f"{rows(heading, body)}\n\nSmolLM2-135M, default adapters at their start, {first['num_batches']} batches of "
        f"{first['batch']} prompts with {first['num_queries']} directions each; bold is recommended."
    )


def zo_memory_table(result: dict[str, Any]) -> str:
    """Peak memory of what can be trained, beside inference."""
    names = {
        "tensor_train": "tensor trains",
        "lora": "LoRA",
        "mezo": "all weights (MeZO)",
        "tensor_train_backprop": "tensor trains by back-propagation",
        "lora_backprop": "LoRA by back-propagation",
        "full_backprop": "all weights by back-propagation",
    }
    records, first = result["records"], result["records"][0]
    body = [["inference", f"{first['inference_gib']:.3f}", ""]]
    body += [[names[r["method"]], f"{r['peak_gib']:.3f}", f"{r['peak_gib'] / r['inference_gib']:.2f}"] for r in records]
    return (
        f"{rows(['', 'peak, GiB', 'x inference'], body)}\n\n{first['model']} in {first['dtype']}, {first['batch']} x "
        f"{first['tokens']} tokens, {result['hardware']['cpu']}."
    )


def zo_step_table(result: dict[str, Any]) -> str:
    """Seconds of a step beside those of its forwards and of a loop."""
    hardware, first = result["hardware"], result["records"][0]
    repeats = len({record["repeat"] for record in result["records"]})
    return (
        f"{rows(STEP_HEADING, step_rows(result['records']))}\n\n{first['model']} in float32, {hardware['cpu']}, "
        f"{first['threads']} threads; medians of {repeats} runs, the lowest and the highest in brackets."
    )


def scaling_table(result: dict[str, Any]) -> str:
    """Measured seconds of one, two and four processes, and what the cost model says to them."""
    hardware = result["hardware"]
    repeats = len(result["records"][0]["seconds"])
    return (
        f"{rows(MEASURED_HEADING, measured_rows(result['records']))}\n\nSmolLM2-135M in float32, gloo, one thread a "
        f"process, {hardware['cores']} cores of {hardware['cpu']}; medians of {repeats} runs, the lowest and the "
        "highest in brackets."
    )


def projection_table(result: dict[str, Any]) -> str:
    """The cost model with figures of GPUs that nobody has measured here."""
    return rows(PROJECTED_HEADING, projected_rows(result["records"]))


def memory_table(result: dict[str, Any]) -> str:
    """Memory of the worked examples, by the formulas."""
    return (
        f"{rows(MEMORY_HEADING, memory_rows())}\n\nbfloat16, {PROMPTS} prompts of {TOKENS} tokens, {COPIES} perturbed "
        "copies in a forward, tensor trains of rank 5 at three places of every block."
    )


# what stands between the pages' markers: the name there, the result file, and what is made of it
BLOCKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("demo_seeds", demo_table),
    "prompts": ("prompts", prompt_table),
    "quality": ("prune_quality", quality_table),
    "memory": ("prune_memory", memory_sentence),
    "bf16": ("prune_bf16", bf16_table),
    "speed": ("prune_speed", speed_table),
    "ablation": ("ablation", ablation_table),
    "finetune": ("finetune", finetune_table),
    "epsilon": ("epsilon", epsilon_table),
    "zo_memory": ("zo_memory", zo_memory_table),
    "zo_step": ("zo_step", zo_step_table),
    "scaling": ("scaling", scaling_table),
    "scaling_projection": ("scaling", projection_table),
    "scaling_memory": ("scaling", memory_table),
}


def rendered(text: str) -> str:
    """A page with its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"Expected a marker to be one of {', '.join(BLOCKS)}, but got {match[2]!r}")
        name, make = BLOCKS[match[2]]
        return f"{match[1]}{make(load(name))}\n{match[3]}"

    return re.sub(r"(<!-- (\w+): written by [^>]*-->\n).*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def pyplot() -> Any:
    """Matplotlib, writing the same file from the same figures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "wandazeta"
    from matplotlib import pyplot as plt

    return plt


def picture(result: dict[str, Any]) -> None:
    """Bars of the perplexities and accuracies, means over the seeds."""
    plt = pyplot()
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
    """Write all of them."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(rendered(path.read_text()))
    picture(load("demo_seeds"))
    if (RESULTS / "finetune.json").exists():
        finetune_curves(load("finetune"))


if __name__ == "__main__":
    main()
