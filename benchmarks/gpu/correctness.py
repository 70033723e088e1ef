"""Compare a device with the CPU: prunings, the parts of SparseGPT, and trajectories of zeroth-order training.

On a GPU, the fused optimizer steps of a block are also compared with those of torch, and prunings with CUDA graphs with
prunings without, whose bits they repeat.

    python benchmarks/gpu/correctness.py --device cuda

The model is a random LLaMA with two blocks in float32. The order of sums differs between devices, so that nearly equal
scores may change places; the bounds are what that explains. Exits with 1 if one of them does not hold.
"""

import argparse
import copy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import zo_gpu
from block_steps import ALGORITHMS, Block
from prune_gpu import SHAPES, random_model
from records import describe, write

from wandazeta.pruning import PruneOptions, prune_model, pruner
from wandazeta.pruning.method.sparsegpt import sparsegpt
from wandazeta.pruning.method.statistics import InputStatistics
from wandazeta.pruning.pattern import SparsityPattern
from wandazeta.zeroth_order import Directions, directions_of_step

CPU = torch.device("cpu")
# method -> smallest share of equal mask entries, largest relative difference of the loss of the last block
BOUNDS = {
    "magnitude": (1.0, None),
    "wanda": (0.9999, 1e-3),
    "rgs": (0.9999, 1e-3),
    "wanda++": (0.999, 1e-3),
    "sparsegpt": (0.98, 2e-2),
}
# largest relative difference of Gram matrices; that of a float32 product is about 2e-6
GRAM = 1e-5
# a layer solved from one Gram matrix: smallest share of equal mask entries, largest relative difference of the loss
SOLVE_MASK, SOLVE_LOSS = 0.999, 1e-3
# methods whose calls are captured as graphs
GRAPHED = ("rgs", "wanda++", "tuned-ro")
# largest distance of the trained vectors, relative to how far the steps have moved them
TRAJECTORY, STEPS = 1e-2, 10
# largest distance of float32 masters after fused steps, relative to how far the steps have moved them: rounding
FUSED = 1e-4


def prune(model: nn.Module, ids: torch.Tensor, options: PruneOptions, device: torch.device) -> tuple[Any, float | None]:
    """Prune a model on a device; returns where its weights were kept, and the loss of the last block."""
    model = model.to(device)
    batches = [{"input_ids": row.to(device)} for row in ids.split(1)]
    report = prune_model(model, lambda batch: model(**batch, use_cache=False), batches, options, device=device)
    layers: Any = model.model.layers  # type: ignore[union-attr]
    kept = [linear.weight.cpu() != 0 for linear in layers.modules() if isinstance(linear, nn.Linear)]
    return torch.cat([mask.flatten() for mask in kept]), report.blocks[-1].loss_after


def compare_pruning(method: str, device: torch.device) -> dict[str, Any]:
    """Return the record of one method."""
    torch.manual_seed(0)
    model = random_model(SHAPES["tiny"], CPU, CPU).float()
    ids = torch.randint(SHAPES["tiny"].vocabulary, (8, 32))
    options = PruneOptions.from_dict({"method": method})
    (expected, loss), (found, other) = (prune(copy.deepcopy(model), ids, options, place) for place in (CPU, device))
    equal, change = float((expected == found).double().mean()), None
    if loss is not None and other is not None:
        change = abs(other - loss) / loss
    least, most = BOUNDS[method]
    passed = equal >= least and (most is None or (change is not None and change <= most))
    record = {"what": f"{method}: masks and loss", "equal_entries": equal, "least": least}
    return record | {"difference": change, "most": most, "passed": passed}


def compare_gram(device: torch.device) -> dict[str, Any]:
    """Return the record of the Gram matrix of inputs in bfloat16."""
    torch.manual_seed(0)
    layer, x = nn.Linear(1024, 1).bfloat16(), torch.randn(1, 2048, 1024).bfloat16()
    grams = []
    for place in (CPU, device):
        statistics = InputStatistics({"layer": layer.to(place)}, with_gram=True)
        with statistics.collect(), statistics.sample():
            layer(x.to(place))
        grams.append(statistics.gram_groups()[0][0].cpu())
    difference = float((grams[1] - grams[0]).norm() / grams[0].norm())
    record = {"what": "Gram matrix of inputs in bfloat16", "difference": difference, "most": GRAM}
    return record | {"passed": difference <= GRAM}


def compare_solve(pattern: SparsityPattern, device: torch.device) -> dict[str, Any]:
    """Return the record of SparseGPT's solve of one layer."""
    torch.manual_seed(0)
    x, weight = torch.randn(2048, 640) @ torch.randn(640, 640), torch.randn(333, 640)
    (expected, kept), (found, other) = (
        [tensor.cpu() for tensor in sparsegpt([weight.to(place)], (x.t() @ x).to(place), pattern)[0]]
        for place in (CPU, device)
    )
    losses = [float((x @ (solved - weight).t()).square().mean()) for solved in (expected, found)]
    equal, change = float((kept == other).double().mean()), abs(losses[1] - losses[0]) / losses[0]
    record = {"what": f"SparseGPT's solve, {pattern.label}", "equal_entries": equal, "least": SOLVE_MASK}
    record |= {"difference": change, "most": SOLVE_LOSS}
    return record | {"passed": equal >= SOLVE_MASK and change <= SOLVE_LOSS}


class StepsAlongCPUDirections(zo_gpu.Steps):
    """Steps whose directions are those of the CPU on every device."""

    def directions(self) -> Directions:
        """Return the directions of the next step."""
        theta = self.vector.theta
        on_cpu = directions_of_step(theta.cpu(), 0, self.done)
        return lambda query: on_cpu(query).to(theta.device)


def compare_graphs(method: str, device: torch.device) -> dict[str, Any]:
    """Return the record of a method with CUDA graphs; two prunings without tell what this device repeats exactly."""
    torch.manual_seed(0)
    model = random_model(SHAPES["tiny"], CPU, CPU)
    ids = torch.randint(SHAPES["tiny"].vocabulary, (16, 32))
    options = PruneOptions.from_dict({"method": method})
    weights, losses = [], []
    with patch.object(torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=torch.cuda.CUDAGraph.replay) as replay:
        for backend in (lambda device: None, lambda device: None, pruner.graph_backend):
            pruned = copy.deepcopy(model)
            with patch.object(pruner, "graph_backend", backend):
                losses.append(prune(pruned, ids, options, device)[1])
            weights.append(
                torch.cat([parameter.detach().cpu().double().flatten() for parameter in pruned.parameters()])
            )
    eager, graphed = (float((other - weights[0]).abs().max()) for other in weights[1:])
    record = {"what": f"{method}: weights with CUDA graphs", "replays": replay.call_count, "losses": losses}
    record |= {"difference": graphed, "most": eager}
    return record | {"passed": graphed <= eager and replay.call_count > 0}


def compare_trajectory(device: torch.device) -> dict[str, Any]:
    """Return the record of zeroth-order steps."""
    thetas: list[torch.Tensor] = []
    for place in (CPU, device):
        torch.manual_seed(0)
        model = random_model(SHAPES["tiny"], CPU, CPU).float().requires_grad_(False).to(place)
        batch = zo_gpu.random_batch(SHAPES["tiny"].vocabulary, 4, 16, place)
        steps = StepsAlongCPUDirections(model, batch, 8)
        start = steps.vector.theta.cpu().double()
        for _ in range(STEPS):
            steps.run(4)
        thetas.append(steps.vector.theta.cpu().double())
    difference = float((thetas[1] - thetas[0]).norm() / (thetas[0] - start).norm())
    record = {"what": f"{STEPS} zeroth-order steps: trained values", "difference": difference, "most": TRAJECTORY}
    return record | {"passed": difference <= TRAJECTORY}


def compare_fused_steps(algorithm: str, device: torch.device) -> dict[str, Any]:
    """Return the record of fused optimizer steps beside those of torch on the same device."""
    masters: list[torch.Tensor] = []
    for fused in (False, True):
        block = Block(SHAPES["tiny"], device)
        start = torch.cat([layer.weight.detach().float().flatten() for layer in block.layers.values()])
        optimizer = block.optimizer(algorithm, fused, STEPS)
        for _ in range(STEPS):
            block.step(optimizer)
        masters.append(torch.cat([values.detach().flatten() for values in optimizer._master.masters.values()]))
    difference = float((masters[1] - masters[0]).norm() / (masters[0] - start).norm())
    record = {"what": f"{STEPS} fused steps of {algorithm}: masters", "difference": difference, "most": FUSED}
    return record | {"passed": difference <= FUSED}


def main() -> None:
    """Compare, and write the result file after each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--result", type=Path, help="the result file")
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []

    def add(record: dict[str, Any]) -> None:
        records.append(record)
        print(record)
        if arguments.result is not None:
            write(arguments.result, describe("correctness", records))

    for method in BOUNDS:
        add(compare_pruning(method, arguments.device))
    add(compare_gram(arguments.device))
    for pattern in (SparsityPattern("2:4"), SparsityPattern("4:8"), SparsityPattern(sparsity=0.5)):
        add(compare_solve(pattern, arguments.device))
    if arguments.device.type == "cuda":
        for method in GRAPHED:
            add(compare_graphs(method, arguments.device))
    add(compare_trajectory(arguments.device))
    if arguments.device.type == "cuda":
        for algorithm in ALGORITHMS:
            add(compare_fused_steps(algorithm, arguments.device))
    failed = [record["what"] for record in records if not record["passed"]]
    if failed:
        raise SystemExit(f"error: outside the bounds: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
