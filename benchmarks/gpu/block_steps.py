"""Time the optimizer steps of one block, and the sums of its squared gradients, by fused kernels and by torch.

    python benchmarks/gpu/block_steps.py
    python benchmarks/gpu/block_steps.py --device cpu --shape tiny

The weights and gradients are those of a pruned LLaMA block in bfloat16. A step goes from 16-bit gradients to 16-bit
weights, which are masked after AdamW, as in the optimisation that tunes itself, and not after RMSprop, as in Wanda++.
Bandwidth counts what one pass over everything would read and write. Without a GPU, torch alone is timed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from prune_gpu import SHAPES, Shape
from records import describe, write

from wandazeta.pruning.method.masks import group_mask
from wandazeta.pruning.method.optimizer import (
    BlockOptimizer,
    FusedBlockOptimizer,
    MasterWeights,
    TorchBlockOptimizer,
    load_kernels,
)
from wandazeta.utilities.ranks import Ranks

# whether steps apply the masks
ALGORITHMS = {"rmsprop": False, "adamw": True}
RATE = 1e-4
WARM_UP, REPEATS = 3, 10


class Block:
    """The Linears of a LLaMA block in bfloat16, with random weights and gradients, pruned to 2:4.

    Args:
        shape: The sizes.
        device: Where they are.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        self.layers: dict[str, nn.Linear] = {}
        for name, (rows, columns) in shape.linears.items():
            self.layers[name] = nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)
            nn.init.normal_(self.layers[name].weight, std=0.02)
        weights = {name: layer.weight for name, layer in self.layers.items()}
        self.gradients = {name: torch.randn_like(weight) for name, weight in weights.items()}
        self.masks = {name: group_mask(weight.detach().float().abs(), 2, 4) for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.detach().mul_(self.masks[name])
        self.num_values = sum(weight.numel() for weight in weights.values())

    def optimizer(self, algorithm: Any, fused: bool, num_steps: int) -> BlockOptimizer:
        """Make an optimizer from the current weights; raises if the kernels are asked for and cannot be used."""
        master, ranks = MasterWeights(self.layers), Ranks()
        rates, factors = [RATE] * len(self.layers), [1.0] * num_steps
        masks = self.masks if ALGORITHMS[algorithm] else {}
        if not fused:
            return TorchBlockOptimizer(master, algorithm, rates, factors, ranks, masks)
        kernels = load_kernels(master.weights.values())
        if kernels is None:
            raise SystemExit("error: Expected kernels of Triton for this device, but they cannot be used")
        return FusedBlockOptimizer(kernels, master, algorithm, rates, factors, ranks, masks)

    def step(self, optimizer: BlockOptimizer) -> None:
        """Take a step with the gradients as if a backward pass had just computed them."""
        optimizer.take_gradients([self.gradients[name] for name in self.layers], num_values=1)
        optimizer.step()


def milliseconds(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the median times of the device and of the host."""
    times, host_times = [], []
    for _ in range(WARM_UP + REPEATS):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            begin.record()
            work()
            end.record()
            host_times.append(1e3 * (time.perf_counter() - start))
            torch.cuda.synchronize(device)
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
            host_times.append(times[-1])
    return statistics.median(times[WARM_UP:]), statistics.median(host_times[WARM_UP:])


def add_squares(block: Block, totals: dict[str, Tensor], fused: bool) -> None:
    """Add the squares of all gradients to their sums, as `regional_gradients` does."""
    kernels = load_kernels(layer.weight for layer in block.layers.values()) if fused else None
    for name, gradient in block.gradients.items():
        if kernels is not None:
            kernels.add_square_(totals[name], gradient)
        else:
            copy = gradient.float()
            totals[name].addcmul_(copy, copy)


def measure(block: Block, device: torch.device, fused: bool) -> list[dict[str, Any]]:
    """Return the records of one implementation."""
    records = []

    def add(what: str, bytes_per_value: int, work: Callable[[], object]) -> None:
        time_ms, host_ms = milliseconds(work, device)
        record = {"what": what, "fused": fused, "ms": time_ms, "host_ms": host_ms}
        records.append(record | {"gb_per_s": bytes_per_value * block.num_values / time_ms / 1e6})

    for algorithm, masked in ALGORITHMS.items():
        optimizer = block.optimizer(algorithm, fused, WARM_UP + REPEATS)
        # 16-bit gradient and weight, master and moments read and written, mask
        size = 2 + 2 + 8 + (8 if algorithm == "rmsprop" else 16) + masked
        add(f"{algorithm}{' with masks' if masked else ''}", size, lambda o=optimizer: block.step(o))
        optimizer.close()
    totals = {name: torch.zeros_like(gradient, dtype=torch.float32) for name, gradient in block.gradients.items()}
    add("squares of gradients", 2 + 8, lambda: add_squares(block, totals, fused))
    return records


def main() -> None:
    """Measure; the result file is written after each implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--result", type=Path, help="the result file")
    arguments = parser.parse_args()
    block = Block(SHAPES[arguments.shape], arguments.device)
    records: list[dict[str, Any]] = []
    for fused in (False, True) if arguments.device.type == "cuda" else (False,):
        records += ({"model": arguments.shape} | record for record in measure(block, arguments.device, fused))
        if arguments.result is not None:
            write(arguments.result, describe(arguments.result.stem, records))
    for record in records:
        print(record)


if __name__ == "__main__":
    main()
