"""Accuracy of fine-tuning against the forward passes spent, by task, model, pattern and method.

    python -m wandazeta.data.samples rotten-tomatoes bbc-news brown-genres minilm-l6 smollm2-135m
    python benchmarks/finetune.py --workers 2

Tasks, models and methods are in `benchmarks/finetune.yaml`. The learning rate and epsilon of every method that trains
come from one grid: each pair spends `--grid-forwards` with the first seed, and the best on validation is used for all
seeds. Then every seed spends `--forwards` and is tested at the end; its curve is the validation accuracy along the way.
The unit is a forward pass over one training batch; a step of back-propagation counts as three. Patterns other than
`dense` are pruned once, with the settings of `best` in `benchmarks/prune_quality.py`.

Each run is a process of its own with one thread, and its record is written at its end. A finished run is not made
again: its record names everything that decides it. Where the settings of a method or task changed, its records are
replaced.
"""

import argparse
import itertools
import json
import logging
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pkgutil import resolve_name
from threading import Lock
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer, seed_everything
from prune_quality import config_of
from records import (
    RESULTS,
    ROOT,
    commit,
    describe,
    finished,
    is_finished,
    measure_in_process,
    run_wandazeta,
    tfidf_accuracy,
    write,
)
from torch.utils.data import DataLoader
from typing_extensions import override

from wandazeta.data.sources import SourceOptions
from wandazeta.datamodules import ClassificationDataModule, PromptedClassificationDataModule
from wandazeta.models.modes import evaluation_mode
from wandazeta.modules import LanguageModel
from wandazeta.modules.zeroth_order import NonFiniteLossError
from wandazeta.zeroth_order import Estimator

RESULT = RESULTS / "finetune.json"
CONFIG = ROOT / "benchmarks" / "finetune.yaml"
FOLDER = ROOT / "runs" / "finetune"


def pruned(path: str, head: bool, pattern: str) -> str:
    """Return the directory of a model with a pattern; prunes the model, or resumes its pruning, if it is missing."""
    if pattern == "dense":
        return path
    name = f"{Path(path).name}-{pattern.replace(':', 'of').replace('%', 'pc')}"
    target = FOLDER / name
    if not (target / "prune_report.json").exists():
        config = config_of("best", pattern, 0, FOLDER.relative_to(ROOT) / f"{name}-pruning")
        config["model"]["init_args"] = {"model_name_or_path": path, "loading": {"num_classes": 2 if head else None}}
        target.parent.mkdir(parents=True, exist_ok=True)
        written = target.with_suffix(".yaml")
        written.write_text(yaml.safe_dump(config, sort_keys=False))
        run_wandazeta("prune", "-c", written, "--output_dir", target)
    return str(target.relative_to(ROOT))


def in_a_process(run: dict[str, Any]) -> dict[str, Any]:
    """Measure one run in a process of its own."""
    try:
        return measure_in_process(__file__, "--run", json.dumps(run))
    except RuntimeError as error:
        raise SystemExit(f"error: {run['name']} on {run['path']} failed: {error}") from error


class Records:
    """The result file, shared by the threads that start runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = finished(path)
        self.lock = Lock()

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the record of a run, or None if it is not finished."""
        return next((record for record in self.records if is_finished(key, [record])), None)

    def make(self, key: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
        """Return the record of a run; measures the run if it is not finished."""
        found = self.find(key)
        if found is not None:
            return found
        made_at = commit()
        record = key | in_a_process(run) | {"commit": made_at}
        with self.lock:
            self.records.append(record)
            write(self.path, describe(self.path.stem, self.records))
        what = " ".join(str(key[name]) for name in ("task", "model", "pattern", "method", "seed", "phase"))
        print(f"{what}: {record['accuracy']:.3f} after {record['forwards']:,} forwards", file=sys.stderr, flush=True)
        return record

    def drop_others(self, cell: dict[str, Any], settings: dict[str, Any]) -> None:
        """Drop the records of a cell with other settings, which a table would mix with the new ones."""
        with self.lock:
            others = [r for r in self.records if is_finished(cell, [r]) and not is_finished(settings, [r])]
            if others:
                self.records = [record for record in self.records if record not in others]
                write(self.path, describe(self.path.stem, self.records))


def cells(config: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the cells to measure: one per task, model, pattern and method, and TF-IDF once per task."""
    found = []
    for task, model, pattern, method in itertools.product(
        arguments.tasks or config["tasks"],
        arguments.models or config["models"],
        arguments.patterns,
        arguments.methods or config["methods"],
    ):
        head = config["models"][model]["head"]
        cell = {"task": task, "model": model, "pattern": pattern, "method": method}
        if method == "tfidf":
            cell |= {"model": "none", "pattern": "none"}
        elif (config["methods"][method] or {}).get("only") == ("prompts" if head else "head"):
            continue
        if cell not in found:
            found.append(cell)
    return found


def run_cell(cell: dict[str, Any], config: dict[str, Any], arguments: argparse.Namespace, records: Records) -> None:
    """Choose the rates of a method on validation, then train and test it with every seed."""
    method = config["methods"][cell["method"]] or {}
    # TF-IDF reads texts as the first model with a head tokenises them
    reader = next(
        (model for model in config["models"].values() if model["head"]), next(iter(config["models"].values()))
    )
    model = config["models"].get(cell["model"], reader)
    data = config["data"] | config["tasks"][cell["task"]]
    path = pruned(model["path"], model["head"], cell["pattern"]) if cell["pattern"] != "none" else model["path"]
    run = {"name": cell["method"], "method": method, "data": data, "path": path, "head": model["head"]}
    settings = {"data": data, "options": method}

    def measure(phase: str, seed: int, forwards: int, rates: dict[str, float]) -> dict[str, Any]:
        budget = {"budget": forwards, "points": arguments.points} if "class_path" in method else {}
        key = cell | {"seed": seed, "phase": phase} | rates | budget | settings
        split = "val" if phase == "grid" else "test"
        spec = {"seed": seed, "forwards": forwards, "points": arguments.points, "split": split}
        return records.make(key, run | spec | rates)

    rates: dict[str, float] = {}
    if "class_path" in method:
        grid = config["grid"] | method.get("grid", {})
        names = [name for name in grid if name != "epsilon" or "ZerothOrder" in method["class_path"]]
        pairs = [dict(zip(names, pair, strict=True)) for pair in itertools.product(*(grid[n] for n in names))]
        tried = [measure("grid", arguments.seeds[0], arguments.grid_forwards, pair) for pair in pairs]
        # on a tie, the smaller rates
        rates = pairs[max(range(len(pairs)), key=lambda index: (tried[index]["accuracy"], -index))]
    for seed in arguments.seeds:
        measure("final", seed, arguments.forwards, rates)
    records.drop_others(cell, settings)


class Curve(Callback):
    """Record the validation accuracy at equal intervals of forward passes, and stop before the budget is exceeded.

    Args:
        batches: The validation batches.
        budget: Number of forward passes over a batch to spend.
        num_points: Number of points of the curve, including the last.
        forwards_per_step: Forward passes per step; None if the module counts them and stops in time.
    """

    def __init__(self, batches: list[Any], budget: int, num_points: int, forwards_per_step: int | None) -> None:
        self.batches = batches
        self.budget = budget
        self.num_points = num_points
        self.forwards_per_step = forwards_per_step
        self.points: list[tuple[int, float]] = []

    @property
    def forwards(self) -> int:
        """Number of forward passes spent."""
        return self.points[-1][0] if self.points else 0

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        per_step = self.forwards_per_step
        if per_step is None:
            spent = int(pl_module.progress[1])
        else:
            spent = trainer.global_step * per_step
            trainer.should_stop |= spent + per_step > self.budget
        if trainer.should_stop or spent * self.num_points >= (len(self.points) + 1) * self.budget:
            self.points.append((spent, accuracy(pl_module, self.batches)))


def accuracy(module: Any, batches: list[Any]) -> float:
    """Return the fraction of examples that are classified correctly."""
    right, total = 0, 0
    with torch.no_grad(), evaluation_mode(module.modules()):
        for index, batch in enumerate(batches):
            batch = {name: values.to(module.device) for name, values in batch.items()}
            right += int((module.predict_step(batch, index)["prediction"] == batch["label"]).sum())
            total += len(batch["label"])
    return right / total


def data_of(run: dict[str, Any]) -> ClassificationDataModule:
    """Return the examples of a task: text for a head, else prompts, with `shots` examples per class before them."""
    settings = run["data"] | {"tokenizer": str(ROOT / run["path"]), "seed": run["seed"]}
    template, options = settings.pop("template"), settings.pop("options")
    if "reading" in settings:
        settings["reading"] = SourceOptions(**settings["reading"])
    data: ClassificationDataModule
    if run["head"]:
        data = ClassificationDataModule(num_classes=len(options), **settings)
    else:
        data = PromptedClassificationDataModule(template=template, options=options, **settings)
    data.setup()
    shots = run["method"].get("shots", 0)
    if shots == 0:
        return data
    tokenizer: Any = data.tokenizer
    shown: list[list[str]] = [[] for _ in options]
    for example in data.examples("train"):
        prompt = tokenizer.decode(example.input_ids, skip_special_tokens=True)
        shown[example.label].append(f"{prompt}{options[example.label]}\n\n")
    before = "".join(text for group in list(zip(*shown, strict=True))[:shots] for text in group)
    # the text to classify keeps its length
    settings["max_length"] += len(tokenizer(before)["input_ids"])
    data = PromptedClassificationDataModule(template=before + template, options=options, **settings)
    data.setup()
    return data


def module_parser() -> ArgumentParser:
    """Return a parser that builds modules from class paths and options, as the command line does."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(LanguageModel, "module")
    return parser


def forwards_per_step(method: dict[str, Any]) -> int:
    """Return the forward passes per step; for zeroth order, with a constant number of queries."""
    if "forwards_per_step" in method:
        return int(method["forwards_per_step"])
    estimator: Estimator = resolve_name(estimator_of(method)["class_path"])()
    return estimator.num_forwards(method["init_args"]["schedule"]["init_args"]["num_queries"])


def estimator_of(method: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return class path and arguments of a method's estimator, `TwoSided` by default, with more arguments."""
    estimator = method["init_args"].get("estimator", {"class_path": "wandazeta.zeroth_order.TwoSided"})
    return {"class_path": estimator["class_path"], "init_args": estimator.get("init_args", {}) | more}


def module_of(run: dict[str, Any], data: ClassificationDataModule) -> LanguageModel:
    """Build the module of a method: `LanguageModel` where nothing is trained."""
    method = run["method"]
    options = dict(method.get("init_args", {}))
    if "with_head" in method:
        options["head"] = method["with_head"]["head"] | ({} if run["head"] else {"num_answers": data.num_classes})
    loading = {"num_classes": data.num_classes if run["head"] else None}
    options |= {"model_name_or_path": str(ROOT / run["path"]), "loading": options.get("loading", {}) | loading}
    if "class_path" in method:
        options |= {"seed": run["seed"], "learning_rate": run["learning_rate"]}
        if "epsilon" in run:
            options["estimator"] = estimator_of(method, epsilon=run["epsilon"])
        if "forwards_per_step" not in method:
            options["max_forwards"] = run["forwards"]
        if method.get("decay", False):
            steps = {"total_iters": run["forwards"] // forwards_per_step(method)}
            options["lr_scheduler"] = {"class_path": "torch.optim.lr_scheduler.PolynomialLR", "init_args": steps}
    parser = module_parser()
    class_path = method.get("class_path", "wandazeta.modules.LanguageModel")
    if run["name"] == "linear_probe" and not run["head"]:
        # gives the hidden states that the answers are predicted from; its adapters change nothing
        class_path = "wandazeta.modules.ZerothOrderModule"
        options["head"] = {"num_answers": data.num_classes}
    config = parser.parse_object({"module": {"class_path": class_path, "init_args": options}})
    module: LanguageModel = parser.instantiate_classes(config).module
    return module


def text_baseline(data: ClassificationDataModule) -> float:
    """Measure the test accuracy of TF-IDF with logistic regression on the same words that the model reads."""
    tokenizer: Any = data.tokenizer

    def read(split: Any) -> tuple[list[str], list[int]]:
        examples = data.examples(split)
        texts = [tokenizer.decode(example.input_ids, skip_special_tokens=True) for example in examples]
        return texts, [example.label for example in examples]

    return tfidf_accuracy(read("train"), read("test"))


def linear_probe(module: LanguageModel, data: ClassificationDataModule) -> tuple[float, int]:
    """Measure the test accuracy of logistic regression on the features of the frozen model, and the passes spent."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def read(split: Any) -> tuple[Any, Any, int]:
        features, labels = [], []
        with torch.no_grad(), evaluation_mode(module.modules()):
            for batch in DataLoader(data.examples(split), data.batch_size, collate_fn=data.collate):  # type: ignore[arg-type]
                features.append(module.scorer.option_scores(module.scorer.prepare(batch)).features)
                labels.append(batch["label"])
        return torch.cat(features).numpy(), torch.cat(labels).numpy(), len(features)

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    module.setup("predict")
    train_features, train_labels, forwards = read("train")
    classifier.fit(train_features, train_labels)
    return float(classifier.score(*read("test")[:2])), forwards


def measure_run(run: dict[str, Any]) -> dict[str, Any]:
    """Train where the method trains, and measure the accuracy on the requested split."""
    seed_everything(run["seed"], verbose=False)
    start = time.perf_counter()
    data = data_of(run)
    if run["name"] == "tfidf":
        return {"forwards": 0, "accuracy": text_baseline(data), "curve": [], "seconds": time.perf_counter() - start}
    module = module_of(run, data)
    if run["name"] == "linear_probe":
        found, forwards = linear_probe(module.eval(), data)
        return {"forwards": forwards, "accuracy": found, "curve": [], "seconds": time.perf_counter() - start}
    diverged = False
    curve = Curve(list(data.val_dataloader()), run["forwards"], run["points"], run["method"].get("forwards_per_step"))
    if "class_path" in run["method"]:
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[curve],
        )
        try:
            trainer.fit(module, datamodule=data)
        except NonFiniteLossError:
            # a rate of the grid may be too large: the result is measured like any other
            diverged = True
    loader = data.val_dataloader() if run["split"] == "val" else data.test_dataloader()
    found = accuracy(module.eval(), list(loader))
    return {
        "forwards": curve.forwards,
        "accuracy": found,
        "curve": curve.points,
        "diverged": diverged,
        "seconds": time.perf_counter() - start,
    }


def main(args: list[str] | None = None) -> None:
    """Run what is missing; the result file is written after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", help="names; by default all")
    parser.add_argument("--models", nargs="+", help="names; by default all")
    parser.add_argument("--patterns", nargs="+", default=["dense"], help='"dense", "N:M" or a sparsity such as "50%%"')
    parser.add_argument("--methods", nargs="+", help="names; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of examples, batches and directions")
    parser.add_argument("--forwards", type=int, default=10_000, help="forward passes of every run")
    parser.add_argument("--grid-forwards", type=int, default=1_000, help="forward passes of each pair of the grid")
    parser.add_argument("--points", type=int, default=20, help="points of each curve")
    parser.add_argument("--workers", type=int, default=1, help="number of processes, each with one thread")
    parser.add_argument("--config", type=Path, default=CONFIG, help="tasks, models, methods and grid")
    parser.add_argument("--result", type=Path, default=RESULT, help="the result file")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(args)
    if arguments.run is not None:
        warnings.filterwarnings("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        print(json.dumps(measure_run(arguments.run)))
        return
    config: dict[str, Any] = yaml.safe_load(arguments.config.read_text())
    for name in ("tasks", "models", "methods"):
        unknown = set(getattr(arguments, name) or []) - set(config[name])
        if unknown:
            known = ", ".join(config[name])
            raise SystemExit(f"error: Expected `--{name}` out of {known}, but got {', '.join(sorted(unknown))}")
    records = Records(arguments.result)
    found = cells(config, arguments)
    # before the workers start: two of them may need the same model
    for model, pattern in dict.fromkeys((cell["model"], cell["pattern"]) for cell in found):
        if model != "none":
            pruned(config["models"][model]["path"], config["models"][model]["head"], pattern)
    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(lambda cell: run_cell(cell, config, arguments, records), found))


if __name__ == "__main__":
    main()
