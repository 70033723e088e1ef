"""The demo's results: perplexity, accuracy, time and memory of one run, of several seeds, and of candidate prompts.

    wandazeta fit -c configs/demo.yaml
    python benchmarks/demo.py            # examine the run: a table, and summary.json in its folder
    python benchmarks/demo.py seeds      # whole runs with several seeds: benchmarks/results/demo_seeds.json
    python benchmarks/demo.py prompts    # the choice of the prompt: benchmarks/results/prompts.json

Examining a run measures the perplexity of the dense model and of its 2:4 prunings by magnitude, Wanda and the method of
the run, from the directories that `wandazeta prune` writes, and the accuracy on the test split before and after
fine-tuning, beside the majority class and TF-IDF with logistic regression on the same examples. It leaves the pruned
model and the adapters in the run's folder.

`seeds` changes the seed of the calibration text, the examples, the adapters and the directions. Every seed is a
`wandazeta fit` and an examination in a folder of its own; a finished seed is not run again. The gain is the accuracy
after fine-tuning less the better of zero-shot and majority class, on the test split, with Student's interval over the
seeds.

`prompts` measures the zero-shot accuracy of the pruned model on validation examples, with candidate prompts from the
literature on movie reviews, each with two answers of one token.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from records import RESULTS, ROOT, describe, quiet_trainer, run_wandazeta, tfidf_accuracy, write
from rich.console import Console
from rich.table import Table
from tables import METHODS, interval

from wandazeta.callbacks import WandaPPPruneCallback
from wandazeta.cli.main import PruningTrainer, command_line
from wandazeta.datamodules import PromptedClassificationDataModule, TextDataModule
from wandazeta.modules import LanguageModel, ZerothOrderModule
from wandazeta.utilities.memory import peak_memory

DEMO = ROOT / "configs" / "demo.yaml"
# test documents, which no pruning was calibrated on
PERPLEXITY_WINDOW = 512
PERPLEXITY_WINDOWS = 16
BASELINES = ("magnitude", "wanda")
CANDIDATES = (
    # Gao et al. 2021 (LM-BFF), and MeZO, for SST-2
    ("{text} It was", [" terrible", " great"]),
    # Schick and Schütze 2021 (PET), for Yelp: the patterns that end with the answer
    ("{text} All in all, it was", [" bad", " good"]),
    ("{text} In summary, the movie is", [" bad", " good"]),
    # Zhao et al. 2021 (contextual calibration), for SST-2
    ("Review: {text}\nSentiment:", [" negative", " positive"]),
)
NUM_PROMPT_EXAMPLES = 600

console = Console()


@dataclass
class Demo:
    """A run of `wandazeta fit` to examine.

    Args:
        model: The pruned model with its adapters.
        data: The data of the task.
        trainer: The trainer, with the callbacks of the run.
        pruning: The callback that prunes the model.
        dense: Directory of the dense model.
    """

    model: ZerothOrderModule
    data: PromptedClassificationDataModule
    trainer: PruningTrainer
    pruning: WandaPPPruneCallback
    dense: str

    @classmethod
    def from_config(cls, config: Path) -> "Demo":
        """Build the objects of a config without training."""
        cli = command_line(["--config", str(config)], run=False)
        pruning = next(c for c in cli.trainer.callbacks if isinstance(c, WandaPPPruneCallback))
        return cls(cli.model, cli.datamodule, cli.trainer, pruning, cli.config.model.init_args.model_name_or_path)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.trainer.default_root_dir)

    def pruned_by(self, method: str) -> Path:
        """Prune by a method, or load the finished pruning, and write the model directory."""
        options = self.pruning.options
        ours = method == options.method.name
        folder = self.folder / ("pruned_model" if ours else f"baselines/{method}_model")
        callback = WandaPPPruneCallback(
            **options.pattern.to_dict(),
            method=options.method if ours else method,
            compute_dtype=options.compute_dtype,
            exclude_modules=list(options.exclude_modules),
            num_calibration_samples=self.pruning.num_calibration_samples,
            output_dir=self.pruning.output_dir if ours else str(self.folder / "baselines" / method),
            seed=options.seed,
        )
        quiet_trainer(callback).prune(LanguageModel(self.dense), self.data, str(folder))
        return folder

    def accuracy(self, trainer: PruningTrainer, model: LanguageModel, checkpoint: str | None = None) -> float:
        """Measure the accuracy on the test split."""
        return trainer.test(model, self.data, ckpt_path=checkpoint, verbose=False)[0]["test/accuracy"]


def perplexity(directory: str | Path, text: TextDataModule) -> float:
    """Measure the perplexity of a model directory on the test documents."""
    return quiet_trainer().test(LanguageModel(str(directory)), text, verbose=False)[0]["test/perplexity"]


def last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that `ckpt_path: last` restores: the newest, as `ckpt_path: null` writes `last-v1.ckpt`."""
    return max(folder.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)


def examine(demo: Demo, compare_dense: bool) -> dict[str, Any]:
    """Measure everything that the table shows; the accuracy of the dense model is optional because it takes long."""
    start = time.perf_counter()
    calibration = demo.data.calibration
    assert calibration is not None
    checkpoint = next(c for c in demo.trainer.callbacks if isinstance(c, ModelCheckpoint))
    folder = Path(checkpoint.dirpath or "")
    last = last_checkpoint(folder)
    if last is None:
        raise SystemExit(
            f"error: Expected a finished run in '{demo.folder}', but '{folder}' has no checkpoint; run `wandazeta fit`"
        )
    costs = torch.load(last, weights_only=True)["callbacks"]

    zero_shot = demo.accuracy(demo.trainer, demo.model)
    fine_tuned = demo.accuracy(demo.trainer, demo.model, str(last))
    pruning = demo.pruning.report
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
    for method in (*BASELINES, demo.pruning.options.method.name):
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
            "bos": text.starts_with_bos,
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
            "tfidf_logistic_regression": tfidf_accuracy(demo.data.texts("train"), demo.data.texts("test")),
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


def summary_table(summary: dict[str, Any]) -> Table:
    """Return the summary as a table for the terminal."""
    result = Table(title="SmolLM2-135M (dequantised from Q4_1), pruned to 2:4, fine-tuned by AdaZeta")
    result.add_column("measure")
    result.add_column("value", justify="right")
    ppl, accuracy, minutes, memory = (summary[key] for key in ("perplexity", "accuracy", "minutes", "peak_memory_gib"))
    heading = f"perplexity, {ppl['num_tokens']:,} held-out tokens in windows of {ppl['sequence_length']}"
    result.add_row(heading, "", style="bold")
    for key, name in METHODS.items():
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


def config_of(seed: int, folder: str) -> dict[str, Any]:
    """Return the demo's config with another seed and folder."""
    config: dict[str, Any] = yaml.safe_load(re.sub(r"\bruns/demo\b", folder, DEMO.read_text()))
    config["seed_everything"] = seed
    config["model"]["init_args"]["seed"] = seed
    config["data"]["init_args"]["seed"] = seed
    config["data"]["init_args"]["calibration"]["init_args"]["seed"] = seed
    prune = config["prune"]
    prune.get("init_args", prune)["seed"] = seed
    return config


def run_seed(seed: int) -> dict[str, Any]:
    """Fit and examine one seed, or read its finished summary."""
    folder = f"runs/demo_seeds/{seed}"
    summary = ROOT / folder / "summary.json"
    if not summary.exists():
        config = ROOT / folder / "demo.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump(config_of(seed, folder), sort_keys=False))
        run_wandazeta("fit", "-c", config)
        examine = [sys.executable, Path(__file__), "examine", "--compare-dense", "--config", config]
        subprocess.run(examine, cwd=ROOT, check=True)
    return {"seed": seed, **json.loads(summary.read_text())["records"]}


def gains(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean gain over the seeds with its 95% interval."""
    values = [r["accuracy"]["fine_tuned"] - max(r["accuracy"]["zero_shot"], r["accuracy"]["majority"]) for r in records]
    lower, upper = interval(values)
    return {"gains": values, "mean": statistics.mean(values), "lower_95": lower, "upper_95": upper}


def run_examine(arguments: argparse.Namespace) -> None:
    """Examine one run, write its summary and show it."""
    demo = Demo.from_config(arguments.config)
    summary = examine(demo, arguments.compare_dense)
    write(demo.folder / "summary.json", describe("demo", summary))
    console.print(summary_table(summary))
    for what, where in (("summary", "summary.json"), ("pruned model", "pruned_model"), ("adapters", "adapters")):
        console.print(f"{what}: {demo.folder / where}")


def run_seeds(arguments: argparse.Namespace) -> None:
    """Run all seeds and write the result file."""
    seeds = arguments.seeds
    if len(set(seeds)) < 2:
        raise SystemExit(f"error: Expected argument `seeds` to be at least two different numbers, but got {seeds}")
    records = [run_seed(seed) for seed in seeds]
    result = describe("demo_seeds", records, gain=gains(records))
    write(RESULTS / "demo_seeds.json", result)
    print(json.dumps(result["gain"], indent=2))


def run_prompts(arguments: argparse.Namespace) -> None:
    """Measure every candidate and write the result file, the best first."""
    model, trainer = LanguageModel(str(ROOT / "runs" / "demo" / "pruned_model")), quiet_trainer()
    records = []
    for template, options in CANDIDATES:
        data = PromptedClassificationDataModule(
            "sample:rotten-tomatoes", template, options, eval_batch_size=50, num_val=NUM_PROMPT_EXAMPLES
        )
        accuracy = trainer.validate(model, data, verbose=False)[0]["val/accuracy"]
        records.append({"template": template, "options": options, "accuracy": accuracy})
    records.sort(key=lambda record: -record["accuracy"])
    more = {"source": "sample:rotten-tomatoes", "split": "val", "num_examples": NUM_PROMPT_EXAMPLES}
    write(RESULTS / "prompts.json", describe("prompts", records, **more))
    for record in records:
        print(f"{record['accuracy']:.3f}  {record['template']!r} {record['options']}")


def main() -> None:
    """Run the part that the command line names; without one, examine the demo's run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    examine_parser = commands.add_parser("examine", help="examine one run")
    examine_parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="config of the run")
    examine_parser.add_argument("--compare-dense", action="store_true", help="measure the dense model's accuracy too")
    seeds_parser = commands.add_parser("seeds", help="run and examine several seeds")
    seeds_parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    commands.add_parser("prompts", help="compare candidate prompts")
    arguments = parser.parse_args(sys.argv[1:] or ["examine"])
    {"examine": run_examine, "seeds": run_seeds, "prompts": run_prompts}[arguments.command](arguments)


if __name__ == "__main__":
    main()
