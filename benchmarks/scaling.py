"""Seconds and exchanged bytes of one, two and four processes, and what the cost model says to them and to GPUs.

    make samples
    python benchmarks/scaling.py

Measured are, on gloo with one thread a process, in turns and several times: a zeroth-order step of SmolLM2-135M (16
queries shared out, `zo`), and a block of its pruning by Wanda (samples shared out, `prune`). From the run of one
process comes the speed of the cost model (`benchmarks/cost_model.py`), from exchanges of nothing and of a large tensor
its latency and bandwidth; with these it predicts the others, which is what it is worth. Processes that share cores
share their speed. Projected records (`projected: true`) are the same formulas with the figures of `GPUS`, which nobody
has measured here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from collectives import CountBytes
from cost_model import (
    SHAPES,
    Hardware,
    wanda_block_seconds,
    wanda_exchanged_bytes,
    zo_exchanged_bytes,
    zo_seconds,
)
from lightning.pytorch import Callback, Trainer, seed_everything
from records import ROOT, describe, write

RESULT = ROOT / "benchmarks" / "results" / "scaling.json"
MODEL = ROOT / ".cache" / "wandazeta" / "smollm2-135m"
NUM_QUERIES = 16
# prompts of a step and their length; windows of calibration text
BATCH, TOKENS = 2, 32
SAMPLES, WINDOW, PRUNED_BLOCKS = 16, 128, 4
STEPS = 4
# an H100 at 40% of its peak in bfloat16, over NVLink within a node of eight and 400 Gb/s a GPU between nodes
GPUS = {
    8: Hardware(flops=0.4 * 989e12, bandwidth=300e9, latency=30e-6),
    64: Hardware(flops=0.4 * 989e12, bandwidth=40e9, latency=100e-6),
}
GPU_TOKENS, GPU_SAMPLES = 16 * 256, 128 * 2048


class Watch(Callback):
    """Counts bytes and seconds of the steps after the first."""

    def __init__(self, counter: CountBytes) -> None:
        self.counter = counter
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Wait for the others and begin."""
        trainer.strategy.barrier()
        self.counter.counting = trainer.global_step > 0
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """End, unless it was the first."""
        self.counter.counting = False
        self.seconds.append(time.perf_counter() - self.start)


class StopCounting(Callback):
    """Ends the count after the callbacks before it are set up: what follows is the strategy's own."""

    def __init__(self, counter: CountBytes) -> None:
        self.counter = counter

    def setup(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.counter.counting = False


def zo_worker(trainer_options: dict[str, Any], counter: CountBytes) -> dict[str, Any]:
    """Steps of one rank."""
    from wandazeta.datamodules import PromptedClassificationDataModule
    from wandazeta.modules import ZerothOrderModule
    from wandazeta.zeroth_order import ConstantSchedule

    seed_everything(0, verbose=False)
    module = ZerothOrderModule(
        str(MODEL), schedule=ConstantSchedule(NUM_QUERIES), prefix_cache_gib=0, learning_rate=1e-6, query_chunk_size=8
    )
    data = PromptedClassificationDataModule(
        "sample:rotten-tomatoes",
        template="{text} In summary, the movie is",
        options=[" bad", " good"],
        tokenizer=str(MODEL),
        max_length=TOKENS,
        truncate=True,
        batch_size=BATCH,
        num_train=64,
        num_val=8,
        num_test=8,
    )
    watch = Watch(counter)
    trainer = Trainer(**trainer_options, max_steps=STEPS + 1, limit_val_batches=0, callbacks=[watch])
    trainer.fit(module, datamodule=data)
    return {"seconds": median(watch.seconds[1:]), "bytes": counter.bytes / STEPS}


def prune_worker(trainer_options: dict[str, Any], counter: CountBytes) -> dict[str, Any]:
    """Blocks of one rank's pruning; the seconds are the median of all but the first."""
    from wandazeta.callbacks import WandaPPPruneCallback
    from wandazeta.datamodules import TextDataModule
    from wandazeta.modules import ZerothOrderModule

    module = ZerothOrderModule(str(MODEL))
    model: Any = module.backbone
    model.model.layers = model.model.layers[:PRUNED_BLOCKS]
    data = TextDataModule(
        "sample:wikipedia",
        tokenizer=str(MODEL),
        sequence_length=WINDOW,
        num_calibration_samples=SAMPLES,
        batch_size=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        pruning = WandaPPPruneCallback(
            method="wanda", sparsity_pattern="2:4", num_calibration_samples=SAMPLES, output_dir=folder
        )
        trainer = Trainer(**trainer_options, max_steps=0, callbacks=[pruning, StopCounting(counter)])
        counter.counting = True
        trainer.fit(module, datamodule=data)
    assert pruning.report is not None
    seconds = [block.seconds for block in pruning.report.blocks]
    return {"seconds": median(seconds[1:]), "bytes": counter.bytes / PRUNED_BLOCKS}


def exchange_worker() -> dict[str, float]:
    """Seconds of an exchange of nothing, and bytes a second of a large one."""

    def timed(work: Callable[[], Any], repeats: int) -> float:
        seconds = []
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return median(seconds)

    large = torch.zeros(2**22)
    latency = timed(lambda: dist.all_reduce(torch.zeros(1)), 50)
    return {"latency": latency, "bandwidth": large.numel() * 4 / timed(lambda: dist.broadcast(large, src=0), 5)}


def worker(kind: str) -> None:
    """Run as one of the processes that torchrun started; the first prints what it measured."""
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    counter = CountBytes()
    if kind == "exchange":
        dist.init_process_group("gloo")
        result = exchange_worker()
    else:
        options = {"accelerator": "cpu", "devices": size, "strategy": "ddp" if size > 1 else "auto", "max_epochs": -1}
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        options |= dict.fromkeys(quiet, False)
        result = (zo_worker if kind == "zo" else prune_worker)(options, counter)
    if rank == 0:
        sys.stdout.write(f"RESULT {json.dumps(result)}\n")
        sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(kind: str, processes: int) -> dict[str, Any]:
    """What the first of some processes measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(Path(__file__)), "--worker", kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"error: {kind} with {processes} processes failed: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return result


def predicted(job: str, hardware: Hardware, processes: int) -> float:
    """Seconds of the jobs as they are measured here."""
    shape = SHAPES["smollm2-135m"]
    if job == "zo":
        return zo_seconds(shape, hardware, BATCH * TOKENS, NUM_QUERIES, processes)
    return wanda_block_seconds(shape, hardware, SAMPLES * WINDOW, processes, value_bytes=4)


def measured_records(processes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Runs in turns, and the cost model's word on each."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(repeats):
        for count in processes:
            for job in ("zo", "prune"):
                runs.setdefault((job, count), []).append(measure(job, count))
                print(f"{job}, {count}: {runs[job, count][-1]}", file=sys.stderr, flush=True)
    wires = {count: measure("exchange", count) for count in processes if count > 1}
    cores = os.cpu_count() or 1
    records = []
    for (job, count), results in runs.items():
        alone = median(run["seconds"] for run in runs[job, 1])
        flops = predicted(job, Hardware(1.0, 1.0, 0.0), 1) / alone
        wire = wires.get(count, {"latency": 0.0, "bandwidth": 1.0})
        hardware = Hardware(flops * min(1.0, cores / count), **wire)
        records.append(
            {
                "job": job,
                "model": "smollm2-135m",
                "processes": count,
                "gpus": 0,
                "projected": False,
                "seconds": [run["seconds"] for run in results],
                "seconds_predicted": predicted(job, hardware, count),
                "bytes_exchanged": results[0]["bytes"],
                **wire,
            }
        )
    return records


def projected_records() -> list[dict[str, Any]]:
    """The formulas with the figures of `GPUS`: a step of 16 queries on 16 prompts, Wanda's whole pruning."""
    records = []
    for gpus, hardware in GPUS.items():
        for model in ("llama-7b", "llama-70b"):
            shape = SHAPES[model]
            # 70B in 16 bits does not fit into one GPU
            sharded = model == "llama-70b"
            step = zo_seconds(shape, hardware, GPU_TOKENS, NUM_QUERIES, gpus, sharded)
            block = wanda_block_seconds(shape, hardware, GPU_SAMPLES, gpus)
            for job, seconds, exchanged in (
                ("zo", step, zo_exchanged_bytes(NUM_QUERIES)),
                ("prune", block * shape.layers, wanda_exchanged_bytes(shape, 2) * shape.layers),
            ):
                record = {"job": job, "model": model, "processes": gpus, "gpus": gpus, "projected": True}
                records.append(record | {"seconds": seconds, "bytes_exchanged": exchanged, "sharded": sharded})
    return records


def main() -> None:
    """Measure, predict, project, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="the first has to be 1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", choices=("zo", "prune", "exchange"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    if arguments.processes[0] != 1:
        parser.error("Expected argument `--processes` to begin with 1, from which the speed is taken")
    records = measured_records(arguments.processes, arguments.repeats) + projected_records()
    assumed = {gpus: vars(hardware) for gpus, hardware in GPUS.items()}
    write(RESULT, describe("scaling", records, assumed_gpus=assumed))


if __name__ == "__main__":
    main()
