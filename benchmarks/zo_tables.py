"""What docs show of the zeroth-order steps and of the fine-tuning."""

from statistics import median
from typing import Any

from tables import rows, spread

STEP_HEADING = [
    *("adapters in", "batch", "tokens", "queries", "copies together", "seconds a step"),
    *("x its forwards", "faster than the loop"),
]


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


def step_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each setting: ratios of the medians over its runs, with the lowest and the highest of a run."""
    names = ("layers", "batch", "prompt_tokens", "num_queries", "query_chunk_size")
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
        for key, runs in sorted(groups.items())
    ]
