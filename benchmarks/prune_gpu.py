"""Time and memory of prunings on one GPU, phase by phase, for a model of the shape of LLaMA-7B with random weights.

    python benchmarks/prune_gpu.py
    python benchmarks/prune_gpu.py --device cpu --shape tiny

The second line is a smoke test. The values of the weights do not affect the time, so they are drawn at random, one
block at a time. 128 samples of 2048 tokens and K = 5 rounds of M = 32 samples are the paper's settings.

Seconds are wall-clock, each phase without the phases inside it, with the device synchronised at its ends: `capture`
(the inputs of the first block), `measure` (input norms, Gram matrices and regional gradients), `optimise` (the rounds),
`norms` (of the optimised block), `prune` (scores and masks, in the rounds and after them), `solve` (masks and weights
by SparseGPT), `propagate` (to the next block) and `rest` (moving blocks and results, without writing them; the report).
The utilisation (MFU) is the number of operations that the method needs, by formula, over the peak of the card.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from records import RESULTS, describe, used_options, write
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from wandazeta.pruning import BlockResult, PruneOptions, prune_model, pruner
from wandazeta.pruning.method.block import NUM_PROBES, BlockPruner
from wandazeta.pruning.records import BlockRecord
from wandazeta.utilities.memory import peak_memory

RESULT = RESULTS / "prune_gpu.json"
METHODS = ("wanda", "rgs", "wanda++", "sparsegpt")
# dense bfloat16 TFLOP/s with float32 accumulation, from the data sheets
PEAKS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}

console = Console()


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA model.

    Args:
        width: Width of the hidden states.
        inner: Width inside the MLP.
        blocks: Number of blocks.
        heads: Number of attention heads.
        kv_heads: Number of key-value heads.
        vocabulary: Number of tokens.
    """

    width: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Sizes (out, in) of the Linears of a block, in the order in which they run."""
        kv = self.width * self.kv_heads // self.heads
        attention = {"q": (self.width, self.width), "k": (kv, self.width), "v": (kv, self.width)}
        mlp = {"gate": (self.inner, self.width), "up": (self.inner, self.width), "down": (self.width, self.inner)}
        return attention | {"o": (self.width, self.width)} | mlp

    def config(self) -> LlamaConfig:
        """Return the configuration of a model with a single block."""
        return LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=1,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            attn_implementation="sdpa",
        )


SHAPES = {
    "llama-7b": Shape(4096, 11008, 32, 32, 32),
    "llama-13b": Shape(5120, 13824, 40, 40, 40),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "tiny": Shape(64, 128, 2, 4, 2, 97),
}


def random_model(shape: Shape, device: torch.device, home: torch.device) -> LlamaForCausalLM:
    """Build a bfloat16 model: blocks are initialised on `device` one at a time and kept on `home`."""
    config = shape.config()
    with device:
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to(home)
    config.num_hidden_layers = shape.blocks
    for index in range(shape.blocks):
        with device:
            block = LlamaDecoderLayer(config, index).to(torch.bfloat16)
        for parameter in block.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        block = block.to(home)
        if index == 0:
            model.model.layers[0] = block
        else:
            model.model.layers.append(block)
    return model.eval()


class Phases:
    """Seconds and peak memory of the phases of a pruning, each without the phases inside it.

    Args:
        device: The compute device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.block_peaks: list[int] = []
        self._peak = 0
        self._open = ["rest"]
        self._start = 0.0

    def _boundary(self) -> None:
        """Add the time since the last boundary to the innermost phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, name = time.perf_counter(), self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._start
        self._peak = max(self._peak, peak_memory(self.device))
        self.peaks[name] = max(self.peaks.get(name, 0), peak_memory(self.device))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._start = now

    def end_block(self, record: BlockRecord, num_blocks: int) -> None:
        """Note the peak memory of a block; called after it."""
        self._boundary()
        self.block_peaks.append(self._peak)
        self._peak = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the time within this context to a phase."""
        self._boundary()
        self._open.append(name)
        try:
            yield
        finally:
            self._boundary()
            self._open.pop()

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            # the first norms are part of the measurement
            with self.phase("measure" if name == "norms" and self._open[-1] == "measure" else name):
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Time the prunings within this context."""
        parts = [
            (pruner, "capture_samples", "capture"),
            (pruner._BlockSequence, "_forward", "propagate"),
            (BlockPruner, "measure", "measure"),
            (BlockPruner, "_optimise", "optimise"),
            (BlockPruner, "_measure_inputs", "norms"),
            (BlockPruner, "mask_by_score", "prune"),
            (BlockPruner, "_solve", "solve"),
        ]
        with ExitStack() as stack:
            for owner, attribute, name in parts:
                stack.enter_context(patch.object(owner, attribute, self._timed(name, getattr(owner, attribute))))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
            self._start = time.perf_counter()
            yield
            self._boundary()


class Unwritten:
    """A `Progress` that results are moved to and not written."""

    def num_saved(self) -> int:
        """Return 0: no block is finished at the start."""
        return 0

    def load(self, block_index: int) -> BlockResult | None:
        """Return None: no block is finished at the start."""

    def save(self, block_index: int, result: BlockResult) -> None:
        """Drop a block."""


def flops(shape: Shape, options: PruneOptions, num_samples: int, length: int) -> dict[str, float]:
    """Return the floating-point operations of the matrix products of each phase, by formula.

    Attention is causal, so half of its scores count; the backward pass ends at the first Linears of a block.
    """
    sizes = {name: 2.0 * rows * columns * length for name, (rows, columns) in shape.linears.items()}
    linears, attention = sum(sizes.values()), 2.0 * length * length * shape.width
    forward = linears + attention
    backward = 2 * linears - sizes["q"] - sizes["k"] - sizes["v"] + 2 * attention
    inputs = forward - sizes["down"]
    probes = min(NUM_PROBES, num_samples)
    counts: dict[str, float] = {}
    if options.method.uses_gradients:
        counts["measure"] = num_samples * (forward + backward)
    else:
        counts["measure"] = probes * forward + (num_samples - probes) * inputs
    if options.method.uses_gram:
        # query, key and value share their input, and so do the first two of the MLP
        counts["measure"] += num_samples * 2.0 * length * (3 * shape.width**2 + shape.inner**2)
    optimisation = options.for_samples(num_samples).method.active_optimisation
    if optimisation is not None:
        assert optimisation.samples_per_round is not None
        steps = optimisation.rounds * optimisation.samples_per_round
        counts["optimise"] = steps * (forward + backward) + probes * forward
        counts["norms"] = num_samples * inputs
    counts = {name: count * shape.blocks for name, count in counts.items()}
    counts["propagate"] = ((shape.blocks - 1) * num_samples + probes) * forward
    return counts


def measure_method(name: str, options: PruneOptions, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Prune a new model; returns one record per phase and one for the total."""
    shape, device = replace(SHAPES[name], blocks=arguments.blocks), arguments.device
    torch.manual_seed(0)
    model = random_model(shape, device, arguments.home)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(shape.vocabulary, (arguments.num_samples, arguments.sequence_length), generator=generator)
    batches = [{"input_ids": window.to(arguments.home)} for window in windows.split(1)]
    phases = Phases(device)
    with ExitStack() as stack:
        if arguments.without_graphs:
            stack.enter_context(patch.object(pruner, "graph_backend", lambda device: None))
        stack.enter_context(phases.watch())
        forward = partial(model, use_cache=False)
        run = {"device": device, "progress": Unwritten(), "on_block": phases.end_block}
        prune_model(model, lambda batch: forward(**batch), batches, options, **run)
    counts = flops(shape, options, arguments.num_samples, arguments.sequence_length)
    seconds = phases.seconds | {"total": sum(phases.seconds.values())}
    peaks = phases.peaks | {"total": max(phases.peaks.values())}
    counts["total"] = sum(counts.values())
    records = []
    for phase, duration in seconds.items():
        record: dict[str, Any] = {"model": name, "method": options.method.name, "phase": phase, "seconds": duration}
        record |= {"peak_gib": peaks[phase] / 2**30, "tflop": counts.get(phase, 0.0) / 1e12, "mfu": None}
        if arguments.peak_tflops and phase in counts:
            record["mfu"] = record["tflop"] / duration / arguments.peak_tflops
        records.append(record | {"num_samples": arguments.num_samples, "sequence_length": arguments.sequence_length})
    # one number would not show whether memory grows from block to block
    records[-1]["block_peaks_gib"] = [peak / 2**30 for peak in phases.block_peaks]
    return records


def show(records: list[dict[str, Any]]) -> None:
    """Print the records."""
    table = Table(title="seconds of a pruning")
    for column in ("model", "method", "phase", "seconds", "GiB", "TFLOP", "MFU"):
        table.add_column(column, justify="left" if column in ("model", "method", "phase") else "right")
    for r in records:
        mfu = "" if r["mfu"] is None else f"{r['mfu']:.1%}"
        figures = (f"{r['seconds']:.2f}", f"{r['peak_gib']:.2f}", f"{r['tflop']:,.2f}" if r["tflop"] else "", mfu)
        table.add_row(r["model"], r["method"], r["phase"], *figures)
    console.print(table)


def parse() -> argparse.Namespace:
    """Parse the command line; exits with one line where a needed device is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--blocks", type=int, help="number of blocks; by default that of the shape")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["wanda", "wanda++", "sparsegpt"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="the compute device")
    parser.add_argument("--home", type=torch.device, help="device of the other blocks; by default the compute device")
    parser.add_argument("--num-samples", type=int, help="calibration samples; 128, and 8 for the tiny shape")
    parser.add_argument("--sequence-length", type=int, help="tokens of a sample; 2048, and 16 for the tiny shape")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the optimisation, K")
    parser.add_argument("--samples-per-round", type=int, help="samples of a round, M; a quarter of all by default")
    parser.add_argument("--without-graphs", action="store_true", help="launch every kernel, to compare with graphs")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak of the card; known for a few")
    parser.add_argument("--result", type=Path, help="the result file; none is written for a CPU unless it is named")
    arguments = parser.parse_args()
    is_tiny, is_gpu = arguments.shape == "tiny", arguments.device.type == "cuda"
    if is_gpu and not torch.cuda.is_available():
        raise SystemExit(
            "error: Expected a CUDA device, but torch finds none; for a smoke test use `--device cpu --shape tiny`"
        )
    if not is_gpu and not is_tiny:
        raise SystemExit(
            f"error: Expected a CUDA device for shape {arguments.shape}, but got '{arguments.device}'; "
            "for a smoke test use `--shape tiny`"
        )
    arguments.home = arguments.home or arguments.device
    arguments.blocks = arguments.blocks or SHAPES[arguments.shape].blocks
    arguments.num_samples = arguments.num_samples or (8 if is_tiny else 128)
    arguments.sequence_length = arguments.sequence_length or (16 if is_tiny else 2048)
    arguments.samples_per_round = arguments.samples_per_round or max(1, arguments.num_samples // 4)
    arguments.result = arguments.result or (RESULT if is_gpu else None)
    if is_gpu and arguments.peak_tflops is None:
        card = torch.cuda.get_device_name(arguments.device)
        arguments.peak_tflops = next((peak for name, peak in PEAKS.items() if name in card), None)
        if arguments.peak_tflops is None:
            console.print(f"The peak of {card} is unknown; set `--peak-tflops` to get the utilisation.")
    return arguments


def main() -> None:
    """Measure; the result file is written after each pruning."""
    arguments = parse()
    records: list[dict[str, Any]] = []
    for method in arguments.methods:
        settings = {"rounds": arguments.rounds, "samples_per_round": arguments.samples_per_round}
        options = used_options({"method": method} | settings)
        records += measure_method(arguments.shape, options, arguments)
        if arguments.result is not None:
            more = {"peak_tflops": arguments.peak_tflops, "home": str(arguments.home), "blocks": arguments.blocks}
            write(arguments.result, describe(arguments.result.stem, records, **more))
    show(records)


if __name__ == "__main__":
    main()
