"""What a run of the demo comes to: a table on the terminal, and `summary.json` beside the run.

    wandazeta fit -c configs/demo.yaml
    python benchmarks/demo.py

Perplexity of the dense model and of its 2:4 prunings by magnitude, Wanda and Wanda++, from the directories that
`wandazeta prune` writes; accuracy on the test split before and after fine-tuning, beside the majority class and TF-IDF
with logistic regression on the same examples; what it cost. The pruned model and the adapters are left beside it.
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from records import describe, write
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from wandazeta.callbacks import WandaPPPruneCallback
from wandazeta.cli.main import PruningTrainer, command_line
from wandazeta.datamodules import PromptedClassificationDataModule, TextDataModule
from wandazeta.modules import LanguageModel, ZerothOrderModule
from wandazeta.utilities.memory import peak_memory

# held-out documents, none of which a pruning was calibrated on
PERPLEXITY_WINDOW = 512
PERPLEXITY_WINDOWS = 16
METHODS = ("magnitude", "wanda", "wanda++")

console = Console()


@dataclass
class Demo:
    """A run of `wandazeta fit`, ready to be examined.

    Args:
        model: The pruned model with its adapters.
        data: The task.
        trainer: The trainer, with the callbacks of the run.
        pruning: Arguments of its pruning callback.
        dense: Directory of the dense model.
    """

    model: ZerothOrderModule
    data: PromptedClassificationDataModule
    trainer: PruningTrainer
    pruning: dict[str, Any]
    dense: str

    @classmethod
    def from_config(cls, config: Path) -> "Demo":
        """Build it all, train nothing."""
        cli = command_line(["--config", str(config)], run=False)
        pruning = next(c for c in cli.config.trainer.callbacks if c.class_path.endswith("WandaPPPruneCallback"))
        return cls(
            cli.model,
            cli.datamodule,
            cli.trainer,
            dict(pruning.init_args),
            cli.config.model.init_args.model_name_or_path,
        )

    @property
    def folder(self) -> Path:
        """Where the run keeps its files."""
        return Path(self.trainer.default_root_dir)

    def pruned_by(self, method: str) -> Path:
        """Prune, or load the pruning if it is there, and write the model directory."""
        ours = method == self.pruning["method"]
        folder = self.folder / ("pruned_model" if ours else f"baselines/{method}_model")
        progress = self.pruning["output_dir"] if ours else str(self.folder / "baselines" / method)
        callback = WandaPPPruneCallback(**self.pruning | {"method": method, "output_dir": progress})
        quiet_trainer(callback).prune(LanguageModel(self.dense), self.data, str(folder))
        return folder

    def accuracy(self, trainer: PruningTrainer, model: LanguageModel, checkpoint: str | None = None) -> float:
        """Accuracy on the test split."""
        return trainer.test(model, self.data, ckpt_path=checkpoint, verbose=False)[0]["test/accuracy"]


def quiet_trainer(*callbacks: Any) -> PruningTrainer:
    """A trainer that leaves no log."""
    return PruningTrainer(
        accelerator="auto", devices=1, logger=False, callbacks=list(callbacks), enable_checkpointing=False
    )


def perplexity(directory: str | Path, text: TextDataModule) -> float:
    """Perplexity of a model directory on the test documents."""
    return quiet_trainer().test(LanguageModel(str(directory)), text, verbose=False)[0]["test/perplexity"]


def text_baseline(data: PromptedClassificationDataModule) -> float:
    """Accuracy of TF-IDF with logistic regression, from the same training to the same test examples."""
    classifier = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10.0, max_iter=1000))
    classifier.fit(*data.texts("train"))
    return float(classifier.score(*data.texts("test")))


def last_checkpoint(folder: Path) -> Path | None:
    """The one that `ckpt_path: last` restores, the newest: a run with `ckpt_path: null` writes `last-v1.ckpt`."""
    return max(folder.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


def examine(demo: Demo, compare_dense: bool) -> dict[str, Any]:
    """Measure everything that the table shows; the accuracy of the dense model takes long, so only where asked for."""
    start = time.perf_counter()
    calibration = demo.data.calibration
    assert calibration is not None
    checkpoint = next(c for c in demo.trainer.callbacks if isinstance(c, ModelCheckpoint))
    folder = Path(checkpoint.dirpath or "")
    last = last_checkpoint(folder)
    if last is None:
        raise SystemExit(
            f"error: Expected a finished run in '{demo.folder}', but '{folder}' has no last checkpoint; run `fit` first"
        )
    costs = torch.load(last, weights_only=True)["callbacks"]

    zero_shot = demo.accuracy(demo.trainer, demo.model)
    fine_tuned = demo.accuracy(demo.trainer, demo.model, str(last))
    pruning = next(c for c in demo.trainer.callbacks if isinstance(c, WandaPPPruneCallback)).report
    assert pruning is not None
    assert demo.model.adapters is not None
    demo.model.save_adapters(demo.folder / "adapters")
    dense = {"zero_shot_dense": demo.accuracy(quiet_trainer(), LanguageModel(demo.dense))} if compare_dense else {}

    text = TextDataModule(
        calibration.source,
        tokenizer=demo.dense,
        sequence_length=PERPLEXITY_WINDOW,
        eval_windows=PERPLEXITY_WINDOWS,
        batch_size=1,
    )
    perplexities = {"dense": perplexity(demo.dense, text)}
    for method in METHODS:
        perplexities[method] = perplexity(demo.pruned_by(method), text)

    labels = demo.data.texts("test")[1]
    minutes = {
        "pruning": pruning.seconds / 60,
        "fine_tuning": costs["Timer"]["time_elapsed"]["train"] / 60,
        "baselines_and_evaluation": (time.perf_counter() - start) / 60,
    }
    return {
        "perplexity": {
            "source": calibration.source,
            "split": "test",
            "sequence_length": PERPLEXITY_WINDOW,
            "num_tokens": PERPLEXITY_WINDOW * len(text.windows("test")[:PERPLEXITY_WINDOWS]),
            **perplexities,
        },
        "accuracy": {
            "source": demo.data.source,
            "split": "test",
            "num_examples": len(labels),
            "template": demo.data.template,
            "options": demo.data.options,
            "majority": max(Counter(labels).values()) / len(labels),
            **dense,
            "zero_shot": zero_shot,
            "fine_tuned": fine_tuned,
            "tfidf_logistic_regression": text_baseline(demo.data),
        },
        "sparsity": pruning.sparsity,
        "trainable_parameters": demo.model.adapters.num_parameters,
        "steps": int(demo.model.progress[0]),
        "forward_passes": int(demo.model.progress[1]),
        "train_batch_size": demo.data.batch_size,
        "minutes": {**minutes, "total": sum(minutes.values())},
        "peak_memory_gib": {
            "pruning": pruning.peak_memory / 2**30,
            "fine_tuning": costs["PeakMemoryMonitor"]["peak_bytes"] / 2**30,
            "baselines_and_evaluation": peak_memory(torch.device("cpu")) / 2**30,
        },
    }


def table(summary: dict[str, Any]) -> Table:
    """The summary for the terminal."""
    result = Table(title="SmolLM2-135M (dequantised from Q4_1), 2:4 by Wanda++, fine-tuned by AdaZeta")
    result.add_column("measure")
    result.add_column("value", justify="right")
    ppl, accuracy, minutes, memory = (summary[key] for key in ("perplexity", "accuracy", "minutes", "peak_memory_gib"))
    heading = f"perplexity, {ppl['num_tokens']:,} held-out tokens in windows of {ppl['sequence_length']}"
    result.add_row(heading, "", style="bold")
    for key, name in (("dense", "dense"), ("magnitude", "magnitude"), ("wanda", "Wanda"), ("wanda++", "Wanda++")):
        result.add_row(f"  {name}", f"{ppl[key]:,.1f}")
    result.add_section()
    result.add_row(f"accuracy, {accuracy['num_examples']:,} test examples, balanced", "", style="bold")
    for key, name in (
        ("majority", "majority class"),
        ("zero_shot_dense", "dense model, zero-shot"),
        ("zero_shot", "pruned model, zero-shot"),
        ("fine_tuned", "pruned model, fine-tuned by forward passes alone"),
        ("tfidf_logistic_regression", "TF-IDF with logistic regression"),
    ):
        if key in accuracy:
            result.add_row(f"  {name}", f"{accuracy[key]:.3f}")
    result.add_section()
    result.add_row("cost", "", style="bold")
    result.add_row("  trainable parameters", f"{summary['trainable_parameters']:,}")
    result.add_row(f"  forward passes of {summary['train_batch_size']} examples", f"{summary['forward_passes']:,}")
    for key, value in minutes.items():
        result.add_row(f"  minutes, {key.replace('_', ' ')}", f"{value:.1f}")
    for key, value in memory.items():
        result.add_row(f"  peak memory, {key.replace('_', ' ')}", f"{value:.2f} GiB")
    return result


def main() -> None:
    """Examine the run and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="config of the run")
    parser.add_argument("--compare-dense", action="store_true", help="measure the dense model's accuracy too")
    arguments = parser.parse_args()
    demo = Demo.from_config(arguments.config)
    summary = examine(demo, arguments.compare_dense)
    write(demo.folder / "summary.json", describe("demo", summary))
    console.print(table(summary))
    for what, where in (("summary", "summary.json"), ("pruned model", "pruned_model"), ("adapters", "adapters")):
        console.print(f"{what}: {demo.folder / where}")


if __name__ == "__main__":
    main()
