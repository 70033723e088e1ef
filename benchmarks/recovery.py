"""What training brings back after pruning: LoRA against masked full fine-tuning, at equal steps on the same batches.

    wandazeta fit -c configs/demo.yaml && python benchmarks/demo.py
    python benchmarks/recovery.py

Both train on Wikipedia text, neither on the documents that perplexity is measured on. LoRA's adapters stay beside the
sparse weights, which costs a little at every use; `perplexity_merged` is what is left of it when they are merged and
the masks applied again. A record that is finished is not made again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from demo import quiet_trainer
from lightning.pytorch import Callback, Trainer, seed_everything
from records import ROOT, describe, finished, is_finished, write
from rich.console import Console
from rich.table import Table
from torch.optim.lr_scheduler import PolynomialLR

from wandazeta.callbacks import KeepSparsity
from wandazeta.datamodules import TextDataModule
from wandazeta.modules import FirstOrderModule

RESULT = ROOT / "benchmarks" / "results" / "recovery.json"
SOURCE = "sample:wikipedia"
PERPLEXITY_WINDOW = 512
# what each trains, and at which rate: adapters start at zero and want larger steps
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"train": "lora", "learning_rate": 5e-4},
    "masked_full": {"train": "full", "learning_rate": 5e-5},
}

console = Console()


def settings_of(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides a record: two with equal settings are the same."""
    report = json.loads((arguments.model / "prune_report.json").read_text())
    options = report["options"]
    pattern = options["sparsity_pattern"]
    model = arguments.model.absolute()
    return {
        # from the checkout, or the bare name: no path of one machine
        "model": str(model.relative_to(ROOT) if model.is_relative_to(ROOT) else model.name),
        "pruning_key": report["key"],
        "pattern": pattern if pattern != "unstructured" else f"{100 * options['sparsity']:g}%",
        "method": method,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "learning_rate": METHODS[method]["learning_rate"],
        "batch_size": arguments.batch_size,
        "sequence_length": arguments.sequence_length,
        "eval_windows": arguments.eval_windows,
    }


def perplexity(module: FirstOrderModule, arguments: argparse.Namespace) -> float:
    """Perplexity on the test documents."""
    text = TextDataModule(SOURCE, sequence_length=PERPLEXITY_WINDOW, eval_windows=arguments.eval_windows, batch_size=1)
    return quiet_trainer().test(module, text, verbose=False)[0]["test/perplexity"]


def recover(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one method."""
    settings = settings_of(method, arguments)
    seed_everything(arguments.seed, verbose=False)
    module = FirstOrderModule(
        str(arguments.model),
        seed=arguments.seed,
        lr_scheduler=lambda optimizer: PolynomialLR(optimizer, total_iters=arguments.steps),
        **METHODS[method],
    )
    before = perplexity(module, arguments)
    text = TextDataModule(
        SOURCE, sequence_length=arguments.sequence_length, batch_size=arguments.batch_size, seed=arguments.seed
    )
    # the masks of the pruning: a few weights of the dense model are zero by chance, and those may move
    callbacks: list[Callback] = [KeepSparsity(str(arguments.model))] if METHODS[method]["train"] == "full" else []
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
    record = settings | {
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "perplexity_before": before,
        "perplexity_after": perplexity(module, arguments),
        "seconds": seconds,
    }
    if method == "lora":
        module.merge(keep_mask=True)
        record["perplexity_merged"] = perplexity(module, arguments)
    return record


def table(records: list[dict[str, Any]]) -> Table:
    """The records for the terminal."""
    result = Table(title=f"perplexity on test documents, windows of {PERPLEXITY_WINDOW} tokens")
    for name in ("model", "pattern", "method", "steps", "seed", "before", "after", "merged", "minutes"):
        result.add_column(name, justify="left" if name in ("model", "pattern", "method") else "right", overflow="fold")
    for r in records:
        merged = f"{r['perplexity_merged']:,.1f}" if "perplexity_merged" in r else ""
        figures = (f"{r['perplexity_before']:,.1f}", f"{r['perplexity_after']:,.1f}", merged)
        row = (r["model"], r["pattern"], r["method"], str(r["steps"]), str(r["seed"]), *figures)
        result.add_row(*row, f"{r['seconds'] / 60:.1f}")
    return result


def main() -> None:
    """Make what is missing and write the result file after each record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=Path("runs/demo/pruned_model"), help="directory of a pruned model"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=4, help="windows of a step")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a training window")
    parser.add_argument("--eval-windows", type=int, default=16, help="test windows of 512 tokens")
    arguments = parser.parse_args()
    if not (arguments.model / "prune_report.json").exists():
        raise SystemExit(
            f"error: Expected argument `model` to be a directory that `wandazeta prune` wrote, but got "
            f"'{arguments.model}'; `python benchmarks/demo.py` writes one after the demo"
        )
    records = finished(RESULT)
    for method in arguments.methods:
        settings = settings_of(method, arguments)
        if not is_finished(settings, records):
            records.append(recover(method, arguments))
            write(RESULT, describe("recovery", records, source=SOURCE, split="test"))
    console.print(table(records))


if __name__ == "__main__":
    main()
