"""Seconds and exchanged bytes of one, two and four processes, measured and predicted by a cost model.

    make samples
    python benchmarks/scaling.py

The script measures, on gloo with one thread per process, several times in alternation: a zeroth-order step of
SmolLM2-135M whose 16 queries are distributed over the ranks (`zo`), and one block of a Wanda pruning whose samples are
distributed over the ranks (`prune`).

The cost model is the first part of this file; docs/scaling.md documents its formulas and tests compare them with real
processes. Its speed is fitted to the run of one process, its latency and bandwidth to an exchange of one value and of
a large tensor. With these it predicts the other runs. Processes that share cores are assumed to share their speed.
Projected records (`projected: true`) come from the same formulas with the GPU figures of `GPUS`; they are not measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from records import RESULTS, ROOT, SMOLLM2, describe, write
from torch import Tensor

BYTES_FP64 = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the LLaMA family.

    Args:
        hidden: Width of the hidden states.
        layers: Decoder blocks.
        intermediate: Width inside the MLP.
        vocabulary: Number of tokens.
        key_value: Width of keys, and of values.
        tied: Whether the head shares its weights with the token embeddings.
    """

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    key_value: int
    tied: bool = False

    @property
    def linear_weights(self) -> int:
        """Number of weights in the Linears of a block."""
        return self.hidden * (2 * self.hidden + 2 * self.key_value + 3 * self.intermediate)

    @property
    def block(self) -> int:
        """Number of values in a block: its Linears and two norms."""
        return self.linear_weights + 2 * self.hidden

    @property
    def table(self) -> int:
        """Number of values in the token embeddings, and in the head."""
        return self.vocabulary * self.hidden

    @property
    def total(self) -> int:
        """Number of values in the model."""
        return self.layers * self.block + self.table * (1 if self.tied else 2) + self.hidden

    @property
    def input_widths(self) -> int:
        """Sum of the input features of the Linears of a block."""
        return 6 * self.hidden + self.intermediate


SHAPES = {
    "smollm2-135m": Shape(576, 30, 1536, 49152, 192, tied=True),
    "llama-7b": Shape(4096, 32, 11008, 32000, 4096),
    "llama-70b": Shape(8192, 80, 28672, 32000, 1024),
}


@dataclass(frozen=True)
class Hardware:
    """Speed of a process and of its connection to the others.

    Args:
        flops: Sustained floating-point operations per second of a process.
        bandwidth: Bytes per second into a process from all others together.
        latency: Seconds of an exchange of one value.
    """

    flops: float
    bandwidth: float
    latency: float


def resident_weights(shape: Shape, value_bytes: int, ranks: int = 1, sharded: bool = False) -> int:
    """Bytes of weights that a rank always holds: all weights, or its shard under ZeRO stage 3."""
    return ceil(shape.total / (ranks if sharded else 1)) * value_bytes


def gathered_weights(shape: Shape, value_bytes: int) -> int:
    """Peak bytes of gathered weights under ZeRO stage 3: two blocks, and the token embeddings or the head."""
    return (2 * shape.block + shape.table) * value_bytes


def adapter_bytes(num_parameters: int, copies: int, states: int = 0) -> int:
    """Peak bytes of the vectors of a step: the trained vector, the states of its update, and temporaries.

    The temporaries are the perturbed copies and one direction while losses are evaluated, and the gradient, the new
    vector and the new states during the update.

    Args:
        num_parameters: Number of trained values, in float32.
        copies: Perturbed copies in one forward pass, at most `query_chunk_size`.
        states: State vectors of the update: 2 for `RAdaZOUpdate`, 0 for `SGDUpdate`.
    """
    return 4 * num_parameters * (1 + states + max(copies + 1, 2 + states))


def activation_bytes(shape: Shape, tokens: int, value_bytes: int) -> int:
    """Peak bytes of activations of a forward pass without gradients: 2 hidden states and 3 tensors of the MLP's width.

    Args:
        shape: Sizes of the model.
        tokens: Number of tokens in one forward pass, over all perturbed copies.
        value_bytes: Bytes per value.
    """
    return tokens * value_bytes * (2 * shape.hidden + 3 * shape.intermediate)


def zo_points(num_queries: int) -> int:
    """Number of forward passes of a two-sided step."""
    return 2 * num_queries


def zo_exchanged_bytes(num_queries: int) -> int:
    """Bytes that a rank sends in a step: losses, a weight, twelve check values and the gradient of the anchor."""
    return BYTES_FP64 * (zo_points(num_queries) + 1 + 12) + 4


def zo_seconds(
    shape: Shape,
    hardware: Hardware,
    tokens: int,
    num_queries: int,
    ranks: int,
    sharded: bool = False,
    value_bytes: int = 2,
) -> float:
    """Seconds of a two-sided step with `parallel="queries"`: forward passes of the busiest rank, plus the exchange.

    Under ZeRO stage 3 the weights are gathered during the forward passes; the longer of the two counts.

    Args:
        shape: Sizes of the model.
        hardware: Speed of each process.
        tokens: Number of tokens in the batch.
        num_queries: Number of queries in a step.
        ranks: Number of processes.
        sharded: Whether the weights are sharded.
        value_bytes: Bytes per weight.
    """
    forwards = ceil(zo_points(num_queries) / ranks)
    compute = forwards * 2 * shape.layers * shape.block * tokens / hardware.flops
    arriving = shape.total * value_bytes * (ranks - 1) / ranks / hardware.bandwidth if sharded else 0.0
    exchange = hardware.latency + zo_exchanged_bytes(num_queries) / hardware.bandwidth if ranks > 1 else 0.0
    return max(compute, arriving) + exchange


def wanda_exchanged_bytes(shape: Shape, value_bytes: int) -> int:
    """Bytes that a rank sends for one block: sums of squared inputs, and the pruned weights."""
    return BYTES_FP64 * shape.input_widths + value_bytes * shape.linear_weights


def wanda_block_seconds(shape: Shape, hardware: Hardware, tokens: int, ranks: int, value_bytes: int = 2) -> float:
    """Seconds of one block: two forward passes of the rank's samples, plus the exchange."""
    compute = 2 * 2 * shape.block * tokens / ranks / hardware.flops
    if ranks == 1:
        return compute
    # for each of the 7 Linears: sum and count of its statistics, and its weights
    return compute + 3 * 7 * hardware.latency + wanda_exchanged_bytes(shape, value_bytes) / hardware.bandwidth


RESULT = RESULTS / "scaling.json"
MODEL = ROOT / SMOLLM2
NUM_QUERIES = 16
# prompts per step and their length; number and length of calibration windows
BATCH, TOKENS = 2, 32
SAMPLES, WINDOW, PRUNED_BLOCKS = 16, 128, 4
STEPS = 4
# an H100 at 40% of its bfloat16 peak, with NVLink within a node of eight and 400 Gb/s per GPU between nodes
GPUS = {
    8: Hardware(flops=0.4 * 989e12, bandwidth=300e9, latency=30e-6),
    64: Hardware(flops=0.4 * 989e12, bandwidth=40e9, latency=100e-6),
}
GPU_TOKENS, GPU_SAMPLES = 16 * 256, 128 * 2048


class CountBytes:
    """Count the bytes of tensors that this process passes to `torch.distributed` while `counting` is set.

    DDP's own reducer is not counted. In a step without gradients it exchanges one value, the anchor's gradient.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.counting = False
        for name in ("all_reduce", "broadcast"):
            self._wrap(name, lambda tensor: [tensor])
        self._wrap("_broadcast_coalesced", lambda group, tensors: tensors)

    def _wrap(self, name: str, tensors_of: Callable[..., list[Tensor]]) -> None:
        original = getattr(dist, name)
        take = tensors_of.__code__.co_argcount

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.counting:
                self.bytes += sum(t.numel() * t.element_size() for t in tensors_of(*args[:take]))
            return original(*args, **kwargs)

        setattr(dist, name, counted)


class Watch(Callback):
    """Count bytes and seconds of all training steps but the first."""

    def __init__(self, counter: CountBytes) -> None:
        self.counter = counter
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Wait for the other ranks and start the clock."""
        trainer.strategy.barrier()
        self.counter.counting = trainer.global_step > 0
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop the clock."""
        self.counter.counting = False
        self.seconds.append(time.perf_counter() - self.start)


class StopCounting(Callback):
    """Stop counting once the callbacks listed before this one are set up: what follows is exchanged by the strategy."""

    def __init__(self, counter: CountBytes) -> None:
        self.counter = counter

    def setup(self, *_: Any, **__: Any) -> None:
        """Stop counting."""
        self.counter.counting = False


def zo_worker(trainer_options: dict[str, Any], counter: CountBytes) -> dict[str, Any]:
    """Run zeroth-order steps on one rank."""
    from wandazeta.datamodules import PromptedClassificationDataModule
    from wandazeta.modules import ZerothOrderModule
    from wandazeta.zeroth_order import ConstantSchedule

    seed_everything(0, verbose=False)
    module = ZerothOrderModule(
        str(MODEL), schedule=ConstantSchedule(NUM_QUERIES), prefix_cache_gib=0.0, learning_rate=1e-6, query_chunk_size=8
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
    """Prune a few blocks on one rank; the seconds are the median over all blocks but the first."""
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
    """Measure the seconds of an exchange of one value, and the bytes per second of a large one."""

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
    """Run as one of the processes that torchrun started; rank 0 prints the result."""
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
    """Start the processes and return the result of rank 0."""
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
    """Predicted seconds of a job."""
    shape = SHAPES["smollm2-135m"]
    if job == "zo":
        return zo_seconds(shape, hardware, BATCH * TOKENS, NUM_QUERIES, processes)
    return wanda_block_seconds(shape, hardware, SAMPLES * WINDOW, processes, value_bytes=4)


def measured_records(processes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Measure all jobs in alternation, and add the prediction of the cost model to each."""
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
    """Apply the formulas to `GPUS`: one step of 16 queries on 16 prompts, and a whole Wanda pruning."""
    records = []
    for gpus, hardware in GPUS.items():
        for model in ("llama-7b", "llama-70b"):
            shape = SHAPES[model]
            # 70B in 16 bits does not fit on one GPU
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
    """Measure, predict and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes; the first must be 1"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", choices=("zo", "prune", "exchange"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        return
    if arguments.processes[0] != 1:
        parser.error("Expected argument `--processes` to start with 1, whose run gives the speed of the cost model")
    records = measured_records(arguments.processes, arguments.repeats) + projected_records()
    assumed = {gpus: vars(hardware) for gpus, hardware in GPUS.items()}
    write(RESULT, describe("scaling", records, assumed_gpus=assumed))


if __name__ == "__main__":
    main()
