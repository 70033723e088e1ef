"""Compare a device with the CPU: masks and losses of prunings, and trajectories of zeroth-order training.

On a GPU, prunings with CUDA graphs are also compared with prunings without, whose bits they repeat.

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
from prune_gpu import SHAPES, random_model
from records import describe, write

from wandazeta.pruning import PruneOptions, prune_model, pruner

CPU = torch.device("cpu")
# method -> smallest share of equal mask entries, largest relative difference of the loss of the last block
BOUNDS = {
    "magnitude": (1.0, None),
    "wanda": (0.9999, 1e-3),
    "rgs": (0.9999, 1e-3),
    "wanda++": (0.999, 1e-3),
    "sparsegpt": (0.98, 2e-2),
}
# methods whose calls are captured as graphs
GRAPHED = ("rgs", "wanda++", "tuned-ro")
# largest distance of the trained vectors, relative to how far the steps have moved them
TRAJECTORY, STEPS = 1e-2, 10


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
        steps = zo_gpu.Steps(model, batch, 8)
        start = steps.vector.theta.cpu().double()
        for _ in range(STEPS):
            steps.run(4)
        thetas.append(steps.vector.theta.cpu().double())
    difference = float((thetas[1] - thetas[0]).norm() / (thetas[0] - start).norm())
    record = {"what": f"{STEPS} zeroth-order steps: trained values", "difference": difference, "most": TRAJECTORY}
    return record | {"passed": difference <= TRAJECTORY}


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
    if arguments.device.type == "cuda":
        for method in GRAPHED:
            add(compare_graphs(method, arguments.device))
    add(compare_trajectory(arguments.device))
    failed = [record["what"] for record in records if not record["passed"]]
    if failed:
        raise SystemExit(f"error: outside the bounds: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
