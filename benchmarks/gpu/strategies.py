"""Prune and fine-tune a tiny model under every strategy of configs/trainer, by forward passes and by back-propagation.

    python benchmarks/gpu/strategies.py --device cuda

Each run is `wandazeta fit` for four steps on all GPUs of the machine, several runs at a time. Their last losses are
compared with those of a single device, or of DDP where more ranks see more data: by back-propagation. Lightning refuses
DeepSpeed on a CPU, where only the other strategies run.
"""

import argparse
import copy
import csv
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from helpers.fit_config import fit_settings, write_inputs
from records import ROOT, describe, write

AT_ONCE = 4
# largest relative difference of a loss from that in float32; DeepSpeed's configs train in bfloat16
BOUND = 0.05


def strategies(device: str) -> dict[str, list[str]]:
    """Return the arguments that choose each strategy; the first is a single device."""
    ranks = str(torch.cuda.device_count() if device == "cuda" else 2)
    size = ["--trainer.devices", ranks]
    # its config names a number of devices
    sizes = {"ddp": size, "fsdp2": [*size, "--trainer.strategy.init_args.data_parallel_size", ranks]}
    if device == "cpu":
        on_cpu = ["--trainer.accelerator", "cpu"]
        chosen = {name: ["-c", f"configs/trainer/{name}.yaml", *on_cpu, *sizes[name]] for name in sizes}
        return {"cpu": []} | chosen
    others = sorted(path.stem for path in (ROOT / "configs" / "trainer").glob("*.yaml"))
    names = ("gpu", *(name for name in others if name not in ("cpu", "gpu")))
    return {name: ["-c", f"configs/trainer/{name}.yaml", *sizes.get(name, [])] for name in names}


def settings(folder: Path, name: str, kind: str) -> dict[str, Any]:
    """Return the config of a run."""
    config: dict[str, Any] = copy.deepcopy(fit_settings(folder, str(folder / kind / name)))
    config["seed_everything"] = 0
    config["trainer"] |= {"max_steps": 4, "devices": 1}
    if kind == "back-propagation":
        # masks are kept by the callback that pruned
        arguments = {"model_name_or_path": str(folder / "model"), "learning_rate": 1e-3}
        trainable = {"class_path": "wandazeta.adapters.Weights"}
        config["model"] = {"class_path": "FirstOrderModule", "init_args": arguments | {"trainable": trainable}}
    return config


def last_loss(folder: Path) -> float | None:
    """Return the last training loss in the metrics of a run."""
    files = list(folder.rglob("metrics.csv"))
    losses = [row["train/loss"] for row in csv.DictReader(files[0].open()) if row.get("train/loss")] if files else []
    return float(losses[-1]) if losses else None


def run(folder: Path, name: str, choice: list[str], kind: str) -> dict[str, Any]:
    """Run `wandazeta fit` and return its record."""
    config = folder / f"{kind}-{name}.yaml"
    config.write_text(yaml.safe_dump(settings(folder, name, kind)))
    command = [sys.executable, "-m", "wandazeta", "fit", "-c", str(config), *choice]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    record: dict[str, Any] = {"strategy": name, "trains": kind, "seconds": time.perf_counter() - start}
    record |= {"loss": last_loss(folder / kind / name), "passed": done.returncode == 0, "error": None}
    if done.returncode:
        record["error"] = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1][:300]
    return record


def main() -> None:
    """Run all strategies; the result file is written at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "strategies", help="where the runs go")
    parser.add_argument("--result", type=Path, help="the result file")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_inputs(folder)
    ranks = torch.cuda.device_count() if arguments.device == "cuda" else 2
    chosen = strategies(arguments.device)
    jobs = [(name, choice, kind) for kind in ("forward passes", "back-propagation") for name, choice in chosen.items()]
    with ThreadPoolExecutor(AT_ONCE if arguments.device == "cuda" else 1) as pool:
        records = list(pool.map(lambda job: run(folder, *job), jobs))
    losses = {(record["strategy"], record["trains"]): record["loss"] for record in records}
    single = next(iter(chosen))
    for record in records:
        same_data = ranks == 1 or record["trains"] == "forward passes" or record["strategy"] == single
        expected = losses[single if same_data else "ddp", record["trains"]]
        if record["loss"] is not None and expected is not None:
            record["difference"] = abs(record["loss"] - expected) / abs(expected)
            record["passed"] = record["passed"] and record["difference"] <= BOUND
        print(json.dumps(record))
    if arguments.result is not None:
        write(arguments.result, describe("strategies", records, ranks=ranks, bound=BOUND))
    failed = [f"{record['strategy']} by {record['trains']}" for record in records if not record["passed"]]
    if failed:
        raise SystemExit(f"error: failed or outside the bounds: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
