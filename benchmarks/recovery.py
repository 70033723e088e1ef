"""Perplexity regained by training after pruning: LoRA against masked full fine-tuning, at equal steps and batches.

    wandazeta prune -c preset:best -c configs/prune/smollm2.yaml --output_dir runs/best
    python benchmarks/recovery.py --models runs/best

Both train on Wikipedia text, and neither on the documents whose perplexity is measured. LoRA's adapters stay beside the
sparse weights, which costs time at every use; `perplexity_merged` is the perplexity after they are merged and the masks
applied again. Every rate of `--learning-rates` is run, and the table shows the rate with the lowest perplexity on the
validation documents. A setting whose record is in the result file is not run again.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from records import RESULTS, ROOT, describe, finished, is_finished, quiet_trainer, write
from rich.console import Console
from rich.table import Table
from torch.optim.lr_scheduler import PolynomialLR

from wandazeta.adapters import PeftLoRA, Weights
from wandazeta.callbacks import KeepSparsity
from wandazeta.datamodules import TextDataModule
from wandazeta.modules import FirstOrderModule

RESULT = RESULTS / "recovery.json"
SOURCE = "sample:wikipedia"
PERPLEXITY_WINDOW = 512
# what each trains, and its default learning rate: adapters start at zero and need larger steps
METHODS: dict[str, tuple[PeftLoRA | Weights, float]] = {"lora": (PeftLoRA(), 5e-4), "masked_full": (Weights(), 5e-5)}

console = Console()


def settings_of(model: Path, method: str, learning_rate: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return everything that decides a record: records with equal settings are the same."""
    report = json.loads((model / "prune_report.json").read_text())
    options = report["options"]
    pattern = options["sparsity_pattern"]
    model = model.absolute()
    return {
        # relative to the checkout, or the name alone: no absolute paths in records
        "model": str(model.relative_to(ROOT) if model.is_relative_to(ROOT) else model.name),
        "pruned_by": options["method"],
        "pruning_key": report["key"],
        "pattern": pattern if pattern != "unstructured" else f"{100 * options['sparsity']:g}%",
        "method": method,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "learning_rate": learning_rate,
        "batch_size": arguments.batch_size,
        "sequence_length": arguments.sequence_length,
        "eval_windows": arguments.eval_windows,
    }


def perplexities(module: FirstOrderModule, windows: int) -> dict[str, float]:
    """Measure the perplexity on the validation and on the test documents."""
    text = TextDataModule(SOURCE, sequence_length=PERPLEXITY_WINDOW, eval_windows=windows, batch_size=1)
    trainer = quiet_trainer()
    return {
        "val": trainer.validate(module, text, verbose=False)[0]["val/perplexity"],
        "test": trainer.test(module, text, verbose=False)[0]["test/perplexity"],
    }


def recover(model: Path, method: str, learning_rate: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one method."""
    seed_everything(arguments.seed, verbose=False)
    trainable, _ = METHODS[method]
    module = FirstOrderModule(
        str(model),
        trainable=trainable,
        learning_rate=learning_rate,
        seed=arguments.seed,
        lr_scheduler=lambda optimizer: PolynomialLR(optimizer, total_iters=arguments.steps),
    )
    before = perplexities(module, arguments.eval_windows)
    text = TextDataModule(
        SOURCE, sequence_length=arguments.sequence_length, batch_size=arguments.batch_size, seed=arguments.seed
    )
    # the masks of the pruning: weights that are zero in the dense model, too, may move
    callbacks: list[Callback] = [KeepSparsity(str(model))] if isinstance(trainable, Weights) else []
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        max_steps=arguments.steps,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        callbacks=callbacks,
    )
    start = time.perf_counter()
    trainer.fit(module, text)
    seconds = time.perf_counter() - start
    record = settings_of(model, method, learning_rate, arguments) | {
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "perplexity_window": PERPLEXITY_WINDOW,
        "perplexity_bos": text.starts_with_bos,
        "perplexity_before": before,
        "perplexity_after": perplexities(module, arguments.eval_windows),
        "seconds": seconds,
    }
    if method == "lora":
        module.merge(keep_mask=True)
        record["perplexity_merged"] = perplexities(module, arguments.eval_windows)
    return record


def table(records: list[dict[str, Any]]) -> Table:
    """Return the records as a table for the terminal."""
    result = Table(title=f"perplexity on test documents, windows of {PERPLEXITY_WINDOW} tokens")
    names = ("model", "pattern", "method", "rate", "steps", "seed", "before", "after", "merged", "minutes")
    for name in names:
        result.add_column(name, justify="left" if name in ("model", "pattern", "method") else "right", overflow="fold")
    for r in records:
        merged = f"{r['perplexity_merged']['test']:,.1f}" if "perplexity_merged" in r else ""
        figures = (f"{r['perplexity_before']['test']:,.1f}", f"{r['perplexity_after']['test']:,.1f}", merged)
        row = (r["model"], r["pattern"], r["method"], f"{r['learning_rate']:g}", str(r["steps"]), str(r["seed"]))
        result.add_row(*row, *figures, f"{r['seconds'] / 60:.1f}")
    return result


def main() -> None:
    """Run what is missing; the result file is written after each record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [Path("runs/demo/pruned_model")]
    parser.add_argument("--models", type=Path, nargs="+", default=default, help="directories of pruned models")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--learning-rates", type=float, nargs="+", help="by default one per method")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps per method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=4, help="windows per step")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a training window")
    parser.add_argument("--eval-windows", type=int, default=16, help="test windows of 512 tokens")
    arguments = parser.parse_args()
    for model in arguments.models:
        if not (model / "prune_report.json").exists():
            raise SystemExit(
                "error: Expected argument `models` to be directories that `wandazeta prune` wrote, but got "
                f"'{model}'; `make demo` writes one"
            )
    records = finished(RESULT)
    for model, method in product(arguments.models, arguments.methods):
        for learning_rate in arguments.learning_rates or [METHODS[method][1]]:
            if not is_finished(settings_of(model, method, learning_rate, arguments), records):
                records.append(recover(model, method, learning_rate, arguments))
                write(RESULT, describe("recovery", records, source=SOURCE))
    console.print(table(records))


if __name__ == "__main__":
    main()
