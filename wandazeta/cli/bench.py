"""The command `wandazeta bench DIR`: tokens per second of a 2:4 model, dense and on sparse kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from wandazeta.models.loading import LoadingOptions, load_backbone
from wandazeta.pruning.export.semi_structured import Timer, seconds_of_call, to_semi_structured
from wandazeta.utilities.arguments import check_at_least

__all__ = ["Speed", "bench", "run", "verdict"]

_WAYS = {False: "eagerly", True: "in a CUDA graph"}


@dataclass(frozen=True)
class Speed:
    """Speed of forward passes of one batch size.

    Args:
        batch_size: Sequences in a batch.
        cuda_graph: Whether the forward pass was replayed as a CUDA graph.
        dense: Tokens per second on dense kernels; None if the forward pass cannot be captured.
        sparse: Tokens per second with the layers that are faster on sparse kernels; None if there are none.
        num_sparse: Number of those layers.
    """

    batch_size: int
    cuda_graph: bool
    dense: float | None
    sparse: float | None
    num_sparse: int


def bench(
    model: nn.Module, batch_sizes: Sequence[int] = (1, 8, 32), num_tokens: int = 128, timer: Timer | None = None
) -> list[Speed]:
    """Measure the forward passes of a 2:4 model on a GPU, dense and with sparse kernels where those are faster.

    Args:
        model: A causal language model of transformers on a GPU, in 16-bit precision; unchanged afterwards.
        batch_sizes: Sequences in a batch.
        num_tokens: Tokens of a sequence.
        timer: Measures a call instead of `seconds_of_call`.

    Raises:
        ValueError: If no layer of the model can run on sparse kernels, or an argument is out of range.
    """
    for size in batch_sizes:
        check_at_least("batch_sizes", size, 1)
    check_at_least("num_tokens", num_tokens, 1)
    return [
        _speed(model, size, num_tokens, cuda_graph, timer or seconds_of_call)
        for size in batch_sizes
        for cuda_graph in _WAYS
    ]


@torch.inference_mode(False)
@torch.no_grad()
def _speed(model: nn.Module, batch_size: int, num_tokens: int, cuda_graph: bool, timer: Timer) -> Speed:
    device = next(model.parameters()).device
    ids = torch.zeros(batch_size, num_tokens, dtype=torch.long, device=device)

    def tokens_per_second() -> float | None:
        try:
            return ids.numel() / timer(lambda: model(input_ids=ids, use_cache=False), cuda_graph)
        except RuntimeError:
            if not cuda_graph:
                raise
            return None  # not every model can be captured

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    weights = {name: linear.weight for name, linear in linears.items()}
    dense = tokens_per_second()
    try:
        converted = to_semi_structured(model, ids.numel(), cuda_graph=cuda_graph, timer=timer)
        sparse = tokens_per_second() if converted else None
    finally:
        for name, weight in weights.items():
            linears[name].weight = weight
    return Speed(batch_size, cuda_graph, dense, sparse, len(converted))


def verdict(speeds: Sequence[Speed], gpu: str) -> str:
    """Say in one sentence whether sparsity pays.

    Args:
        speeds: The measurements.
        gpu: Name of the GPU.
    """
    gains = [(s.sparse / s.dense, s) for s in speeds if s.dense is not None and s.sparse is not None]
    if not gains:
        return f"On this {gpu} 2:4 sparsity does not pay: no layer is faster on sparse kernels, so all stay dense."
    gain, best = max(gains, key=lambda pair: pair[0])
    where = f"with batch size {best.batch_size} {_WAYS[best.cuda_graph]}"
    if gain <= 1:
        return f"On this {gpu} 2:4 sparsity does not pay: at best {gain:.2f} times the dense speed, {where}."
    return f"On this {gpu} 2:4 sparsity pays: {gain:.2f} times the dense speed {where}."


def run(directory: str, batch_sizes: Sequence[int], num_tokens: int, dtype: Literal["bfloat16", "float16"]) -> None:
    """Run the command.

    Args:
        directory: Directory or Hugging Face name of a 2:4 model.
        batch_sizes: Sequences in a batch.
        num_tokens: Tokens of a sequence.
        dtype: Precision of the weights.

    Raises:
        ValueError: If the model or an argument does not fit.
    """
    console = Console()
    if not torch.cuda.is_available():
        console.print("There is no GPU here, and on other hardware zeros make nothing faster.", soft_wrap=True)
        return
    model: Any = load_backbone(directory, LoadingOptions(dtype=dtype)).to("cuda").eval()
    speeds = bench(model, batch_sizes, num_tokens)
    table = Table(title=f"tokens per second, {num_tokens} tokens a sequence, {dtype}")
    for name in ("batch size", "called", "dense", "sparse", "sparse layers"):
        table.add_column(name, justify="left" if name == "called" else "right")
    for speed in speeds:
        figures = ["" if figure is None else f"{figure:,.0f}" for figure in (speed.dense, speed.sparse)]
        table.add_row(str(speed.batch_size), _WAYS[speed.cuda_graph], *figures, str(speed.num_sparse))
    console.print(table)
    console.print(verdict(speeds, torch.cuda.get_device_name()), soft_wrap=True)
