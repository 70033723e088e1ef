"""Markdown tables of README and docs, made from the records under `benchmarks/results/`."""

from statistics import mean, median, stdev
from typing import Any

from scaling import (
    SHAPES,
    activation_bytes,
    adapter_bytes,
    gathered_weights,
    resident_weights,
)
from scipy.stats import t as student

from wandazeta.adapters import AdapterLayout

TEXTS = {"wikipedia": "Wikipedia", "brown": "Brown"}
# of the demo
METHODS = {"dense": "dense", "magnitude": "magnitude", "wanda": "Wanda", "tuned-ro": "tuned RO"}
ACCURACIES = {
    "majority": "majority class",
    "zero_shot": "pruned model, zero-shot",
    "fine_tuned": "pruned model, fine-tuned with forward passes alone",
    "zero_shot_dense": "for comparison: dense model, zero-shot",
    "tfidf_logistic_regression": "for comparison: TF-IDF with logistic regression",
}
# the preset `best` today, and at earlier commits
BEST = {
    "best": "tuned RO (preset `best`)",
    "best_straight_through": "Wanda++, straight-through, learning rate 6e-4",
    "best_12_rounds": "Wanda++, learning rate 1e-3",
    "best_3_copies": "Wanda++, learning rate 1e-3, 3 generated windows per real one",
    "best_6_rounds": "Wanda++, learning rate 1e-3, 6 rounds",
}
TRAINED = {"lora": "LoRA", "masked_full": "all weights, masked"}
STEP_HEADING = [
    *("layers with adapters", "batch", "tokens", "queries", "copies per pass", "seconds per step"),
    *("step / its forward passes", "loop / step"),
]
MEASURED_HEADING = ["", "processes", "seconds", "predicted", "bytes exchanged"]
PROJECTED_HEADING = ["", "GPUs", "seconds", "bytes exchanged"]
MEMORY_HEADING = ["GiB per GPU", "weights", "gathered", "adapters", "activations", "total"]
JOBS = {"zo": "a step of 16 queries", "prune": "Wanda"}
# model in bfloat16, number of GPUs, sharded, offloaded to CPU memory
EXAMPLES = {
    "7B on one card of 24 GB": ("llama-7b", 1, False, False),
    "7B on eight GPUs, sharded": ("llama-7b", 8, True, False),
    "70B on one card of 80 GB, offloaded": ("llama-70b", 1, True, True),
    "70B on two nodes of eight": ("llama-70b", 16, True, False),
}
COPIES, PROMPTS, TOKENS = 4, 16, 256
PHASES = {
    "capture": "inputs of the first block",
    "measure": "input norms and regional gradients",
    "optimise": "regional optimisation",
    "norms": "input norms of the optimised block",
    "prune": "scores and masks",
    "solve": "masks and weights by SparseGPT",
    "propagate": "outputs for the next block",
    "rest": "moving results to the CPU, the report",
    "total": "total",
}


def rows(heading: list[str], body: list[list[str]]) -> str:
    """Return a Markdown table with all columns but the first aligned to the right."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: list[float], form: str) -> str:
    """Format the mean, with the range in brackets where values differ."""
    text = format(mean(values), form)
    if len(values) == 1 or min(values) == max(values):
        return text
    return f"{text} ({format(min(values), form)} to {format(max(values), form)})"


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95% confidence interval of the mean of at least two values, by Student's distribution."""
    margin = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values) - margin, mean(values) + margin


def settings_of(record: dict[str, Any]) -> str:
    """Name of the settings of a record of `prune_quality`; `best` had others before it tuned itself."""
    is_old = record["method"] == "best" and record["options"]["method"] == "wanda++"
    return "best_straight_through" if is_old else str(record["method"])


def quality_groups(result: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Group the records of `prune_quality` by model and calibration; the dense model is in all groups of its model."""
    records = result["records"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        if record["method"] != "dense":
            groups.setdefault((record["model"], record.get("calibration", result["calibration"])), []).append(record)
    for (model, _), found in groups.items():
        found[:0] = [r for r in records if (r["model"], r["method"]) == (model, "dense")]
    return groups


def readme_table(quality: dict[str, Any], finetune: dict[str, Any]) -> str:
    """The table of README: perplexity of 2:4 prunings, and accuracy before and after fine-tuning."""
    patterns = {
        "dense": "dense",
        "wanda": "2:4, Wanda",
        "sparsegpt": "2:4, SparseGPT",
        "best": "2:4, **tuned RO**, the default",
    }
    final = [r for r in finetune["records"] if (r["phase"], r["model"]) == ("final", "smollm2-135m")]

    records = quality_groups(quality)["SmolLM2-135M", quality["calibration"]]

    def perplexities(method: str) -> list[str]:
        found = [r for r in records if settings_of(r) == method and r["pattern"] in ("dense", "2:4")]
        return [spread([r["perplexity"] for r in found if r["text"] == text], ",.1f") for text in TEXTS]

    def accuracy(method: str, pattern: str) -> str:
        found = [r for r in final if (r["task"], r["method"], r["pattern"]) == ("topics", method, pattern)]
        return spread([r["accuracy"] for r in found], ".3f")

    body = [[name, *perplexities(method), ""] for method, name in patterns.items()]
    body[0][-1] = accuracy("zero_shot", "dense")
    forward_only = "fine-tuned with **forward passes alone**"
    body += [[f"dense, {forward_only}", "", "", accuracy("best", "dense")]]
    body += [[f"50% by Wanda++, {forward_only}", "", "", accuracy("best", "50%")]]
    body += [["dense, LoRA by back-propagation", "", "", accuracy("lora", "dense")]]
    body += [["dense and frozen, logistic regression on its hidden states", "", "", accuracy("linear_probe", "dense")]]
    heading = ["SmolLM2-135M", *(f"perplexity, {name}" for name in TEXTS.values()), "accuracy, news topics"]
    (tuned, *_) = (r for r in final if r["method"] == "best")
    return (
        f"{rows(heading, body)}\n\nMeans over up to {len({r['seed'] for r in final})} seeds, range in brackets; "
        f"calibrated on {quality['calibration']} of Wikipedia. "
        f"{_second_decoder(quality)} Fine-tuning: "
        f"{tuned['data']['num_train']} examples, {tuned['forwards']} forward passes of {tuned['data']['batch_size']} "
        "examples each, or the same cost by back-propagation. The accuracy in the dense row is zero-shot."
    )


def _second_decoder(quality: dict[str, Any]) -> str:
    """One sentence on the other models at 2:4, each with the calibration that it has."""
    names = {"dense": "dense", "sparsegpt": "SparseGPT", "best": "tuned RO"}
    sentences = []
    for (model, calibration), records in quality_groups(quality).items():
        if model == "SmolLM2-135M":
            continue
        parts = []
        for method, name in names.items():
            found = [r for r in records if settings_of(r) == method and r["pattern"] in ("dense", "2:4")]
            values = [spread([r["perplexity"] for r in found if r["text"] == text], ",.1f") for text in TEXTS]
            parts.append(f"{name} {' and '.join(values)}")
        sentences.append(f"{model} at 2:4, {calibration}: {', '.join(parts)}.")
    return " ".join(sentences)


def cost_list(demo: dict[str, Any], quality: dict[str, Any], memory: dict[str, Any]) -> str:
    """Time and memory by size of the model, for README."""
    runs = demo["records"]
    minutes = mean(r["minutes"]["total"] for r in runs)
    gib = max(max(r["peak_memory_gib"].values()) for r in runs)
    records = quality_groups(quality)["SmolLM2-135M", quality["calibration"]]
    best = [r for r in records if (settings_of(r), r["pattern"], r["text"]) == ("best", "2:4", "wikipedia")]
    threads = sorted({r["threads"] for r in best})
    counted = f"{' or '.join(map(str, threads))} thread{'s' if threads[-1] > 1 else ''}"
    streamed = max(memory["records"], key=lambda r: r["model_gib"])
    return (
        f"- 135M parameters, {demo['hardware']['threads']} CPU threads: the demo (pruning, fine-tuning, all "
        f"evaluations) takes {minutes:.0f} minutes and at most {gib:.1f} GiB; pruning with the preset `best` takes "
        f"{spread([r['seconds'] / 60 for r in best], '.0f')} minutes on {counted}.\n"
        f"- {streamed['model'].split()[-1].upper()} parameters, {streamed['threads']} CPU threads: pruning by "
        f"{streamed['method'].capitalize()} with weights streamed from disk takes {streamed['peak_gib']:.1f} GiB for a "
        f"model of {streamed['model_gib']:.1f} GiB, and {streamed['seconds'] / 60:.0f} minutes with "
        f"{streamed['samples']} short samples."
    )


def demo_table(result: dict[str, Any]) -> str:
    """Perplexities, accuracies and costs of the demo, by seed and in the mean."""
    records = result["records"]

    def line(name: str, values: list[float], form: str) -> list[str]:
        return [name, *(format(value, form) for value in values), f"**{format(mean(values), form)}**"]

    first = records[0]
    body = [[f"perplexity, {first['perplexity']['num_tokens']:,} held-out tokens", *[""] * (len(records) + 1)]]
    body += [line(name, [r["perplexity"][key] for r in records], ",.1f") for key, name in METHODS.items()]
    body += [[f"accuracy, {first['accuracy']['num_examples']:,} test examples", *[""] * (len(records) + 1)]]
    body += [line(name, [r["accuracy"][key] for r in records], ".3f") for key, name in ACCURACIES.items()]
    body += [line("minutes in total", [r["minutes"]["total"] for r in records], ".1f")]
    body += [line("peak memory, GiB", [max(r["peak_memory_gib"].values()) for r in records], ".2f")]
    gain, hardware = result["gain"], result["hardware"]
    text = rows(["", *(f"seed {r['seed']}" for r in records), "mean"], body)
    return (
        f"{text}\n\nGain over the better of zero-shot and majority class: {100 * gain['mean']:.1f} points (95% "
        f"interval over the seeds: {100 * gain['lower_95']:.1f} to {100 * gain['upper_95']:.1f}). Fine-tuning "
        f"trained {first['trainable_parameters']:,} values with {first['forward_passes']:,} forward passes of "
        f"{first['train_batch_size']} examples. Hardware: {hardware['cpu']}, {hardware['threads']} threads."
    )


def prompt_table(result: dict[str, Any]) -> str:
    """Zero-shot accuracy of every candidate prompt of the demo."""
    body = [
        [f"`{r['template']!r}`", ", ".join(f"`{option!r}`" for option in r["options"]), f"{r['accuracy']:.3f}"]
        for r in result["records"]
    ]
    return rows(["prompt", "answers", f"accuracy, {result['num_examples']} validation examples"], body)


def quality_table(result: dict[str, Any]) -> str:
    """Perplexity after pruning by model and calibration: mean over the seeds with the range, by pattern and method."""
    parts = []
    for (model, calibration), records in quality_groups(result).items():
        parts.append(f"### {model}, calibrated on {calibration}\n\n{quality_section(records)}")
    return "\n\n".join(parts)


def quality_section(records: list[dict[str, Any]]) -> str:
    """Table and ratios of one model and calibration."""
    texts = list(dict.fromkeys(r["text"] for r in records))
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["pattern"], settings_of(record)), []).append(record)
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
    """Ratios of the perplexity of the best settings to that of other methods with the same seed, a line per setting."""
    known = {(r["pattern"], settings_of(r), r["text"], r["seed"]): r["perplexity"] for r in records}
    seeds = sorted({r["seed"] for r in records})
    lines = []
    for pattern, kind in ((pattern, kind) for pattern in patterns for kind in BEST):
        parts = []
        for method, name in (("wanda", "Wanda"), ("sparsegpt", "SparseGPT")):
            for text in texts:
                pairs = [[known.get((pattern, m, text, seed)) for m in (kind, method)] for seed in seeds]
                found = [best / other for best, other in pairs if best is not None and other is not None]
                if found:
                    parts.append(f"{spread(found, '.2f')} times that of {name} on {text}")
        if parts:
            lines.append(f"- {pattern}, {BEST[kind]}: perplexity {', '.join(parts)}.")
    return lines


def ablation_table(result: dict[str, Any]) -> str:
    """Variants of the ablation, by setting, the best first."""
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in result["records"]:
        key = tuple(record[name] for name in ("pattern", "blocks", "samples", "tokens", "eval_windows"))
        # the first records name no model
        settings.setdefault((record.get("model", "SmolLM2-135M"), *key), []).append(record)
    parts = []
    for (model, pattern, blocks, samples, tokens, windows), records in settings.items():
        records.sort(key=lambda r: r.get("perplexity", float("inf")))
        body = [
            [
                r["name"],
                # later records are not of changes to a base
                "; ".join(f"{key} {value}" for key, value in r.get("changes", r["options"]).items())
                or "nothing (the base)",
                f"{r['perplexity']:.2f}" if "perplexity" in r else r["failure"],
                f"{r['processor_seconds']:.0f}" if "processor_seconds" in r else "",
                f"`{r['commit']}`",
            ]
            for r in records
        ]
        title = (
            f"### {model}, {pattern}: first {blocks} blocks, {samples} x {tokens} tokens, {windows} validation windows"
        )
        heading = ["variant", "changes to the base", "perplexity", "CPU seconds", "commit"]
        parts.append(f"{title}\n\n{rows(heading, body)}")
    return "\n\n".join(parts)


def memory_sentence(result: dict[str, Any]) -> str:
    """Memory and time of the largest model that was pruned from its files."""
    record = max(result["records"], key=lambda r: r["model_gib"])
    return (
        f"Streaming: {record['model']} ({record['model_gib']:.1f} GiB in {record['dtype']}), pruned to "
        f"{record['pattern']} by {record['method']} from its files and exported, took {record['peak_gib']:.2f} GiB of "
        f"resident memory at the peak and {record['seconds'] / 60:.0f} minutes on {record['threads']} threads that had "
        f"other work, too ({record['samples']} x {record['tokens']} calibration tokens)."
    )


def speed_table(result: dict[str, Any]) -> str:
    """Seconds of this project and of llm-compressor for the same prunings."""
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
        f"{row['method']}{' in bfloat16' if row['compute_dtype'] == 'bfloat16' else ''} {row['times_faster']:.2f} times"
        for row in result["summary"]["compared"]
    ]
    heading = ["", "compute dtype", "batch", "seconds", "runs", "perplexity"]
    return (
        f"{rows(heading, body)}\n\n{first['sparsity_pattern']}, {first['num_samples']} x {first['sequence_length']} "
        f"tokens, {first['threads']} threads, {result['hardware']['cpu']}; medians, with the range in brackets. Speed "
        f"relative to llm-compressor's faster run: {'; '.join(compared)}."
    )


def bf16_table(result: dict[str, Any]) -> str:
    """Changes from products in bfloat16, by calibration size and method; means over the seeds."""
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
    heading = ["", "blocks", "tokens", "perplexity, fp32", "bf16 compute", "change", "95% interval"]
    heading += ["control", "mask entries", "seeds"]
    return (
        f"{rows(heading, body)}\n\nSmolLM2-135M at {result['records'][0]['pattern']}. Change: mean over the seeds "
        "and range; beside it the 95% confidence interval of the mean. Control: the change when everything is in fp32 "
        "and block outputs are perturbed by half a unit of bf16. Mask entries: the fraction that differs between fp32 "
        "and bf16."
    )


def recovery_table(result: dict[str, Any]) -> str:
    """Perplexity on test documents before and after training, at the learning rate with the best validation."""
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
        f"{first['sequence_length']} tokens of Wikipedia, one seed; {first['eval_windows']} test windows; "
        f"{result['hardware']['cpu']}, threads: {result['hardware']['threads']}."
    )


def distil_table(result: dict[str, Any]) -> str:
    """Perplexity by tokens of distillation, at the learning rate with the best validation at the end."""
    records = result["records"]
    (dense, *_) = (r for r in records if r["method"] == "dense")
    runs: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in records:
        if r["method"] == "distil":
            runs.setdefault((r["model"], r["pruned_by"], r["pattern"], r["seed"], r["total_tokens"]), []).append(r)
    body = []
    for (_, pruned_by, pattern, *_), found in runs.items():
        # those of a run that is not through have no last record yet
        last = [r for r in found if r["tokens"] == r["total_tokens"]] or found
        rate = min(last, key=lambda r: r["perplexity"]["val"])["learning_rate"]
        for r in sorted((r for r in found if r["learning_rate"] == rate), key=lambda r: r["tokens"]):
            figures = [f"{r['perplexity'][split]:.1f}" for split in ("val", "test")]
            tokens = f"{r['tokens']:,}" if r["tokens"] else "none"
            body.append([f"{pattern}, {pruned_by}", tokens, *figures, f"{rate:g}", f"{r['seconds'] / 3600:.1f}"])
    body.append(["dense (teacher)", "", *(f"{dense['perplexity'][split]:.1f}" for split in ("val", "test")), "", ""])
    return (
        f"{rows(['', 'tokens', 'validation', 'test', 'learning rate', 'hours'], body)}\n\nSmolLM2-135M, steps of "
        f"{dense['batch_size']} x {dense['sequence_length']} tokens of {dense['text']}; {dense['eval_windows']} "
        f"windows of Wikipedia each; {result['hardware']['cpu']}, threads: {result['hardware']['threads']}."
    )


def finetune_table(result: dict[str, Any]) -> str:
    """Test accuracy of every method: means over the seeds with the range, one table per model and pattern."""
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


def defaults_table(result: dict[str, Any]) -> str:
    """Test accuracy and time of defaults of `ZerothOrderModule`: means over the seeds with the range."""
    final = [r for r in result["records"] if r["phase"] == "final"]
    body = []
    for method in dict.fromkeys(r["method"] for r in final):
        found = [r for r in final if r["method"] == method]
        accuracy, minutes = [r["accuracy"] for r in found], [r["seconds"] / 60 for r in found]
        forwards, seeds = max(r["forwards"] for r in found), len({r["seed"] for r in found})
        name = method.replace("_", " ")
        rate = f"{found[0]['learning_rate']:g}"
        body.append([name, rate, spread(accuracy, ".3f"), f"{mean(minutes):.1f}", f"{forwards:,}", str(seeds)])
    table = rows(["", "learning rate", "accuracy", "minutes", "forwards", "seeds"], body)
    task, model = final[0]["task"], final[0]["model"]
    return f"{table}\n\n{model}, {task}; minutes with the evaluation, threads: {result['hardware']['threads']}."


def epsilon_table(result: dict[str, Any]) -> str:
    """Correlations by epsilon, one column per precision, start and estimator; recommended values in bold."""
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
        f"{rows(heading, body)}\n\nSmolLM2-135M, default adapters at initialisation, {first['num_batches']} batches of "
        f"{first['batch']} prompts with {first['num_queries']} directions each; recommended values in bold."
    )


def zo_memory_table(result: dict[str, Any]) -> str:
    """Peak memory of training steps beside inference."""
    names = {
        "tensor_train": "tensor trains",
        "lora": "LoRA",
        "mezo": "all weights (MeZO)",
        "tensor_train_backprop": "tensor trains, back-propagation",
        "lora_backprop": "LoRA, back-propagation",
        "full_backprop": "all weights, back-propagation",
    }
    records, first = result["records"], result["records"][0]
    body = [["inference", f"{first['inference_gib']:.3f}", ""]]
    body += [[names[r["method"]], f"{r['peak_gib']:.3f}", f"{r['peak_gib'] / r['inference_gib']:.2f}"] for r in records]
    return (
        f"{rows(['', 'peak, GiB', 'times inference'], body)}\n\n{first['model']} in {first['dtype']}, "
        f"{first['batch']} x "
        f"{first['tokens']} tokens, {result['hardware']['cpu']}."
    )


def revisions_table(result: dict[str, Any]) -> str:
    """Seconds of the workloads of the CPU at two commits that took turns."""
    records = result["records"]
    body = []
    for workload in dict.fromkeys(record["workload"] for record in records):
        found = {
            name: [r for r in records if (r["workload"], r["revision"]) == (workload, name)]
            for name in ("before", "after")
        }
        is_step = "seconds_forwards" in found["after"][0]
        # a step by the clock, beside its own forward passes; a pruning by its processor time
        units = {
            name: [r["seconds"] / r["seconds_forwards"] if is_step else r["cpu_seconds"] for r in runs]
            for name, runs in found.items()
        }
        cells = [f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})" for values in units.values()]
        unit = "per bare forward passes" if is_step else "seconds"
        body.append([f"{workload}, {unit}", *cells, f"{median(units['after']) / median(units['before']):.2f}"])
    first = records[0]
    commits = {record["revision"]: record["revision_commit"] for record in records}
    runs = len({record["repeat"] for record in records})
    return (
        f"{rows(['', *(f'{name}, `{commit}`' for name, commit in commits.items()), 'ratio'], body)}\n\n"
        f"{first['model']} in float32, {first['num_samples']} x {first['sequence_length']} tokens, {first['threads']} "
        f"thread, {result['hardware']['cpu']}; medians of {runs} runs in turn, with the range in brackets."
    )


def zo_step_table(result: dict[str, Any]) -> str:
    """Seconds of a step, relative to its forward passes and to a plain loop."""
    hardware, first = result["hardware"], result["records"][0]
    repeats = len({record["repeat"] for record in result["records"]})
    return (
        f"{rows(STEP_HEADING, step_rows(result['records']))}\n\n{first['model']} in float32, {hardware['cpu']}, "
        f"{first['threads']} threads; medians of {repeats} runs, with the range in brackets."
    )


def step_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """Return one row per setting: ratios of the medians over its runs, with the range over the runs."""
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


def scaling_table(result: dict[str, Any]) -> str:
    """Measured and predicted seconds of one, two and four processes."""
    hardware = result["hardware"]
    repeats = len(result["records"][0]["seconds"])
    return (
        f"{rows(MEASURED_HEADING, measured_rows(result['records']))}\n\nSmolLM2-135M in float32, gloo, one thread per "
        f"process, {hardware['cores']} cores of {hardware['cpu']}; medians of {repeats} runs with the range."
    )


def projection_table(result: dict[str, Any]) -> str:
    """Predictions of the cost model for GPUs, none of them measured."""
    return rows(PROJECTED_HEADING, projected_rows(result["records"]))


def memory_table(result: dict[str, Any]) -> str:
    """Memory of the worked examples by the formulas."""
    return (
        f"{rows(MEMORY_HEADING, memory_rows())}\n\nbfloat16, {PROMPTS} prompts of {TOKENS} tokens, {COPIES} perturbed "
        "copies per forward pass, tensor trains of rank 5 at three sites of every block."
    )


def measured_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """Return one row per job and number of processes: median and range of its runs."""
    return [
        [
            f"{JOBS[r['job']]}{', one block' if r['job'] == 'prune' else ''}",
            str(r["processes"]),
            f"{median(r['seconds']):.2f} ({min(r['seconds']):.2f} to {max(r['seconds']):.2f})",
            f"{r['seconds_predicted']:.2f}",
            f"{r['bytes_exchanged']:,.0f}",
        ]
        for r in records
        if not r["projected"]
    ]


def projected_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """Return one row per job, model and number of GPUs."""
    return [
        [
            f"{JOBS[r['job']]}, {r['model']}{', sharded' if r['job'] == 'zo' and r['sharded'] else ''}",
            str(r["gpus"]),
            f"{r['seconds']:.2g}",
            f"{r['bytes_exchanged']:,.0f}",
        ]
        for r in records
        if r["projected"]
    ]


def memory_rows() -> list[list[str]]:
    """Return one row per example: its memory by the formulas."""
    found = []
    for name, (model, gpus, sharded, offloaded) in EXAMPLES.items():
        shape = SHAPES[model]
        trained = AdapterLayout([shape.hidden, shape.hidden, shape.hidden] * shape.layers, 5, 64, (3, 3))
        parts = [
            0 if offloaded else resident_weights(shape, 2, gpus, sharded),
            gathered_weights(shape, 2) if sharded else 0,
            adapter_bytes(trained.num_parameters, COPIES),
            activation_bytes(shape, COPIES * PROMPTS * TOKENS, 2),
        ]
        found.append([name, *(f"{part / 2**30:.2f}" for part in (*parts, sum(parts)))])
    return found


def replication_table(
    quality: dict[str, Any], recovery: dict[str, Any], finetune: dict[str, Any], zo_memory: dict[str, Any]
) -> str:
    """Claims of both papers' abstracts: published figures, measurements here, and experiments still needed."""
    small = quality_groups(quality)["SmolLM2-135M", quality["calibration"]]
    full_size = "a GPU, LLaMA weights and C4"

    def perplexities(method: str, text: str) -> list[float]:
        return [r["perplexity"] for r in small if (settings_of(r), r["pattern"], r["text"]) == (method, "2:4", text)]

    def ratios(method: str, other: str) -> str:
        pairs = zip(perplexities(method, "wikipedia"), perplexities(other, "wikipedia"), strict=False)
        return spread([a / b for a, b in pairs], ".2f")

    def accuracies(method: str, model: str) -> str:
        final = [r for r in finetune["records"] if (r["phase"], r["model"], r["task"]) == ("final", model, "topics")]
        return spread([r["accuracy"] for r in final if (r["method"], r["pattern"]) == (method, "dense")], ".3f")

    def trained(pruned_by: str) -> str:
        (record,) = (r for r in recovery["records"] if (r["pruned_by"], r["method"]) == (pruned_by, "lora"))
        return f"{record['perplexity_before']['test']:.1f} to {record['perplexity_after']['test']:.1f}"

    memory = {r["method"]: r["peak_gib"] / r["inference_gib"] for r in zo_memory["records"]}
    forwards = {r["model"]: r["forwards"] for r in finetune["records"] if r["method"] == "adazeta"}
    body = [
        [
            "Wanda++: perplexity up to 32% below Wanda's",
            "LLaMA-1 7B at 2:4: 9.43 against 11.53",
            "SmolLM2-135M at 2:4, the paper's settings: "
            f"{ratios('paper', 'wanda')} times Wanda's; `best`: {ratios('best', 'wanda')} times",
            "not with the paper's settings at this width; with settings that are tuned, yes",
            full_size,
        ],
        [
            "Wanda++: orthogonal to sparsity-aware fine-tuning (LoRA)",
            "LLaMA-1 7B at 2:4 with LoRA: 9.43 to 6.88, after Wanda 11.59 to 8.23",
            f"SmolLM2-135M at 2:4, 100 steps of LoRA: Wanda++ {trained('wanda++')}, Wanda {trained('wanda')}",
            "yes: the better pruning stays better",
            "the paper's 30,000 samples",
        ],
        [
            "Wanda++: a 7B in under ten minutes on one H100",
            "290 s",
            "random weights of LLaMA-7B's shape on one H100: see [gpu.md](gpu.md)",
            "yes",
            "trained weights of this size",
        ],
        [
            "AdaZeta: more accurate than MeZO-LoRA",
            "Llama-2-7B and RoBERTa-large, ten tasks",
            f"MiniLM-L6, topics, {forwards['minilm-l6']:,} forward passes: AdaZeta "
            f"{accuracies('adazeta', 'minilm-l6')}, MeZO-LoRA {accuracies('mezo_lora', 'minilm-l6')}; SmolLM2-135M, "
            f"{forwards['smollm2-135m']:,}: {accuracies('adazeta', 'smollm2-135m')} and "
            f"{accuracies('mezo_lora', 'smollm2-135m')}",
            "no, at these budgets",
            "the paper's budget, about 220,000 forward passes",
        ],
        [
            "AdaZeta: memory far below back-propagation, about that of inference",
            "8 times less than full fine-tuning",
            f"SmolLM2-135M, batches of 4 x 64 tokens: tensor trains {memory['tensor_train']:.2f} times inference, "
            f"back-propagation of all weights {memory['full_backprop']:.2f} times",
            "yes",
            "larger batches, where the difference grows",
        ],
        [
            "AdaZeta: converges faster, and where MeZO-LoRA diverges",
            "Llama-2-7B, SST-2: MeZO-LoRA diverges after 6,000 steps with batches of 16",
            "nothing of that length; curves in [finetune_results.md](finetune_results.md)",
            "not seen at these budgets",
            "runs of 10,000 steps and more",
        ],
    ]
    return rows(["claim", "published", "measured here", "confirmed", "experiment still needed"], body)


def gpu_table(on_gpu: dict[str, Any], at_home: dict[str, Any], kernels: dict[str, Any]) -> str:
    """Seconds per block and peak memory of pruning a 7B shape on one GPU, for README."""
    totals = {r["method"]: r for r in on_gpu["records"] if r["phase"] == "total"}
    (home,) = (r for r in at_home["records"] if r["phase"] == "total")
    names = {"wanda": "Wanda", "wanda++": "Wanda++"}
    body = [[name, _per_block(on_gpu, totals[method]), _gib(totals[method])] for method, name in names.items()]
    body += [["Wanda++, other blocks in CPU memory", _per_block(at_home, home), _gib(home)]]
    speed = kernel_speeds(kernels).values()
    return (
        f"{rows([on_gpu['hardware']['gpu'] + ', 7B', 'seconds a block', 'peak GiB'], body)}\n\nThere, torch's 2:4 "
        f"kernels ran at {min(speed):.2f} to {max(speed):.2f} times the speed of dense ones."
    )


def gpu_phases_table(on_gpu: dict[str, Any], at_home: dict[str, Any]) -> str:
    """Seconds and utilisation of the phases of pruning a 7B shape on one GPU."""
    heading, columns = [""], []
    for result, place in ((on_gpu, ""), (at_home, ", blocks in CPU memory")):
        for method in dict.fromkeys(r["method"] for r in result["records"]):
            heading.append(f"{method}, {result['blocks']} blocks{place}")
            columns.append({r["phase"]: r for r in result["records"] if r["method"] == method})
    found = {phase: title for phase, title in PHASES.items() if any(phase in column for column in columns)}
    body = [[title, *(_phase(column.get(phase)) for column in columns)] for phase, title in found.items()]
    body += [["peak GiB", *(_gib(column["total"]) for column in columns)]]
    first, hardware = on_gpu["records"][0], on_gpu["hardware"]
    return (
        f"{rows(heading, body)}\n\nSeconds, in brackets the share of the card's {on_gpu['peak_tflops']:.0f} TFLOP/s in "
        f"bfloat16. LLaMA-7B's shape with random weights, {first['num_samples']} x {first['sequence_length']} tokens, "
        f"2:4, the paper's settings; {hardware['gpu']}, {hardware['cores']} CPU cores, torch "
        f"{on_gpu['versions']['torch']}; commit {on_gpu['commit']}."
    )


def gpu_peer_table(result: dict[str, Any]) -> str:
    """Seconds per block and peak memory beside llm-compressor on one GPU."""
    tools = {"wandazeta": "wandazeta", "llmcompressor": "llm-compressor"}
    places = {None: "", "cpu": ", model and activations on the CPU (its default)", "cuda": ", all on the GPU"}
    body = [
        [f"{r['method']}, {tools[r['tool']]}{places[r['offload']]}", f"{r['seconds_per_block']:.2f}", _gib(r)]
        for r in result["records"]
    ]
    first = result["records"][0]
    return (
        f"{rows(['', 'seconds a block', 'peak GiB'], body)}\n\n{first['blocks']} blocks of LLaMA-7B's shape, 2:4, "
        f"{first['samples']} x {first['tokens']} tokens; {result['hardware']['gpu']}, llm-compressor "
        f"{result['versions']['llmcompressor']}; commit {result['commit']}."
    )


def gpu_zo_table(result: dict[str, Any]) -> str:
    """Seconds of zeroth-order steps of a 7B shape on one GPU, on dense and on sparse kernels."""
    # records of earlier versions have no bare forward passes
    has_ratio = all("step_over_forwards_range" in r for r in result["records"])
    body = [
        [
            "2:4 kernels" if r["sparse"] else "dense kernels",
            str(r["num_queries"]),
            f"{median(r['seconds']):.3f}",
            *([step_ratio(r)] if has_ratio else []),
            f"{r['tokens_per_second']:,.0f}",
            f"{r['peak_share']:.0%}",
            _gib(r),
        ]
        for r in result["records"]
    ]
    ratio = ["step / forwards"] if has_ratio else []
    heading = ["", "queries", "seconds a step", *ratio, "tokens a second", "of the peak", "peak GiB"]
    first, hardware = result["records"][0], result["hardware"]
    return (
        f"{rows(heading, body)}\n\nLLaMA-7B's shape, tensor trains in every block, {first['batch']} prompts of "
        f"{first['prompt_tokens']} tokens, {first['query_chunk_size']} copies per forward pass; {hardware['gpu']}, "
        f"torch {result['versions']['torch']}; commit {result['commit']}."
    )


def step_ratio(record: dict[str, Any]) -> str:
    """Return the ratio of a zeroth-order step to its bare forward passes, with the range over the pairs of both."""
    least, most = record["step_over_forwards_range"]
    return f"{record['step_over_forwards']:.2f} ({least:.2f} to {most:.2f})"


def gpu_kernels_table(result: dict[str, Any]) -> str:
    """Speed of torch's 2:4 kernels relative to dense ones, by layer and batch."""
    names = {"cusparselt": "cuSPARSELt", "cutlass": "CUTLASS"}
    speed = kernel_speeds(result)
    batches = sorted({key[2] for key in speed})
    body = [
        [
            f"{out} x {width}, {names[kernel]}, {'in a CUDA graph' if graph else 'eager'}",
            *(f"{speed[out, width, batch, kernel, graph]:.2f}" for batch in batches),
        ]
        for out, width, kernel, graph in dict.fromkeys((*key[:2], *key[3:]) for key in speed)
    ]
    return (
        f"{rows(['weight', *(f'{batch} rows' for batch in batches)], body)}\n\n{result['hardware']['gpu']}, torch "
        f"{result['versions']['torch']}; commit {result['commit']}."
    )


def kernel_speeds(result: dict[str, Any]) -> dict[tuple[Any, ...], float]:
    """Return the dense time over that of each sparse kernel, 0 where it failed."""
    names = ("out_features", "in_features", "rows", "kernel", "cuda_graph")
    seconds = {tuple(r[name] for name in names): r["seconds"] for r in result["records"]}
    return {
        (*size, kernel, graph): seconds[*size, "dense", graph] / value if value else 0.0
        for (*size, kernel, graph), value in seconds.items()
        if kernel != "dense"
    }


def _per_block(result: dict[str, Any], record: dict[str, Any]) -> str:
    return f"{record['seconds'] / result['blocks']:.2f}"


def _phase(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    share = "" if record["mfu"] is None else f" ({record['mfu']:.0%})"
    return f"{record['seconds']:.1f}{share}"


def _gib(record: dict[str, Any]) -> str:
    return f"{record['peak_gib']:.1f}"
