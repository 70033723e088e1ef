"""Ablation of pruning options, on the first blocks of a model only.

    python benchmarks/ablation.py --workers 2
    python benchmarks/ablation.py --model Qwen2.5-Coder-0.5B "tuned-ro"

The variants are in `benchmarks/ablation.yaml`. The measure is the perplexity of the whole model on validation text with
the other blocks dense. Each variant runs in a process of its own with one thread and takes minutes; a finished variant
is not run again. A record names the commit that it was made at. Options that did not pay are no longer in the code:
their records stay, and that commit reproduces them. Records up to `7d8de30` are of changes to a base; they name all its
options, those that the method lacks, too.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import yaml
from records import (
    MODELS,
    RESULTS,
    ROOT,
    commit,
    describe,
    finished,
    is_finished,
    measure_in_process,
    used_options,
    write,
)

RESULT = RESULTS / "ablation.json"
VARIANTS = ROOT / "benchmarks" / "ablation.yaml"
SOURCE = "sample:wikipedia"
EVAL_WINDOW = 512
# model of records that name none
OLDEST = {"model": "SmolLM2-135M"}
# settings that decide a record, beside the options
SETTINGS = ("model", "pattern", "blocks", "samples", "tokens", "eval_windows", "seed")


def measure(options: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune the first blocks and measure the perplexity of the whole model, with the other blocks dense."""
    import torch

    from wandazeta.datamodules import TextDataModule
    from wandazeta.modules import LanguageModel
    from wandazeta.pruning import BlockRecord, PruningInterrupted, prune_model

    module = LanguageModel(str(ROOT / MODELS[arguments.model])).eval()
    calibration = TextDataModule(
        SOURCE,
        tokenizer=module.tokenizer,
        sequence_length=arguments.tokens,
        num_calibration_samples=arguments.samples,
        seed=arguments.seed,
    )
    text = TextDataModule(SOURCE, tokenizer=module.tokenizer, sequence_length=EVAL_WINDOW)
    records: list[BlockRecord] = []
    seconds = 0.0
    if arguments.blocks:
        start = time.perf_counter()
        with suppress(PruningInterrupted):
            prune_model(
                module.backbone,
                module.calibration_forward,
                list(calibration.calibration_dataloader()),
                used_options(options),
                on_block=lambda record, num_blocks: records.append(record),
                should_stop=lambda: len(records) >= arguments.blocks,
            )
        seconds = time.perf_counter() - start
    loss, count = 0.0, 0
    with torch.inference_mode():
        for window in text.windows("val")[: arguments.eval_windows]:
            logits = module.backbone(input_ids=window[None], use_cache=False).logits[0, :-1]
            loss += torch.nn.functional.cross_entropy(logits.double(), window[1:], reduction="sum").item()
            count += len(window) - 1
    return {
        "perplexity": float(torch.tensor(loss / count, dtype=torch.float64).exp()),
        "perplexity_window": EVAL_WINDOW,
        "perplexity_bos": text.starts_with_bos,
        "seconds": seconds,
        "block_losses": [record.loss_after for record in records],
        "tuning": [asdict(record.tuning) for record in records if record.tuning is not None],
    }


def measure_variant(options: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one variant in a process of its own; a failure is a result, too."""
    flags = [item for key in SETTINGS for item in (f"--{key.replace('_', '-')}", str(getattr(arguments, key)))]
    try:
        return measure_in_process(__file__, *flags, "--measure", json.dumps(options))
    except RuntimeError as error:
        return {"failure": str(error)}


def main() -> None:
    """Run what is missing; the result file is written after each record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of variants; by default all")
    parser.add_argument("--workers", type=int, default=1, help="number of processes, each with one thread")
    parser.add_argument("--model", choices=MODELS, default="SmolLM2-135M")
    parser.add_argument("--pattern", default="2:4", help='"N:M", or a sparsity such as "0.6"')
    parser.add_argument("--blocks", type=int, default=6, help="number of blocks to prune, from the first")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a calibration window")
    parser.add_argument("--eval-windows", type=int, default=8, help="validation windows of 512 tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of calibration windows and draws")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure, arguments)))
        return
    variants: dict[str, dict[str, Any]] = yaml.safe_load(VARIANTS.read_text())
    unknown = set(arguments.names) - set(variants)
    if unknown:
        raise SystemExit(f"error: Expected names out of {', '.join(variants)}, but got {', '.join(sorted(unknown))}")
    pattern = (
        {"sparsity_pattern": arguments.pattern}
        if ":" in arguments.pattern
        else {"sparsity_pattern": "unstructured", "sparsity": float(arguments.pattern)}
    )
    records = finished(RESULT)
    settings = {key: getattr(arguments, key) for key in SETTINGS}

    def make(name: str) -> None:
        key = settings | {"name": name}
        options = {} if arguments.blocks == 0 else variants[name]
        same = [record for record in records if is_finished(key, [OLDEST | record])]
        if any(is_finished(options, [record["options"]]) for record in same):
            return
        made_at = commit()
        record = key | {"options": options, "commit": made_at}
        record |= measure_variant(variants[name] | pattern | {"seed": arguments.seed}, arguments)
        records.append(record)
        write(RESULT, describe("ablation", records, source=SOURCE, split="val"))
        outcome = f"{record['perplexity']:.2f}" if "perplexity" in record else record["failure"]
        print(f"{name}: {outcome}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(make, arguments.names or variants))


if __name__ == "__main__":
    main()
