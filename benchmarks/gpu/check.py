"""Check this project on a GPU within minutes: correctness, time and memory, as one JSON file and one page.

    make gpu-check
    python benchmarks/gpu/check.py --steps prune zo
    python benchmarks/gpu/check.py --device cpu

Without a GPU, tiny shapes run on the CPU: that checks the steps themselves, and the figures mean nothing. Every step is
a process with its own time limit and log; one that fails never stops the next. All together stop after `--minutes`.
Steps that are named replace their results of an earlier call in the same folder, and the others keep theirs.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from records import ROOT, describe, write
from rich.console import Console
from tables import rows

HERE = Path("benchmarks/gpu")

console = Console(highlight=False)


@dataclass(frozen=True)
class Call:
    """Where and how the steps run.

    Args:
        device: `cuda` or `cpu`; the latter with tiny shapes.
        folder: Folder of results, logs and runs.
    """

    device: str
    folder: Path

    @property
    def is_tiny(self) -> bool:
        """Whether shapes are tiny."""
        return self.device == "cpu"

    def shape(self, *, blocks: int | None = None) -> list[str]:
        """Return the arguments that choose device and shape, optionally with fewer blocks."""
        few = ["--blocks", str(blocks)] if blocks and not self.is_tiny else []
        return ["--device", self.device, "--shape", "tiny" if self.is_tiny else "llama-7b", *few]


@dataclass(frozen=True)
class Step:
    """One step of the check.

    Args:
        title: What it says, for the page.
        limit: Seconds after which it is stopped.
        command: Makes the command line of a script of `benchmarks/`.
        needs_gpu: Whether it can run on a GPU only.
    """

    title: str
    limit: int
    command: Callable[[Call], list[str]]
    needs_gpu: bool = False


STEPS: dict[str, Step] = {
    "correctness": Step(
        "the same masks, losses and trajectories as on the CPU",
        60,
        lambda call: [f"{HERE}/correctness.py", "--device", call.device],
    ),
    "prune": Step(
        "pruning, phase by phase, and the peak of every block",
        250,
        lambda call: ["benchmarks/prune_gpu.py", *call.shape()],
    ),
    "prune_home_cpu": Step(
        "pruning with the other blocks in CPU memory",
        60,
        lambda call: ["benchmarks/prune_gpu.py", *call.shape(blocks=4), "--home", "cpu", "--methods", "wanda++"],
    ),
    "block_steps": Step(
        "optimizer steps of a block, by fused kernels and by torch",
        30,
        lambda call: [f"{HERE}/block_steps.py", *call.shape()],
    ),
    "zo": Step(
        "zeroth-order steps, beside their forward passes",
        60,
        lambda call: ["benchmarks/zo_gpu.py", *call.shape()],
    ),
    "kernels": Step(
        "2:4 kernels beside dense ones, eagerly and in CUDA graphs",
        45,
        lambda call: [f"{HERE}/sparse_kernels.py"],
        needs_gpu=True,
    ),
    "peer": Step(
        "Wanda and SparseGPT beside llm-compressor",
        120,
        lambda call: [f"{HERE}/peer.py", *call.shape(blocks=2)],
    ),
    "strategies": Step(
        "fine-tuning under every strategy of configs/trainer, on all GPUs",
        120,
        lambda call: [f"{HERE}/strategies.py", "--device", call.device, "--folder", str(call.folder / "strategies")],
    ),
    "best": Step(
        "SmolLM2-135M pruned with the preset best, and its perplexity",
        150,
        lambda call: [f"{HERE}/smollm2.py", "best", "--device", call.device, "--folder", str(call.folder / "best")],
    ),
    "demo": Step(
        "the demo with fewer steps",
        100,
        lambda call: [f"{HERE}/smollm2.py", "demo", "--device", call.device, "--folder", str(call.folder / "demo")],
    ),
}


def run_step(name: str, call: Call, seconds: float) -> dict[str, Any]:
    """Run a step in a process of its own; returns its record.

    Args:
        name: The step.
        call: Where to run.
        seconds: Time that is left for all steps.
    """
    step = STEPS[name]
    record: dict[str, Any] = {"step": name, "title": step.title, "seconds": 0.0, "records": []}
    if step.needs_gpu and call.is_tiny:
        return record | {"status": "needs a GPU"}
    # tiny shapes take little work, but other processes may slow down a CPU several times
    limit = min(step.limit * (5 if call.is_tiny else 1), seconds)
    if limit < 1:
        return record | {"status": "no time left"}
    result, log = call.folder / "results" / f"{name}.json", call.folder / "logs" / f"{name}.log"
    result.unlink(missing_ok=True)
    # a run would resume there, and do nothing
    shutil.rmtree(call.folder / name, ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *step.command(call), "--result", str(result)]
    # tiny shapes gain nothing from threads, which take long where other programs use the cores
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if call.is_tiny else {})
    start = time.perf_counter()
    with log.open("wb") as output:
        # a session of its own, so that the processes that a step has started end with it
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            status = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            _end(process)
    record |= {"status": status, "seconds": time.perf_counter() - start}
    if result.exists():
        content = json.loads(result.read_text())
        record |= {key: content[key] for key in content.keys() - {"name", "versions", "hardware", "commit", "date"}}
    if status == "failed":
        lines = log.read_text(errors="replace").strip().splitlines()
        record["error"] = lines[-1][:300] if lines else "it printed nothing"
    return record


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill all processes that a step has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def page(content: dict[str, Any]) -> str:
    """Return the results as a page: the steps, and a table of the figures of each."""
    hardware, versions = content["hardware"], content["versions"]
    parts = [
        f"# {hardware['gpu'] or 'CPU, tiny shapes'}",
        f"torch {versions['torch']}, transformers {versions['transformers']}, Python {versions['python']}, "
        f"{hardware['gpus']} GPUs, {hardware['cores']} cores; commit {content['commit']}, {content['date']}",
        rows(
            ["step", "what", "seconds", "result"],
            [[r["step"], r["title"], f"{r['seconds']:.0f}", _status(r)] for r in content["records"]],
        ),
    ]
    for step in content["records"]:
        if step["records"]:
            parts += [f"## {step['step']}", _figures(step["records"])]
    return "\n\n".join(parts) + "\n"


def _status(record: dict[str, Any]) -> str:
    return f"{record['status']}: {record['error']}" if "error" in record else record["status"]


def _figures(records: list[dict[str, Any]]) -> str:
    """Return a table of the values of records, without those that are all missing."""
    names = [n for n in dict.fromkeys(n for r in records for n in r) if any(r.get(n) is not None for r in records)]
    return rows(names, [[_cell(record.get(name)) for name in names] for record in records])


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return "" if value is None else str(value)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="by default cuda if there is one")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gpu-check", help="where results go")
    parser.add_argument("--minutes", type=float, help="time for all steps together; 10, and 30 without a GPU")
    arguments = parser.parse_args()
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    arguments.minutes = arguments.minutes or (10.0 if arguments.device == "cuda" else 30.0)
    return arguments


def main() -> None:
    """Run the steps; the files are written after each of them."""
    arguments = parse()
    call = Call(arguments.device, arguments.folder.absolute())
    if call.is_tiny:
        needed = [name for name, step in STEPS.items() if step.needs_gpu]
        needed = ", ".join([*needed, "the strategies of DeepSpeed"])
        console.print(f"On the CPU, with tiny shapes. What needs a GPU is left out: {needed}.", soft_wrap=True)
    target = call.folder / "gpu_check.json"
    earlier = json.loads(target.read_text())["records"] if target.exists() else []
    found = {record["step"]: record for record in earlier}
    end = time.monotonic() + 60 * arguments.minutes
    for name in arguments.steps:
        found[name] = run_step(name, call, end - time.monotonic())
        console.print(f"{name}: {_status(found[name])}, {found[name]['seconds']:.0f} s", soft_wrap=True)
        content = describe("gpu_check", [found[step] for step in STEPS if step in found])
        write(target, content)
        target.with_suffix(".md").write_text(page(content))
    console.print(f"Send in gpu_check.json and gpu_check.md of '{call.folder}'", soft_wrap=True)
    if any(found[name]["status"] not in ("ok", "needs a GPU") for name in arguments.steps):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
