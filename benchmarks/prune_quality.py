"""Perplexity after pruning: by model, method, pattern and seed; and with products in bfloat16.

    python -m wandazeta.data.samples wikipedia brown smollm2-135m qwen2.5-coder-0.5b
    python benchmarks/prune_quality.py methods
    python benchmarks/prune_quality.py methods --model Qwen2.5-Coder-0.5B --num-samples 32 --sequence-length 256
    python benchmarks/prune_quality.py bf16
    python benchmarks/prune_quality.py bf16 --num-blocks 4 --num-samples 16 --sequence-length 64 --eval-windows 4

A setting whose record is in the result file is not measured again.

`methods`: every record is a `wandazeta prune` of its own, calibrated on windows of Wikipedia's training documents (64
of 512 tokens by default) and evaluated on test documents of two genres. `paper` and `best` have the settings of the
presets of these names; the other methods have no settings. The settings of `best` have changed: those of a record are
in its `options`. Records of `best_12_rounds`, `best_3_copies` and `best_6_rounds` have the settings of `best` at the
commits that they name. A pruning that was stopped resumes at its next block. The seconds are those of the pruning
without loading and evaluation. `OMP_NUM_THREADS` sets the number of threads; two processes with one thread each use two
cores best.

`bf16`: prunes with products in float32 and in bfloat16 and compares masks and perplexities. The settings are those of
the preset `best` except for the method and the size of the calibration. Blocks after the first `--num-blocks`
stay dense. The weights, and the model whose perplexity is measured, are float32 in both cases. Expect `wanda` and `rgs`
to change fewer than 1% of the mask entries and the perplexity to move by some percent, as it does after any change of
that size. A control run shows this: everything in float32, with the output of every block multiplied by 1 + u, where u
is drawn uniformly from half a unit of bfloat16 to either side. `sparsegpt` decides column by column with an inverse
Gram matrix and changes more entries.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from records import (
    MODELS,
    RESULTS,
    ROOT,
    SMOLLM2,
    callback_arguments,
    commit,
    describe,
    finished,
    is_finished,
    prune_settings,
    quiet_trainer,
    run_wandazeta,
    used_options,
    write,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from wandazeta.datamodules import TextDataModule
from wandazeta.models.blocks import find_blocks
from wandazeta.modules import LanguageModel
from wandazeta.pruning import METHODS as PRUNING_METHODS
from wandazeta.pruning import BlockResult, PruneOptions, PruningInterrupted, prune_model

RESULT = RESULTS / "prune_quality.json"
FOLDER = ROOT / "runs" / "prune_quality"
SOURCE = "sample:wikipedia"
TEXTS = ("wikipedia", "brown")
WINDOW = 512
NUM_SAMPLES = 64
METHODS = ("dense", "magnitude", "wanda", "sparsegpt", "paper", "best")
# `best` sets it for unstructured patterns only, as its file says
SPARSITY_SLOPE = 0.2
PRESETS = ("paper", "best")

BF16_RESULT = RESULTS / "prune_bf16.json"
BF16_METHODS = tuple(PRUNING_METHODS)
# name in the records -> value of `compute_dtype`
DTYPES = {"fp32": "model", "bf16": "bfloat16", "jittered": "model"}
# largest relative error of rounding to bfloat16, which keeps eight bits
HALF_UNIT = 2.0**-9

console = Console()


def pattern_options(pattern: str) -> dict[str, Any]:
    """Translate a pattern such as "2:4" or "50%" to arguments of the callback."""
    if pattern.endswith("%"):
        return {"sparsity_pattern": "unstructured", "sparsity": float(pattern[:-1]) / 100}
    return {"sparsity_pattern": pattern}


def options_of(method: str, pattern: str, seed: int) -> dict[str, Any]:
    """Return the settings that decide the result of a pruning, in the flat spelling of reports."""
    options: dict[str, Any] = {"method": method}
    if method in PRESETS:
        options = prune_settings(method)
    options |= pattern_options(pattern) | {"seed": seed}
    if method == "best" and options["sparsity_pattern"] == "unstructured":
        options["sparsity_slope"] = SPARSITY_SLOPE
    return options


def config_of(
    method: str,
    pattern: str,
    seed: int,
    folder: Path,
    model: str = SMOLLM2,
    num_samples: int = NUM_SAMPLES,
    sequence_length: int = WINDOW,
) -> dict[str, Any]:
    """Return the config of one pruning."""
    options = callback_arguments(options_of(method, pattern, seed))
    options |= {"num_calibration_samples": num_samples, "output_dir": str(folder / "progress")}
    callback = {"class_path": "wandazeta.callbacks.WandaPPPruneCallback", "init_args": options}
    text = {"source": SOURCE, "sequence_length": sequence_length, "num_calibration_samples": num_samples}
    return {
        "seed_everything": seed,
        "model": {"class_path": "wandazeta.modules.LanguageModel", "init_args": {"model_name_or_path": model}},
        "data": {"class_path": "wandazeta.datamodules.TextDataModule", "init_args": text | {"seed": seed}},
        "trainer": {"accelerator": "auto", "devices": 1, "logger": False, "callbacks": [callback]},
    }


def pruned(method: str, pattern: str, seed: int, arguments: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Prune, or resume a pruning that was stopped; returns the directory of the model and its report."""
    size = (arguments.num_samples, arguments.sequence_length)
    name = f"{method}-{pattern.replace(':', 'of').replace('%', 'pc')}-{size[0]}x{size[1]}-{seed}"
    folder = FOLDER / arguments.model / name
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    values = config_of(method, pattern, seed, folder.relative_to(ROOT), MODELS[arguments.model], *size)
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    model = folder / "model"
    if not (model / "prune_report.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        run_wandazeta("prune", "-c", config, "--output_dir", model)
    return model, json.loads((model / "prune_report.json").read_text())


def tuning_fields(report: dict[str, Any]) -> dict[str, Any]:
    """Return the rounds that were kept, in the mean over the blocks, and the number of held-out windows."""
    found = [block["tuning"] for block in report.get("blocks", []) if block.get("tuning")]
    if not found:
        return {}
    rounds = sum(tuning["rounds"] for tuning in found) / len(found)
    return {"rounds": rounds, "windows_held_out": found[0]["num_held_out"]}


def perplexities(model: Path, eval_windows: int) -> dict[str, dict[str, float | bool]]:
    """Measure the perplexity on test documents of every text, and on the validation documents that choose settings."""
    module, trainer = LanguageModel(str(model)), quiet_trainer()
    result = {}
    for text in TEXTS:
        data = TextDataModule(f"sample:{text}", sequence_length=WINDOW, eval_windows=eval_windows, batch_size=4)
        found = trainer.test(module, data, verbose=False)[0]["test/perplexity"]
        validated = trainer.validate(module, data, verbose=False)[0]["val/perplexity"]
        result[text] = {"perplexity": found, "perplexity_val": validated, "perplexity_bos": data.starts_with_bos}
    return result


def wanted(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield the settings to measure, seed by seed, so that a run that is stopped has complete seeds."""
    if "dense" in arguments.methods:
        yield "dense", "dense", 0
    for seed in arguments.seeds:
        for pattern in arguments.patterns:
            for method in arguments.methods:
                if method != "dense" and (method != "magnitude" or seed == arguments.seeds[0]):
                    yield method, pattern, seed


def run_methods(arguments: argparse.Namespace) -> None:
    """Measure what is missing; the result file is written after each pruning."""
    size = (arguments.num_samples, arguments.sequence_length)
    for method, pattern, seed in wanted(arguments):
        key = {"model": arguments.model, "method": method, "pattern": pattern, "window": WINDOW, "seed": seed}
        key |= {"eval_windows": arguments.eval_windows}
        if method != "dense" and size != (NUM_SAMPLES, WINDOW):
            # records without it have the calibration of the file
            key["calibration"] = f"{size[0]} x {size[1]} tokens"
        # `best` changes over time: records with other settings do not count
        chosen = {} if method == "dense" else options_of(method, pattern, seed)
        same = [r for r in finished(RESULT) if is_finished(key, [r]) and r.get("calibration") == key.get("calibration")]
        if any(is_finished(chosen, [r["options"]]) for r in same):
            continue
        dense = ROOT / MODELS[arguments.model]
        directory, report = (dense, {}) if method == "dense" else pruned(method, pattern, seed, arguments)
        extra = {"seconds": report.get("seconds", 0.0), "threads": torch.get_num_threads()}
        extra |= {"tokens": report.get("num_tokens", 0)} | tuning_fields(report)
        extra |= {"options": report.get("options", {}), "commit": commit()}
        found = perplexities(directory, arguments.eval_windows)
        # read the file again: other seeds may be running beside this one
        records = finished(RESULT) + [key | {"text": text} | values | extra for text, values in found.items()]
        calibration = f"{NUM_SAMPLES} x {WINDOW} tokens"
        write(RESULT, describe("prune_quality", records, split="test", calibration=calibration))
        print(f"{arguments.model} {method} {pattern} seed {seed}: {found}", flush=True)
        if method != "dense" and not arguments.keep:
            shutil.rmtree(directory.parent)


class Masks:
    """Keep the masks of finished blocks in memory: the `Progress` that `prune_model` takes."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def num_saved(self) -> int:
        """Return 0: no block is finished at the start."""
        return 0

    def load(self, block_index: int) -> BlockResult | None:
        """Return None: no block is finished at the start."""

    def save(self, block_index: int, result: BlockResult) -> None:
        """Keep the masks of a block."""
        self.kept.append(torch.cat([mask.flatten() for mask in result.masks.values()]))


def bf16_options(method: str, seed: int, arguments: argparse.Namespace) -> PruneOptions:
    """Return the settings of `best.yaml` with another method."""
    return used_options(prune_settings("best") | {"method": method, "seed": seed})


def bf16_settings(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return everything that decides a record: records with equal settings are the same."""
    options = bf16_options(method, seed, arguments)
    settings = options.to_dict()
    del settings["compute_dtype"]
    return {
        # relative to the checkout, or the name alone: no absolute paths in records
        "model": arguments.model.name if arguments.model.is_absolute() else str(arguments.model),
        "method": method,
        "pattern": options.pattern.label,
        "seed": seed,
        "options": settings,
        "num_blocks": arguments.num_blocks,
        "num_samples": arguments.num_samples,
        "sequence_length": arguments.sequence_length,
        "eval_windows": arguments.eval_windows,
        "eval_sequence_length": arguments.eval_sequence_length,
    }


def jitter(generator: torch.Generator, block: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Perturb hidden states of any shape by as much as rounding to bfloat16 may; a forward hook."""
    return output * (1 + HALF_UNIT * (2 * torch.rand(output.shape, generator=generator) - 1))


def prune_blocks(
    model: LanguageModel, method: str, compute_dtype: str, seed: int, arguments: argparse.Namespace
) -> list[Tensor]:
    """Prune the first blocks and return the mask of each."""
    text = TextDataModule(
        SOURCE,
        tokenizer=str(arguments.model),
        sequence_length=arguments.sequence_length,
        num_calibration_samples=arguments.num_samples,
        seed=seed,
    )
    batches = list(text.calibration_dataloader())
    options = replace(bf16_options(method, seed, arguments), compute_dtype=compute_dtype)
    masks = Masks()

    def is_enough() -> bool:
        return len(masks.kept) >= arguments.num_blocks

    with suppress(PruningInterrupted):  # the other blocks stay dense
        prune_model(model, model.calibration_forward, batches, options, progress=masks, should_stop=is_enough)
    return masks.kept


def bf16_perplexity(model: LanguageModel, arguments: argparse.Namespace) -> float:
    """Measure the perplexity on the test documents."""
    text = TextDataModule(
        SOURCE, sequence_length=arguments.eval_sequence_length, eval_windows=arguments.eval_windows, batch_size=1
    )
    return quiet_trainer().test(model, text, verbose=False)[0]["test/perplexity"]


def measure_bf16(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune and evaluate in both precisions, and with the control."""
    masks: dict[str, list[Tensor]] = {}
    perplexities: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for name, compute_dtype in DTYPES.items():
        model = LanguageModel(str(arguments.model))
        hooks = []
        if name == "jittered":
            hook = partial(jitter, torch.Generator().manual_seed(seed))
            hooks = [block.register_forward_hook(hook) for block in find_blocks(model)[1]]
        start = time.perf_counter()
        masks[name] = prune_blocks(model, method, compute_dtype, seed, arguments)
        seconds[name] = time.perf_counter() - start
        for handle in hooks:
            handle.remove()
        perplexities[name] = bf16_perplexity(model, arguments)
    differing = [(a != b).double().mean().item() for a, b in zip(masks["fp32"], masks["bf16"], strict=True)]
    return bf16_settings(method, seed, arguments) | {
        "num_blocks_pruned": len(differing),
        "perplexity": perplexities,
        "perplexity_change": perplexities["bf16"] / perplexities["fp32"] - 1,
        "differing_mask_share": sum(differing) / len(differing),
        "differing_mask_share_by_block": differing,
        "seconds": seconds,
    }


def bf16_rows(records: list[dict[str, Any]]) -> Table:
    """Return the records as a table for the terminal."""
    result = Table(title="bfloat16 compute against float32")
    for name in ("method", "pattern", "seed", "blocks", "samples", "fp32", "bf16", "change", "masks that differ"):
        result.add_column(name, justify="left" if name in ("method", "pattern") else "right")
    for r in records:
        size = (str(r["num_blocks_pruned"]), f"{r['num_samples']} of {r['sequence_length']}")
        figures = (f"{r['perplexity']['fp32']:,.3f}", f"{r['perplexity']['bf16']:,.3f}")
        changes = (f"{r['perplexity_change']:+.2%}", f"{r['differing_mask_share']:.3%}")
        result.add_row(r["method"], r["pattern"], str(r["seed"]), *size, *figures, *changes)
    return result


def run_bf16(arguments: argparse.Namespace) -> None:
    """Measure what is missing; the result file is written after each record."""
    records = finished(BF16_RESULT)
    for seed, method in product(arguments.seeds, arguments.methods):
        settings = bf16_settings(method, seed, arguments)
        options = settings.pop("options")
        # records from before the restructuring also name options that the method does not use
        if not any(is_finished(options, [r["options"]]) for r in records if is_finished(settings, [r])):
            records.append(measure_bf16(method, seed, arguments))
            write(BF16_RESULT, describe("prune_bf16", records, source=SOURCE, split="test"))
    console.print(bf16_rows(records))


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    methods = commands.add_parser("methods", help="perplexity by method, pattern and seed")
    methods.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    methods.add_argument("--patterns", nargs="+", default=["2:4", "4:8", "50%", "60%", "70%"])
    methods.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibration windows and draws")
    methods.add_argument("--model", choices=MODELS, default="SmolLM2-135M")
    methods.add_argument("--num-samples", type=int, default=NUM_SAMPLES, help="calibration windows")
    methods.add_argument("--sequence-length", type=int, default=WINDOW, help="tokens of a calibration window")
    methods.add_argument("--eval-windows", type=int, default=32, help="test windows of each text")
    methods.add_argument("--keep", action="store_true", help="keep the pruned models under runs/prune_quality")
    bf16 = commands.add_parser("bf16", help="products in bfloat16 against float32")
    bf16.add_argument("--model", type=Path, default=Path(SMOLLM2), help="model directory")
    bf16.add_argument("--methods", nargs="+", choices=BF16_METHODS, default=list(BF16_METHODS))
    bf16.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration windows")
    bf16.add_argument("--num-blocks", type=int, default=30, help="blocks to prune, from the first")
    bf16.add_argument("--num-samples", type=int, default=32, help="calibration windows")
    bf16.add_argument("--sequence-length", type=int, default=128, help="tokens of a calibration window")
    bf16.add_argument("--eval-windows", type=int, default=16, help="test windows")
    bf16.add_argument("--eval-sequence-length", type=int, default=512, help="tokens of a test window")
    arguments = parser.parse_args()
    {"methods": run_methods, "bf16": run_bf16}[arguments.command](arguments)


if __name__ == "__main__":
    main()
