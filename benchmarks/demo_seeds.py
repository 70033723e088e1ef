"""The demo with several seeds: of the calibration text, the examples, the adapters and the directions.

    python benchmarks/demo_seeds.py

Every seed is a whole `wandazeta fit` and examination of its own, in a folder of its own; one that is finished is not
made again. The gain is accuracy after fine-tuning less the better of zero-shot and majority class, on the test split;
its interval is Student's over the seeds.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from typing import Any

import yaml
from records import ROOT, describe, write
from tables import interval

DEMO = ROOT / "configs" / "demo.yaml"


def config_of(seed: int, folder: str) -> dict[str, Any]:
    """The demo's configuration with another seed and folder."""
    config: dict[str, Any] = yaml.safe_load(re.sub(r"\bruns/demo\b", folder, DEMO.read_text()))
    config["seed_everything"] = seed
    config["model"]["init_args"]["seed"] = seed
    config["data"]["init_args"]["seed"] = seed
    config["data"]["init_args"]["calibration"]["init_args"]["seed"] = seed
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"].endswith("WandaPPPruneCallback"):
            callback["init_args"]["seed"] = seed
    return config


def run(seed: int) -> dict[str, Any]:
    """Fit and examine one seed, or read what is there."""
    folder = f"runs/demo_seeds/{seed}"
    summary = ROOT / folder / "summary.json"
    if not summary.exists():
        config = ROOT / folder / "demo.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump(config_of(seed, folder), sort_keys=False))
        subprocess.run([sys.executable, "-m", "wandazeta.cli.main", "fit", "-c", config], cwd=ROOT, check=True)
        examine = [sys.executable, ROOT / "benchmarks" / "demo.py", "--compare-dense", "--config", config]
        subprocess.run(examine, cwd=ROOT, check=True)
    return {"seed": seed, **json.loads(summary.read_text())["records"]}


def gains(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean gain over the seeds with its 95% interval."""
    values = [r["accuracy"]["fine_tuned"] - max(r["accuracy"]["zero_shot"], r["accuracy"]["majority"]) for r in records]
    lower, upper = interval(values)
    return {"gains": values, "mean": statistics.mean(values), "lower_95": lower, "upper_95": upper}


def main() -> None:
    """Run all seeds and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    if len(set(seeds)) < 2:
        raise SystemExit(f"error: Expected argument `seeds` to be two or more different numbers, but got {seeds}")
    records = [run(seed) for seed in seeds]
    result = describe("demo_seeds", records, gain=gains(records))
    write(ROOT / "benchmarks" / "results" / "demo_seeds.json", result)
    print(json.dumps(result["gain"], indent=2))


if __name__ == "__main__":
    main()
