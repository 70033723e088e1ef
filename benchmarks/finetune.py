"""Accuracy of fine-tuning against the forward passes spent, by task, model, pattern and method.

    python -m wandazeta.data.samples rotten-tomatoes bbc-news brown-genres minilm-l6 smollm2-135m
    python benchmarks/finetune.py --workers 2

Tasks, models and methods are in `benchmarks/finetune.yaml`. Of every method with something to train, the learning rate
and epsilon come from one grid: each pair spends `--grid-forwards` with the first seed, the best on validation is taken
for all seeds. Then every seed spends `--forwards` and is tested at the end; its curve is the accuracy on validation on
the way. A forward is one of a training batch; a step of back-propagation counts three. Patterns other than `dense`
are pruned once, as `best` is in `benchmarks/prune_quality.py`.

Each run is a process of its own with one thread. One that is finished is not made again: its record names all that
decides it, and is written at its end. Where the settings of a method or task changed, its records are replaced.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import yaml
from prune_quality import options_of
from records import ROOT, commit, describe, finished, is_finished, write

RESULT = ROOT / "benchmarks" / "results" / "finetune.json"
CONFIG = ROOT / "benchmarks" / "finetune.yaml"
PRUNE = ROOT / "configs" / "prune" / "best.yaml"
FOLDER = ROOT / "runs" / "finetune"


def pruned(path: str, head: bool, pattern: str) -> str:
    """Directory of a model with a pattern; pruned if it is not there, going on where that was stopped."""
    if pattern == "dense":
        return path
    name = f"{Path(path).name}-{pattern.replace(':', 'of').replace('%', 'pc')}"
    target = FOLDER / name
    if not (target / "prune_report.json").exists():
        config = yaml.safe_load(PRUNE.read_text())
        options = config["trainer"]["callbacks"][0]["init_args"]
        options |= {"output_dir": str(FOLDER.relative_to(ROOT) / f"{name}-progress")} | options_of("best", pattern, 0)
        config["model"]["init_args"] = {"model_name_or_path": path, "loading": {"num_classes": 2 if head else None}}
        target.parent.mkdir(parents=True, exist_ok=True)
        written = target.with_suffix(".yaml")
        written.write_text(yaml.safe_dump(config, sort_keys=False))
        command = [sys.executable, "-m", "wandazeta.cli.main", "prune", "-c", written, "--output_dir", target]
        subprocess.run(command, cwd=ROOT, check=True)
    return str(target.relative_to(ROOT))


def in_a_process(run: dict[str, Any]) -> dict[str, Any]:
    """Measure one run with one thread."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(run, file)
        file.flush()
        command = [sys.executable, str(ROOT / "benchmarks" / "finetune_run.py"), file.name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {run['name']} on {run['path']} failed: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


class Records:
    """The result file: what is in it is not made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = finished(path)
        self.lock = Lock()

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The record of a run, if it is finished."""
        return next((record for record in self.records if is_finished(key, [record])), None)

    def make(self, key: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
        """Return the record of a run, made in a process of its own unless it is there."""
        found = self.find(key)
        if found is not None:
            return found
        made_at = commit()
        record = key | in_a_process(run) | {"commit": made_at}
        with self.lock:
            self.records.append(record)
            write(self.path, describe("finetune", self.records))
        what = " ".join(str(key[name]) for name in ("task", "model", "pattern", "method", "seed", "phase"))
        print(f"{what}: {record['accuracy']:.3f} after {record['forwards']:,} forwards", file=sys.stderr, flush=True)
        return record

    def drop_others(self, cell: dict[str, Any], settings: dict[str, Any]) -> None:
        """Drop what a method made of its cell with other settings: a table would mix them."""
        with self.lock:
            others = [r for r in self.records if is_finished(cell, [r]) and not is_finished(settings, [r])]
            if others:
                self.records = [record for record in self.records if record not in others]
                write(self.path, describe("finetune", self.records))


def cells(config: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be measured: one entry for each task, model, pattern and method; TF-IDF once a task."""
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
    # TF-IDF takes the words as the first model with a head reads them
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
        # the smaller rates where several are as good
        rates = pairs[max(range(len(pairs)), key=lambda index: (tried[index]["accuracy"], -index))]
    for seed in arguments.seeds:
        measure("final", seed, arguments.forwards, rates)
    records.drop_others(cell, settings)


def main(args: list[str] | None = None) -> None:
    """Make what is missing; the result file is written after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", help="by default all")
    parser.add_argument("--models", nargs="+", help="by default all")
    parser.add_argument("--patterns", nargs="+", default=["dense"], help='"dense", "N:M" or a share such as "50%%"')
    parser.add_argument("--methods", nargs="+", help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of examples, batches and directions")
    parser.add_argument("--forwards", type=int, default=10_000, help="budget of every run")
    parser.add_argument("--grid-forwards", type=int, default=1_000, help="budget of a pair of rates on the grid")
    parser.add_argument("--points", type=int, default=20, help="points of a curve")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side, each with one thread")
    parser.add_argument("--config", type=Path, default=CONFIG, help="tasks, models, methods and grid")
    parser.add_argument("--result", type=Path, default=RESULT, help="file that is written and gone on with")
    arguments = parser.parse_args(args)
    config: dict[str, Any] = yaml.safe_load(arguments.config.read_text())
    for name in ("tasks", "models", "methods"):
        unknown = set(getattr(arguments, name) or []) - set(config[name])
        if unknown:
            known = ", ".join(config[name])
            raise SystemExit(f"error: Expected `--{name}` out of {known}, but got {', '.join(sorted(unknown))}")
    records = Records(arguments.result)
    found = cells(config, arguments)
    # before the workers, of which two might want the same
    for model, pattern in dict.fromkeys((cell["model"], cell["pattern"]) for cell in found):
        if model != "none":
            pruned(config["models"][model]["path"], config["models"][model]["head"], pattern)
    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(lambda cell: run_cell(cell, config, arguments, records), found))


if __name__ == "__main__":
    main()
