"""SmolLM2-135M on a GPU: pruned with the preset `best`, or the demo with fewer steps.

    python benchmarks/gpu/smollm2.py best
    python benchmarks/gpu/smollm2.py demo
    python benchmarks/gpu/smollm2.py demo --device cpu

Both run `wandazeta` with the committed configs. On the CPU they use a tiny random model and a few texts instead of
SmolLM2 and the samples.
"""

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from demo import perplexity
from helpers.fit_config import write_inputs
from records import ROOT, SMOLLM2, describe, run_wandazeta, write

from wandazeta.datamodules import TextDataModule

STEPS = 200


def tiny_arguments(folder: Path, job: str) -> list[str]:
    """Return the arguments that make a run small enough for the CPU."""
    sizes = ["--prune.num_calibration_samples", "4"]
    model = ["--model.init_args.model_name_or_path", str(folder / "model")]
    if job == "best":
        data = ["--data.init_args.source", str(folder / "text.txt"), "--data.init_args.sequence_length", "16"]
        return [*sizes, *model, *data]
    data = ["--data.init_args.source", str(folder / "reviews.jsonl"), "--data.init_args.num_train", "64"]
    data += ["--data.init_args.num_val", "8", "--data.init_args.batch_size", "8"]
    text = "--data.init_args.calibration.init_args"
    return [*sizes, *model, *data, f"{text}.source", str(folder / "text.txt"), f"{text}.sequence_length", "16"]


def best(folder: Path, tiny: bool) -> list[dict[str, Any]]:
    """Prune with the preset, and measure the perplexity before and after."""
    more = tiny_arguments(folder, "best") if tiny else []
    start = time.perf_counter()
    run_wandazeta(
        *("prune", "-c", "preset:best", "-c", "configs/prune/smollm2.yaml", *more, "--trainer.accelerator"),
        *("cpu" if tiny else "gpu", "--run_dir", folder / "run", "--output_dir", folder / "pruned"),
    )
    seconds = time.perf_counter() - start
    blocks = json.loads((folder / "pruned" / "prune_report.json").read_text())["blocks"]
    record = {"model": "pruned by best", "seconds": seconds, "seconds_blocks": sum(b["seconds"] for b in blocks)}
    record["peak_gib"] = max(b["peak_memory"] for b in blocks) / 2**30
    dense = folder / "model" if tiny else ROOT / SMOLLM2
    source, length = (str(folder / "text.txt"), 16) if tiny else ("sample:wikipedia", 512)
    text = TextDataModule(source, sequence_length=length, eval_windows=32, batch_size=4)
    return [
        {"model": "dense", "perplexity": perplexity(dense, text)},
        record | {"perplexity": perplexity(folder / "pruned", text)},
    ]


def demo(folder: Path, tiny: bool) -> list[dict[str, Any]]:
    """Run the demo with fewer steps, and return its last logged metrics and its time."""
    steps = str(2 if tiny else STEPS)
    more = tiny_arguments(folder, "demo") if tiny else []
    start = time.perf_counter()
    run_wandazeta(
        *("fit", "-c", "configs/demo.yaml", *more, "--trainer.accelerator", "cpu" if tiny else "gpu"),
        *("--trainer.max_steps", steps, "--trainer.val_check_interval", steps, "--trainer.log_every_n_steps", "1"),
        *("--trainer.enable_progress_bar", "false", "--run_dir", folder / "run"),
    )
    record: dict[str, Any] = {"steps": int(steps), "seconds": time.perf_counter() - start}
    for path in (folder / "run").rglob("metrics.csv"):
        for row in csv.DictReader(path.open()):
            record |= {
                name: float(value) for name, value in row.items() if value and name.startswith(("val/", "train/"))
            }
    return [record]


def main() -> None:
    """Run one of the two and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("best", "demo"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "smollm2", help="where the run goes")
    parser.add_argument("--result", type=Path, help="the result file")
    arguments = parser.parse_args()
    folder, tiny = arguments.folder.absolute(), arguments.device == "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    if tiny:
        write_inputs(folder)
    records = {"best": best, "demo": demo}[arguments.job](folder, tiny)
    print(json.dumps(records, indent=2))
    if arguments.result is not None:
        write(arguments.result, describe(arguments.job, records))


if __name__ == "__main__":
    main()
