"""Perplexity after pruning SmolLM2-135M, by method, pattern and calibration seed, on test documents of two genres.

    python -m wandazeta.data.samples wikipedia brown smollm2-135m
    python benchmarks/prune_quality.py

Every record is a `wandazeta prune` of its own from 64 windows of 512 tokens of Wikipedia's training documents. `paper`
has the settings of `configs/prune/paper.yaml`, `best` those of `configs/prune/best.yaml`; the other methods have none.
Records of `best_12_rounds`, `best_3_copies` and `best_6_rounds` are of `best.yaml` at the commits that they name: at a
learning rate of 1e-3, with three written windows for each real one beside it, and at that rate with half the rounds.
What is finished is not made again, and a pruning that was stopped goes on at the next block. Seconds are those of the
blocks' pruning, without loading and evaluation; `OMP_NUM_THREADS` sets the threads, two processes with one each get
most out of two cores.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from demo import quiet_trainer
from records import ROOT, commit, describe, finished, is_finished, write

from wandazeta.datamodules import TextDataModule
from wandazeta.modules import LanguageModel

RESULT = ROOT / "benchmarks" / "results" / "prune_quality.json"
FOLDER = ROOT / "runs" / "prune_quality"
MODEL = ".cache/wandazeta/smollm2-135m"
TEXTS = ("wikipedia", "brown")
WINDOW = 512
NUM_SAMPLES = 64
METHODS = ("dense", "magnitude", "wanda", "sparsegpt", "paper", "best")
# the one setting of `best` that a pattern decides, as its file says
SPARSITY_SLOPE = 0.2
CONFIGS = {"paper": "configs/prune/paper.yaml", "best": "configs/prune/best.yaml"}


def pattern_options(pattern: str) -> dict[str, Any]:
    """A pattern as users write it, "2:4" or "50%", as options of the callback."""
    if pattern.endswith("%"):
        return {"sparsity_pattern": "unstructured", "sparsity": float(pattern[:-1]) / 100}
    return {"sparsity_pattern": pattern}


def options_of(method: str, pattern: str, seed: int) -> dict[str, Any]:
    """What decides a pruning, as options of the callback."""
    options: dict[str, Any] = {"method": method}
    if method in CONFIGS:
        config = yaml.safe_load((ROOT / CONFIGS[method]).read_text())
        options = dict(config["trainer"]["callbacks"][0]["init_args"])
        del options["num_calibration_samples"], options["output_dir"]
    options |= pattern_options(pattern) | {"seed": seed}
    if method == "best" and options["sparsity_pattern"] == "unstructured":
        options["sparsity_slope"] = SPARSITY_SLOPE
    return options


def config_of(method: str, pattern: str, seed: int, folder: Path) -> dict[str, Any]:
    """The configuration of one pruning."""
    options = options_of(method, pattern, seed)
    options |= {"num_calibration_samples": NUM_SAMPLES, "output_dir": str(folder / "progress")}
    callback = {"class_path": "wandazeta.callbacks.WandaPPPruneCallback", "init_args": options}
    text = {"source": "sample:wikipedia", "sequence_length": WINDOW, "num_calibration_samples": NUM_SAMPLES}
    return {
        "seed_everything": seed,
        "model": {"class_path": "wandazeta.modules.LanguageModel", "init_args": {"model_name_or_path": MODEL}},
        "data": {"class_path": "wandazeta.datamodules.TextDataModule", "init_args": text | {"seed": seed}},
        "trainer": {"accelerator": "auto", "devices": 1, "logger": False, "callbacks": [callback]},
    }


def pruned(method: str, pattern: str, seed: int) -> tuple[Path, dict[str, Any]]:
    """Prune, or go on with a pruning that was stopped; gives the model's directory and the report."""
    folder = FOLDER / f"{method}-{pattern.replace(':', 'of').replace('%', 'pc')}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(config_of(method, pattern, seed, folder.relative_to(ROOT)), sort_keys=False))
    model = folder / "model"
    if not (model / "prune_report.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        command = [sys.executable, "-m", "wandazeta.cli.main", "prune", "-c", config, "--output_dir", model]
        subprocess.run(command, cwd=ROOT, check=True)
    return model, json.loads((model / "prune_report.json").read_text())


def perplexities(model: Path, eval_windows: int) -> dict[str, dict[str, float]]:
    """Perplexity on the test documents of every text, and on those for validation, by which settings are chosen."""
    module, trainer = LanguageModel(str(model)), quiet_trainer()
    result = {}
    for text in TEXTS:
        data = TextDataModule(f"sample:{text}", sequence_length=WINDOW, eval_windows=eval_windows, batch_size=4)
        found = trainer.test(module, data, verbose=False)[0]["test/perplexity"]
        validated = trainer.validate(module, data, verbose=False)[0]["val/perplexity"]
        result[text] = {"perplexity": found, "perplexity_val": validated}
    return result


def wanted(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """What is to be measured: seeds one after the other, so that a run that is stopped has whole ones."""
    if "dense" in arguments.methods:
        yield "dense", "dense", 0
    for seed in arguments.seeds:
        for pattern in arguments.patterns:
            for method in arguments.methods:
                if method != "dense" and (method != "magnitude" or seed == arguments.seeds[0]):
                    yield method, pattern, seed


def main() -> None:
    """Make what is missing; the result file is written after each pruning."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8", "50%", "60%", "70%"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration windows and draws")
    parser.add_argument("--eval-windows", type=int, default=32, help="test windows of each text")
    parser.add_argument("--keep", action="store_true", help="keep the pruned models under runs/prune_quality")
    arguments = parser.parse_args()
    for method, pattern, seed in wanted(arguments):
        key = {"model": "SmolLM2-135M", "method": method, "pattern": pattern, "window": WINDOW, "seed": seed}
        key |= {"eval_windows": arguments.eval_windows}
        # `best` changes with what is found: records of other options do not count
        chosen = {} if method == "dense" else options_of(method, pattern, seed)
        if is_finished(key, [record for record in finished(RESULT) if record["options"].items() >= chosen.items()]):
            continue
        directory, report = (ROOT / MODEL, {}) if method == "dense" else pruned(method, pattern, seed)
        seconds = report.get("seconds", 0.0)
        extra = {"seconds": seconds, "threads": torch.get_num_threads()}
        extra |= {"options": report.get("options", {}), "commit": commit()}
        found = perplexities(directory, arguments.eval_windows)
        # read again: other seeds may be running beside this one
        records = finished(RESULT) + [key | {"text": text} | values | extra for text, values in found.items()]
        write(RESULT, describe("prune_quality", records, split="test", calibration=f"{NUM_SAMPLES} x {WINDOW} tokens"))
        print(f"{method} {pattern} seed {seed}: {found}", flush=True)
        if method != "dense" and not arguments.keep:
            shutil.rmtree(directory.parent)


if __name__ == "__main__":
    main()
