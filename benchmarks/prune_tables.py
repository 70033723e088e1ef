"""What README and docs show of the prunings."""

from statistics import mean
from typing import Any

from tables import interval, rows, spread

METHODS = {"dense": "dense", "magnitude": "magnitude", "wanda": "Wanda", "wanda++": "Wanda++"}
ACCURACIES = {
    "majority": "majority class",
    "zero_shot": "pruned model, zero-shot",
    "fine_tuned": "pruned model, fine-tuned by forward passes alone",
    "zero_shot_dense": "for comparison: dense model, zero-shot",
    "tfidf_logistic_regression": "for comparison: TF-IDF with logistic regression",
}
# as it is, and as it was
BEST = {
    "best": "`best`",
    "best_12_rounds": "`best`, learning rate 1e-3",
    "best_3_copies": "`best`, learning rate 1e-3, three written windows for each",
    "best_6_rounds": "`best`, learning rate 1e-3, 6 rounds",
}
TRAINED = {"lora": "LoRA", "masked_full": "all weights, masked"}


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
    methods = ["dense", "magnitude", "wanda", "sparsegpt", "paper", *BEST]
    body = []
    for pattern, method in ((p, m) for p in patterns for m in methods if (p, m) in groups):
        found = groups[pattern, method]
        values = [spread([r["perplexity"] for r in found if r["text"] == text], ",.1f") for text in texts]
        minutes = spread([r["seconds"] / 60 for r in found if r["text"] == texts[0]], ",.1f")
        seeds = len({r["seed"] for r in found})
        name = BEST.get(method, method)
        body.append([f"{pattern}, {name}" if method != "dense" else name, *values, minutes, str(seeds)])
    heading = ["", *(f"perplexity, {text}" for text in texts), "minutes", "seeds"]
    ratios = "\n".join(quality_ratios(records, texts, patterns[1:]))
    return f"{rows(heading, body)}\n\n{ratios}"


def quality_ratios(records: list[dict[str, Any]], texts: list[str], patterns: list[str]) -> list[str]:
    """What `best` has of the others' perplexities with the same seed: a line for each pattern and kind of it."""
    known = {(r["pattern"], r["method"], r["text"], r["seed"]): r["perplexity"] for r in records}
    seeds = sorted({r["seed"] for r in records})
    lines = []
    for pattern, kind in ((pattern, kind) for pattern in patterns for kind in BEST):
        parts = []
        for method, name in (("wanda", "Wanda's perplexity"), ("sparsegpt", "SparseGPT's")):
            for text in texts:
                pairs = [[known.get((pattern, m, text, seed)) for m in (kind, method)] for seed in seeds]
                found = [best / other for best, other in pairs if best is not None and other is not None]
                if found:
                    parts.append(f"{spread(found, '.2f')} of {name} on {text}")
        if parts:
            lines.append(f"- {pattern}: {BEST[kind]} has {', '.join(parts)}.")
    return lines


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
    """What computing in bfloat16 changes, by size of the calibration and method; means over the seeds."""
    names = ("num_blocks_pruned", "num_samples", "sequence_length", "method")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in result["records"]:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    body = []
    for (num_blocks, num_samples, length, method), found in sorted(groups.items()):
        known = [r["perplexity"] for r in found if "jittered" in r["perplexity"]]
        jittered = [perplexity["jittered"] / perplexity["fp32"] - 1 for perplexity in known]
        changes = [r["perplexity_change"] for r in found]
        line = [
            method,
            str(num_blocks),
            f"{num_samples} x {length}",
            *(f"{mean(r['perplexity'][precision] for r in found):.2f}" for precision in ("fp32", "bf16")),
            spread(changes, "+.1%"),
            "{:+.1%} to {:+.1%}".format(*interval(changes)) if len(changes) > 1 else "",
            spread(jittered, "+.1%") if jittered else "",
            f"{mean(r['differing_mask_share'] for r in found):.2%}",
            str(len(found)),
        ]
        body.append(line)
    heading = ["", "blocks", "tokens", "perplexity, fp32", "bf16 compute", "change", "of the mean, 95%"]
    heading += ["jittered", "places", "seeds"]
    return (
        f"{rows(heading, body)}\n\nSmolLM2-135M at {result['records'][0]['pattern']}. Change: mean over the seeds, "
        "least and greatest; beside it the 95% interval of the mean. Places: of the mask, that differ "
        "between fp32 and bf16. Jittered: the change where all is in fp32 and the blocks' outputs are moved by half a "
        "unit of bf16."
    )


def recovery_table(result: dict[str, Any]) -> str:
    """Perplexity on test documents before and after training, at the rate that validation chose."""
    records = result["records"]
    body = []
    for model, method in dict.fromkeys((r["model"], r["method"]) for r in records):
        found = [r for r in records if (r["model"], r["method"]) == (model, method)]
        best = min(found, key=lambda r: r["perplexity_after"]["val"])
        before, after = (best[f"perplexity_{when}"]["test"] for when in ("before", "after"))
        merged = f"{best['perplexity_merged']['test']:.1f}" if "perplexity_merged" in best else ""
        name = f"{best['pattern']}, {best['pruned_by']}, {TRAINED[method]}"
        figures = [f"{before:.1f}", f"{after:.1f}", merged, f"{best['learning_rate']:g}", str(len(found))]
        body.append([name, *figures, f"{best['seconds'] / 60:.0f}"])
    heading = ["", "before", "after", "merged", "learning rate", "rates tried", "minutes"]
    first = records[0]
    return (
        f"{rows(heading, body)}\n\nSmolLM2-135M, {first['steps']} steps of {first['batch_size']} x "
        f"{first['sequence_length']} tokens of Wikipedia, one seed; {first['eval_windows']} windows of test documents; "
        f"{result['hardware']['cpu']}, threads: {result['hardware']['threads']}."
    )
