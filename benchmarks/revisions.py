"""Seconds of prunings and of zeroth-order steps on the CPU, beside those of an earlier commit.

    make samples
    python benchmarks/revisions.py --before 22c1acd

Both commits are installed side by side, without their dependencies, and take turns: each run is a fresh process, and
every second round goes in the other order. A pruning is that of `benchmarks/prune_worker.py`, a step that of
`benchmarks/zo.py step`, each at its own commit, with one thread. The seconds of a pruning are those of its processor
too, which other work on the machine hardly changes; those of a step are beside as many bare forward passes.

A run whose record is in the result file is not made again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from prune_cost import PATTERN, SOURCE, options_of
from records import RESULTS, ROOT, SMOLLM2, describe, finished, is_finished, write
from safetensors.torch import save_file

from wandazeta.datamodules import TextDataModule

RESULT = RESULTS / "revisions.json"
METHODS = ("wanda", "sparsegpt", "wanda++", "tuned-ro")
STEP = ("--batches", "4", "--queries", "4", "--layers", "all", "--repeats", "1", "--threads", "1")


def install(revision: str, folder: Path) -> Path:
    """Extract a commit and install it there, in the folder `site`; returns the folder of the commit."""
    target = folder / revision
    if not (target / "site").exists():
        target.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x"], cwd=target, input=archive, check=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", "site", "."]
        subprocess.run(pip, cwd=target, check=True)
    return target


def run(target: Path, script: str, *arguments: str) -> None:
    """Run a benchmark of an installed commit."""
    environment = os.environ | {"PYTHONPATH": str(target / "site"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, f"benchmarks/{script}", *arguments]
    done = subprocess.run(command, cwd=target, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit("\n".join([f"error: {' '.join(command)} failed:", *done.stderr.splitlines()[-12:]]))


def measure(target: Path, workload: str, model: Path, num_samples: int, calibration: Path) -> dict[str, float]:
    """Time one workload of an installed commit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if workload == "zeroth-order step":
            run(target, "zo.py", "step", "--model", str(model), "--result", str(folder / "step.json"), *STEP)
            (record,) = json.loads((folder / "step.json").read_text())["records"]
            return {"seconds": record["seconds_step"], "seconds_forwards": record["seconds_forwards"]}
        options = {} if workload == "tuned-ro" else options_of(workload, num_samples, "model")
        task: dict[str, Any] = {"tool": "wandazeta", "method": workload, "dtype": "float32", "threads": 1}
        task |= {"sparsity_pattern": PATTERN, "batch_size": 8, "options": options, "model": str(model)}
        task |= {"calibration": str(calibration), "weights": str(folder / "weights.safetensors")}
        task |= {"measured": str(folder / "measured.json")}
        (folder / "task.json").write_text(json.dumps(task))
        run(target, "prune_worker.py", str(folder / "task.json"))
        found = json.loads((folder / "measured.json").read_text())
        return {name: found[name] for name in ("seconds", "cpu_seconds", "peak_gib")}


def commit_of(revision: str) -> str:
    """Return the commit of a revision, in the length that records have."""
    command = ["git", "rev-parse", "--short=12", f"{revision}^{{commit}}"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Run each workload at both commits in turn, unless the result file has that run, and write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="the earlier commit")
    parser.add_argument("--after", default="HEAD", help="the later commit")
    parser.add_argument("--model", type=Path, default=ROOT / SMOLLM2, help="directory of a model of the LLaMA family")
    parser.add_argument("--workloads", nargs="+", default=[*METHODS, "zeroth-order step"])
    parser.add_argument("--num-samples", type=int, default=16, help="calibration samples")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of a calibration sample")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each workload")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    folder = ROOT / "runs" / "revisions"
    commits = {name: commit_of(getattr(arguments, name)) for name in ("before", "after")}
    targets = {name: install(commit, folder) for name, commit in commits.items()}
    data = TextDataModule(
        SOURCE,
        str(arguments.model),
        sequence_length=arguments.sequence_length,
        num_calibration_samples=arguments.num_samples,
    )
    calibration = folder / "calibration.safetensors"
    windows = torch.cat([batch["input_ids"] for batch in data.calibration_dataloader()])
    save_file({"input_ids": windows}, calibration)
    for repeat in range(arguments.repeats):
        for workload in arguments.workloads:
            for name in ("before", "after") if repeat % 2 == 0 else ("after", "before"):
                setting = {"workload": workload, "revision": name, "revision_commit": commits[name], "repeat": repeat}
                setting |= {"model": arguments.model.name, "threads": 1, "num_samples": arguments.num_samples}
                setting |= {"sequence_length": arguments.sequence_length}
                records = finished(arguments.result)
                if is_finished(setting, records):
                    continue
                found = measure(targets[name], workload, arguments.model, arguments.num_samples, calibration)
                print(f"{workload}, {name}: {found}", flush=True)
                write(arguments.result, describe("revisions", [*records, setting | found]))


if __name__ == "__main__":
    main()
