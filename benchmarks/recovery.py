"""Perplexity regained by training after pruning: LoRA against masked full fine-tuning, at equal steps and batches.

    wandazeta prune -c preset:best -c configs/prune/smollm2.yaml --output_dir runs/best
    python benchmarks/recovery.py --models runs/best

Both train on Wikipedia text, and neither on the documents whose perplexity is measured. LoRA's adapters stay beside the
sparse weights, which costs time at every use; `perplexity_merged` is the perplexity after they are merged and the masks
applied again. Every rate of `--learning-rates` is run, and the table shows the rate with the lowest perplexity on the
validation documents. A setting whose record is in the result file is not run again.

    python benchmarks/recovery.py --models runs/best --methods distil --tokens 250000 500000 1000000 2000000

`distil` trains all weights on the predictions of the dense model, as `wandazeta recover` does: one run, measured at
every number of tokens, whose records are in `distil.json`. Started again, it goes on from its last checkpoint.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from records import RESULTS, ROOT, SMOLLM2, describe, finished, is_finished, quiet_trainer, write
from rich.console import Console
from rich.table import Table
from torch.optim.lr_scheduler import PolynomialLR
from typing_extensions import override

from wandazeta.adapters import PeftLoRA, Weights
from wandazeta.callbacks import KeepSparsity
from wandazeta.cli.recover import (
    LEARNING_RATES,
    distillation_trainer,
    one_cycle,
    training_precision,
    window_loader,
)
from wandazeta.data.sources import SourceOptions, read_splits
from wandazeta.data.windows import cut_windows
from wandazeta.datamodules import TextDataModule
from wandazeta.models.loading import load_backbone
from wandazeta.modules import FirstOrderModule
from wandazeta.scoring.evaluation import mean_nll

RESULT = RESULTS / "recovery.json"
DISTIL_RESULT = RESULTS / "distil.json"
RUNS = ROOT / "runs" / "distil"
TEACHER = SMOLLM2
DISTIL_BATCH, DISTIL_LENGTH = 8, 512
SOURCE = "sample:wikipedia"
PERPLEXITY_WINDOW = 512
# what each trains, and its default learning rate: adapters start at zero and need larger steps
METHODS: dict[str, tuple[PeftLoRA | Weights, float]] = {"lora": (PeftLoRA(), 5e-4), "masked_full": (Weights(), 5e-5)}

console = Console()


def pruning_of(model: Path) -> dict[str, Any]:
    """Return what a record says about a pruned model."""
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
    }


def settings_of(model: Path, method: str, learning_rate: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return everything that decides a record: records with equal settings are the same."""
    return pruning_of(model) | {
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


class Curve(Callback):
    """Measures the perplexity at numbers of tokens on the way, and writes a record of each.

    Args:
        settings: Settings of the run.
        budgets: Numbers of steps after which it is measured.
        windows: Windows of the validation and of the test documents.
    """

    def __init__(self, settings: dict[str, Any], budgets: list[int], windows: dict[str, list[torch.Tensor]]) -> None:
        self.settings = settings
        self.budgets = budgets
        self.windows = windows
        self.seconds = 0.0
        self._start = 0.0

    def measure(self, model: torch.nn.Module, steps: int) -> None:
        """Write the record after a number of steps, unless it is there."""
        tokens = steps * self.settings["batch_size"] * self.settings["sequence_length"]
        settings = self.settings | {"tokens": tokens}
        records = finished(DISTIL_RESULT)
        if is_finished(settings, records):
            return
        found = {
            split: mean_nll(model, windows, 1, next(model.parameters()).device, f"{split}, {tokens:,} tokens")[0]
            for split, windows in self.windows.items()
        }
        perplexity = {split: float(torch.tensor(nll).exp()) for split, nll in found.items()}
        console.print(f"{settings['method']}, {tokens:,} tokens: {perplexity}")
        records.append(settings | {"perplexity": perplexity, "seconds": self.seconds})
        write(DISTIL_RESULT, describe("distil", records, source=SOURCE))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += time.perf_counter() - self._start
        # with accumulated gradients, after the last batch of a step
        if trainer.global_step in self.budgets and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            assert isinstance(pl_module, FirstOrderModule)
            self.measure(pl_module.backbone, trainer.global_step)

    @override
    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.seconds = state_dict["seconds"]


def distil(model: Path, learning_rate: float, arguments: argparse.Namespace) -> None:
    """Train all weights on the predictions of the dense model, and measure on the way."""
    step = DISTIL_BATCH * arguments.distil_length
    budgets = [max(1, round(tokens / step)) for tokens in sorted(arguments.tokens)]
    steps = budgets[-1]
    run = {
        "teacher": Path(arguments.teacher).name,
        "text": "+".join(Path(source).name.removeprefix("sample:") for source in arguments.text),
        "total_tokens": steps * step,
        "seed": arguments.seed,
        "learning_rate": learning_rate,
        "batch_size": DISTIL_BATCH,
        "sequence_length": arguments.distil_length,
        "eval_windows": arguments.eval_windows,
        "perplexity_window": PERPLEXITY_WINDOW,
        "precision": training_precision(),
    }
    settings = pruning_of(model) | {"method": "distil"} | run
    done = [record["tokens"] for record in finished(DISTIL_RESULT) if record.items() >= settings.items()]
    if set(done) >= {0, *(count * step for count in budgets)}:
        return
    module = FirstOrderModule(
        str(model),
        trainable=Weights(),
        learning_rate=learning_rate,
        lr_scheduler=one_cycle(learning_rate, steps),
        seed=arguments.seed,
        teacher=arguments.teacher,
    )

    def windows(source: str, split: Any, length: int) -> list[torch.Tensor]:
        documents = read_splits(source, SourceOptions(), (0.8, 0.1, 0.1))[split]
        return cut_windows(module.tokenizer, [document.text for document in documents], length)

    train = [window for source in arguments.text for window in windows(source, "train", arguments.distil_length)]
    train = train[: len(train) // DISTIL_BATCH * DISTIL_BATCH]
    held = {split: windows(SOURCE, split, PERPLEXITY_WINDOW)[: arguments.eval_windows] for split in ("val", "test")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    Curve(run | {"model": run["teacher"], "method": "dense"}, [], held).measure(
        load_backbone(arguments.teacher).to(device), 0
    )
    curve = Curve(settings, budgets, held)
    curve.measure(module.backbone.to(device), 0)
    folder = RUNS / f"{model.absolute().name}-{settings['pruning_key'][:8]}-{steps}-{learning_rate:g}-{arguments.seed}"
    trainer = distillation_trainer(str(model), steps, DISTIL_BATCH, folder, [curve])
    loader = window_loader(train, DISTIL_BATCH, arguments.seed, trainer)
    last = folder / "checkpoints" / "last.ckpt"
    console.print(
        f"{steps:,} steps of {step:,} tokens, {steps * DISTIL_BATCH / len(train):.2f} times the {len(train):,} windows"
    )
    trainer.fit(module, loader, ckpt_path=str(last) if last.exists() else None)


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
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "distil"], default=list(METHODS))
    parser.add_argument("--learning-rates", type=float, nargs="+", help="by default one per method")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps per method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=4, help="windows per step")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a training window")
    parser.add_argument("--eval-windows", type=int, default=16, help="test windows of 512 tokens")
    budgets = [250_000, 500_000, 1_000_000, 2_000_000]
    parser.add_argument("--tokens", type=int, nargs="+", default=budgets, help="of `distil`: where it is measured")
    parser.add_argument("--teacher", default=str(TEACHER), help="of `distil`: the dense model")
    parser.add_argument("--text", nargs="+", default=[SOURCE, "sample:brown"], help="of `distil`: its training text")
    parser.add_argument("--distil-length", type=int, default=DISTIL_LENGTH, help="of `distil`: tokens of a window")
    arguments = parser.parse_args()
    for model in arguments.models:
        if not (model / "prune_report.json").exists():
            raise SystemExit(
                "error: Expected argument `models` to be directories that `wandazeta prune` wrote, but got "
                f"'{model}'; `make demo` writes one"
            )
    records = finished(RESULT)
    for model, method in product(arguments.models, arguments.methods):
        if method == "distil":
            for learning_rate in arguments.learning_rates or [LEARNING_RATES["weights"]]:
                distil(model, learning_rate, arguments)
            continue
        for learning_rate in arguments.learning_rates or [METHODS[method][1]]:
            if not is_finished(settings_of(model, method, learning_rate, arguments), records):
                records.append(recover(model, method, learning_rate, arguments))
                write(RESULT, describe("recovery", records, source=SOURCE))
    if records:
        console.print(table(records))


if __name__ == "__main__":
    main()
