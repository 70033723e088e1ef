"""Zeroth-order steps on one GPU for a model of the shape of LLaMA-7B, dense and on 2:4 kernels where those are faster.

    python benchmarks/zo_gpu.py
    python benchmarks/zo_gpu.py --device cpu --shape tiny

The second line is a smoke test. The weights are random bfloat16, pruned to 2:4 by magnitude in both cases, so that both
models compute the same. A step is that of `ZerothOrderModule` without the trainer: prompts of equal length with two
answers, tensor-train adapters in every block, two-sided queries, the mean over the queries, plain SGD. Tokens are
counted over all forward passes of a step; the share of the peak counts the operations of the dense weights over the
card's dense peak in both cases.

Steps alternate with their bare forward passes: the same rows through the same weights, without adapters and without the
estimator, as many copies of the batch in each pass. On a GPU, the step's forward passes are CUDA graphs, and the bare
ones are not. The ratio is that of each step to the forward passes next to it.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from prune_gpu import PEAKS, SHAPES, random_model
from records import RESULTS, describe, write
from rich.console import Console
from rich.table import Table
from tables import step_ratio
from torch import Tensor, nn

from wandazeta.adapters import AdapterVector, TensorTrainAdapters
from wandazeta.pruning.export.semi_structured import to_semi_structured
from wandazeta.pruning.method.masks import group_mask, zero_where_false
from wandazeta.scoring.graphed_losses import GraphedLosses
from wandazeta.scoring.scorer import Prepared, Scorer
from wandazeta.utilities.graphs import graph_backend
from wandazeta.utilities.memory import peak_memory
from wandazeta.zeroth_order import Directions, TwoSided, directions_of_step, projected_gradients

RESULT = RESULTS / "zo_gpu.json"
EPSILON = 3e-3
# rounds until kernels are chosen and graphs are captured
WARMUP_ROUNDS = 3
LEARNING_RATE = 1e-4

console = Console()


class Forwards:
    """The forward passes of a step, by a model without adapters.

    Args:
        model: The model.
        batch: Prompts with answer options.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.scorer = Scorer(model)
        self.prepared: Prepared = self.scorer.prepare(batch)

    @torch.no_grad()
    def run(self, num_queries: int, chunk_size: int) -> None:
        """Run the forward passes and synchronise the device.

        Args:
            num_queries: Queries of the step.
            chunk_size: Copies of the batch in one forward pass.
        """
        num_points = TwoSided(EPSILON).num_points(num_queries)
        for start in range(0, num_points, chunk_size):
            losses = self.scorer.option_scores(self.prepared, min(chunk_size, num_points - start)).values
        synchronize(losses.device)


class Steps:
    """Training steps of a model with adapters on one batch.

    Args:
        model: The frozen model.
        batch: Prompts with answer options.
        chunk_size: Perturbed copies in one forward pass.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], chunk_size: int) -> None:
        self.vector: AdapterVector = TensorTrainAdapters().insert(model, 0)
        self.vector.to(batch["input_ids"].device)
        self.scorer = Scorer(model)
        self.prepared: Prepared = self.scorer.prepare(batch)
        self.losses = GraphedLosses(self.scorer, self.vector.use, graph_backend(batch["input_ids"].device))
        self.estimator = TwoSided(EPSILON)
        self.chunk_size = chunk_size
        self.done = 0

    def directions(self) -> Directions:
        """Return the directions of the next step."""
        return directions_of_step(self.vector.theta, 0, self.done)

    @torch.no_grad()
    def run(self, num_queries: int) -> None:
        """Take one step and synchronise the device."""
        theta = self.vector.theta
        directions = self.directions()
        points = range(self.estimator.num_points(num_queries))
        losses = partial(self.losses, prepared=self.prepared)
        found = self.estimator.evaluate(losses, theta, directions, points, self.chunk_size)
        self.chunk_size = found.chunk_size
        slopes = projected_gradients(self.estimator.slopes(found.values_VP))
        gradient = self.estimator.gradient(theta, slopes, directions)
        if gradient is not None:
            theta.sub_(gradient, alpha=LEARNING_RATE)
        self.done += 1
        synchronize(theta.device)


def synchronize(device: torch.device) -> None:
    """Wait for the queued work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prune_by_magnitude(model: nn.Module) -> None:
    """Set the two smaller of every four weights in the blocks' Linears to zero."""
    blocks: Any = model.model.layers  # type: ignore[union-attr]
    for linear in blocks.modules():
        if isinstance(linear, nn.Linear):
            zero_where_false(linear.weight, group_mask(linear.weight.detach().abs().float(), 2, 4))


def random_batch(vocabulary: int, batch: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Return random prompts of equal length with two answers."""
    ids = torch.randint(vocabulary, (batch, tokens)).to(device)
    options = torch.tensor([[3], [5]], device=device)
    labels = torch.arange(batch, device=device) % 2
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": labels}
    return data | {"option_ids": options, "option_mask": torch.ones_like(options, dtype=torch.bool)}


def share_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model with the same parameters and buffers, not copies of them."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def alternate(runs: Sequence[Callable[[], None]], times: int) -> list[list[float]]:
    """Measure the seconds of functions in turn, after some rounds.

    Args:
        runs: The functions.
        times: Measured rounds.

    Returns:
        The seconds of each function.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(times + WARMUP_ROUNDS):
        for run, measured in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            measured.append(time.perf_counter() - start)
    return [measured[WARMUP_ROUNDS:] for measured in seconds]


def measure(sparse: bool, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one record per number of queries, on dense or sparse kernels."""
    shape, device = SHAPES[arguments.shape], arguments.device
    torch.manual_seed(0)
    model = random_model(shape, device, device).requires_grad_(False)
    prune_by_magnitude(model)
    if sparse and not to_semi_structured(model, arguments.batch * arguments.tokens * arguments.chunk):
        console.print("No 2:4 kernel is faster for this batch: there are no steps on them to measure.")
        return []
    batch = random_batch(shape.vocabulary, arguments.batch, arguments.tokens, device)
    forwards = Forwards(share_weights(model), batch)
    steps = Steps(model, batch, arguments.chunk)
    weights = sum(rows * columns for rows, columns in shape.linears.values())
    # attention is causal: half of the scores count
    flop_token = shape.blocks * (2.0 * weights + 2.0 * arguments.tokens * shape.width)
    records = []
    for num_queries in arguments.queries:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        # the step comes first: it finds the number of copies that fits into memory
        runs = (partial(steps.run, num_queries), lambda queries=num_queries: forwards.run(queries, steps.chunk_size))
        seconds, bare = alternate(runs, arguments.steps)
        speed = 2 * num_queries * batch["input_ids"].numel() / median(seconds)
        share = speed * flop_token / 1e12 / arguments.peak_tflops if arguments.peak_tflops else None
        record = {"model": arguments.shape, "num_queries": num_queries, "sparse": sparse, "batch": arguments.batch}
        record |= {"prompt_tokens": arguments.tokens, "query_chunk_size": steps.chunk_size, "seconds": seconds}
        record |= {"tokens_per_second": speed, "peak_share": share, "peak_gib": peak_memory(device) / 2**30}
        ratios = [step / passes for step, passes in zip(seconds, bare, strict=True)]
        record |= {"seconds_forwards": bare, "step_over_forwards": median(ratios)}
        records.append(record | {"step_over_forwards_range": [min(ratios), max(ratios)]})
    return records


def table(records: list[dict[str, Any]]) -> Table:
    """Return the records as a table for the terminal."""
    result = Table(title="zeroth-order steps")
    for name in ("model", "queries", "backbone", "tokens/s", "of the peak", "step / forwards", "GiB"):
        result.add_column(name, justify="left" if name in ("model", "backbone") else "right")
    for r in records:
        share = "" if r["peak_share"] is None else f"{r['peak_share']:.1%}"
        kind = "2:4 kernels" if r["sparse"] else "dense"
        figures = (f"{r['tokens_per_second']:,.0f}", share, step_ratio(r), f"{r['peak_gib']:.2f}")
        result.add_row(r["model"], str(r["num_queries"]), kind, *figures)
    return result


def parse() -> argparse.Namespace:
    """Parse the command line; exits with one line where a needed device is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--batch", type=int, default=16, help="prompts per batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--chunk", type=int, default=8, help="perturbed copies in one forward pass")
    parser.add_argument("--steps", type=int, default=5, help="steps; the median counts")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak of the card; known for a few")
    parser.add_argument("--result", type=Path, help="the result file; none is written for a CPU unless it is named")
    arguments = parser.parse_args()
    is_gpu = arguments.device.type == "cuda"
    if is_gpu and not torch.cuda.is_available():
        raise SystemExit(
            "error: Expected a CUDA device, but torch finds none; for a smoke test use `--device cpu --shape tiny`"
        )
    if is_gpu and arguments.peak_tflops is None:
        card = torch.cuda.get_device_name(arguments.device)
        arguments.peak_tflops = next((peak for name, peak in PEAKS.items() if name in card), None)
    arguments.result = arguments.result or (RESULT if is_gpu else None)
    return arguments


def main() -> None:
    """Measure and write the result file."""
    arguments = parse()
    records: list[dict[str, Any]] = []
    # a CPU has no sparse kernels
    for sparse in (False, True) if arguments.device.type == "cuda" else (False,):
        records += measure(sparse, arguments)
        if arguments.result is not None:
            write(arguments.result, describe(arguments.result.stem, records, peak_tflops=arguments.peak_tflops))
    console.print(table(records))


if __name__ == "__main__":
    main()
