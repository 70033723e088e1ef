"""Run 2:4 pruned Linears on torch's semi-structured sparse kernels: where those are faster, or to take less memory."""

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wandazeta.models.streaming import load_one_by_one
from wandazeta.pruning.export.packed import PackedWeight, read_packed
from wandazeta.utilities.arguments import check_at_least

__all__ = [
    "KERNELS",
    "KernelTime",
    "load_semi_structured",
    "measure_kernels",
    "seconds_of_call",
    "to_semi_structured",
]

KERNELS = ("cusparselt", "cutlass")
"""Names of torch's sparse kernels."""

Timer = Callable[[Callable[[], object], bool], float]
"""Measures the seconds of a call: eagerly, or inside a CUDA graph if the second argument is True."""

# multiples that both kernels support for 16-bit weights
_ROWS, _COLUMNS = 32, 64
# NVIDIA Ampere
_FIRST_CAPABILITY = (8, 0)
# largest relative difference of the output: that of other orders of summation in 16 bit is far smaller
_MAX_ERROR = 2e-2
# all Linears together, on the chosen kernels, have to reach this share of the dense speed
_LEAST_SPEED = 0.98
# calls timed together, of which the host's share is then that of a whole model
_CALLS, _REPEATS = 10, 7


@dataclass(frozen=True)
class KernelTime:
    """Time of one product on one kernel.

    Args:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        rows: Rows of the input, the tokens of a batch.
        kernel: `dense`, or one of `KERNELS`.
        cuda_graph: Whether it was called inside a CUDA graph.
        seconds: Seconds of a call; None if the kernel failed or its output was wrong.
        relative_error: Difference of the output from the dense one; None if the kernel failed.
    """

    out_features: int
    in_features: int
    rows: int
    kernel: str
    cuda_graph: bool
    seconds: float | None
    relative_error: float | None


def to_semi_structured(
    model: nn.Module, num_tokens: int, *, cuda_graph: bool = False, timer: Timer | None = None
) -> dict[str, str]:
    """Convert the 2:4 pruned Linears of a model to torch's sparse tensors where those are faster, in place.

    Every shape is timed on the dense kernel and on both sparse ones, cuSPARSELt and CUTLASS, and its layers get the
    fastest. Then all chosen products are timed together once more, beside dense ones: if they reach less than 0.98 of
    the dense speed, the whole model stays dense.

    The weights become `torch.sparse.SparseSemiStructuredTensor`s of about half the size, for inference only: they can
    be neither trained nor saved. Linears that do not qualify stay dense, and so do the `Conv1D` layers of GPT-2.

    Args:
        model: A model on a GPU with 16-bit weights.
        num_tokens: Tokens of a forward pass, on which it depends what is fastest.
        cuda_graph: Whether the model will run inside a CUDA graph, without work of the host between kernels.
        timer: Measures a call instead of `seconds_of_call`.

    Returns:
        Dotted names of the converted layers with their kernel, one of `KERNELS`; empty if nothing is faster.

    Raises:
        ValueError: If no layer qualifies; the message counts the reasons.
    """
    check_at_least("num_tokens", num_tokens, 1)
    timer = timer or seconds_of_call
    layers = _qualified(model)
    by_shape: dict[torch.Size, list[str]] = {}
    for name, layer in layers.items():
        by_shape.setdefault(layer.weight.shape, []).append(name)
    chosen: dict[torch.Size, str] = {}
    for shape, names in by_shape.items():
        times = measure_kernels(layers[names[0]].weight.detach(), num_tokens, (cuda_graph,), timer)
        kernel = _fastest(times)
        if kernel != "dense":
            chosen[shape] = kernel
    counts = {shape: len(by_shape[shape]) for shape in chosen}
    weights = {shape: layers[by_shape[shape][0]].weight.detach() for shape in chosen}
    if not chosen or _speed(weights, chosen, counts, num_tokens, cuda_graph, timer) < _LEAST_SPEED:
        return {}
    converted = {name: chosen[shape] for shape in chosen for name in by_shape[shape]}
    for name, kernel in converted.items():
        sparse = _converted(layers[name].weight.detach(), kernel)
        layers[name].weight = nn.Parameter(sparse, requires_grad=False)
    return {name: converted[name] for name in layers if name in converted}


@torch.no_grad()
def load_semi_structured(
    directory: str | os.PathLike[str], device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Load a causal language model from its packed 2:4 file to CUTLASS's sparse kernels, without unpacking its Linears.

    This is for memory: a packed weight takes 0.5625 of its dense size, on the way, too. `to_semi_structured` is for
    speed. Weights that the kernels do not support are unpacked, one at a time: those of other layers than Linears, and
    all of them in float32, on a CPU or on a GPU older than NVIDIA Ampere.

    Args:
        directory: Exported with `pack=True`: holds config.json and `sparsity/model.2of4.safetensors`.
        device: Where the model goes.
        dtype: Precision of the weights.

    Returns:
        The model, in evaluation mode. Its sparse weights can be neither trained nor saved.

    Raises:
        ValueError: If there is no packed file, or its tensors are not those of the configured model.
    """
    device = torch.device(device)
    packed, others = read_packed(directory)

    def read(name: str, owner: nn.Module, precision: torch.dtype) -> nn.Parameter:
        if name not in packed:
            return nn.Parameter(others[name].read().to(device, precision), requires_grad=False)
        weight = packed[name]
        if not isinstance(owner, nn.Linear) or _kernel_obstacle(weight.shape, precision, device):
            return nn.Parameter(weight.unpack(device).to(precision), requires_grad=False)
        return nn.Parameter(_for_cutlass(weight, precision, device), requires_grad=False)

    shapes = {name: each.shape for entries in (packed, others) for name, each in entries.items()}
    try:
        return load_one_by_one(Path(directory), dtype, device, shapes, read)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Expected argument `directory` to hold a causal language model with its packed 2:4 file, but got "
            f"'{directory}': {error}; restore the plain directory with `python -m wandazeta.pruning.export.packed SRC "
            "DST`, and load that"
        ) from error


def _for_cutlass(weight: PackedWeight, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Load a packed weight as a sparse tensor of CUTLASS's kernels; it has the same values and positions."""
    values = weight.values.read().to(device, dtype)
    # positions of four groups in each number
    positions = weight.indices.read().to(device, copy=True).view(torch.int16)
    # as `reorder_meta` of CUTLASS: the rows of 32 are interleaved by 4, squares of 2 x 2 are transposed, and pairs of
    # columns follow one another
    order = positions.view(weight.shape[0] // 32, 2, 2, 8, -1, 2).permute(4, 0, 3, 1, 5, 2)
    tensor: Tensor = torch.sparse.SparseSemiStructuredTensorCUTLASS(
        torch.Size(weight.shape),
        packed=values,
        meta=order.reshape(weight.shape[0], -1),
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )
    return tensor


@torch.no_grad()
def measure_kernels(
    weight: Tensor, num_tokens: int, cuda_graph: Sequence[bool] = (False, True), timer: Timer | None = None
) -> list[KernelTime]:
    """Time a product on the dense kernel and on each sparse one.

    Args:
        weight: A 2:4 weight of shape (out, in) on a GPU, in 16-bit precision.
        num_tokens: Rows of the input.
        cuda_graph: How to call the kernels: eagerly (False), inside a CUDA graph (True), or both.
        timer: Measures a call instead of `seconds_of_call`.

    Returns:
        The dense time and those of `KERNELS`, for each way of calling them.
    """
    timer = timer or seconds_of_call
    out_features, in_features = weight.shape
    x = torch.randn(num_tokens, in_features, device=weight.device, dtype=weight.dtype)
    expected = F.linear(x, weight)
    found = []
    for kernel in ("dense", *KERNELS):
        try:
            kept = weight if kernel == "dense" else _converted(weight, kernel)
            error = float((F.linear(x, kept) - expected).float().norm() / expected.float().norm())
        except RuntimeError:  # not built, or not for this card
            kept, error = None, None
        for graph in cuda_graph:
            seconds = None
            if kept is not None and error is not None and error <= _MAX_ERROR:
                try:
                    seconds = timer(partial(F.linear, x, kept), graph)
                except RuntimeError:  # not every kernel can be captured
                    seconds = None
            found.append(KernelTime(out_features, in_features, num_tokens, kernel, graph, seconds, error))
    return found


def seconds_of_call(call: Callable[[], object], cuda_graph: bool) -> float:
    """Measure the median seconds of a call on the current GPU, with the host's work unless it is in a CUDA graph.

    Args:
        call: What to time; it is called several times, so that the host may run ahead of the GPU as in a model.
        cuda_graph: Capture the calls as a CUDA graph, and time its replay.

    Raises:
        RuntimeError: If the call cannot be captured.
    """

    def several() -> None:
        for _ in range(_CALLS):
            call()

    run = _captured(several) if cuda_graph else several
    durations = []
    for repeat in range(_REPEATS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if repeat:  # the first calls choose kernels
            durations.append((time.perf_counter() - start) / _CALLS)
    return statistics.median(durations)


def _captured(run: Callable[[], object]) -> Callable[[], None]:
    """Return the replay of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _fastest(times: Sequence[KernelTime]) -> str:
    """Return the kernel with the shortest time; the dense one of equal ones."""
    measured = [each for each in times if each.seconds is not None]
    # a dense product that cannot be timed is no reason to replace it
    if not measured or measured[0].kernel != "dense":
        return "dense"
    return min(measured, key=lambda each: each.seconds or 0.0).kernel


@torch.no_grad()
def _speed(
    weights: Mapping[torch.Size, Tensor],
    kernels: Mapping[torch.Size, str],
    counts: Mapping[torch.Size, int],
    num_tokens: int,
    cuda_graph: bool,
    timer: Timer,
) -> float:
    """Return the dense time of all chosen products over that of the sparse ones, one layer of each shape in turn."""
    inputs = {shape: torch.randn(num_tokens, shape[1], device=w.device, dtype=w.dtype) for shape, w in weights.items()}
    sparse = {shape: _converted(weight, kernels[shape]) for shape, weight in weights.items()}

    def run(of_shape: Mapping[torch.Size, Tensor]) -> None:
        for shape, count in counts.items():
            for _ in range(count):
                F.linear(inputs[shape], of_shape[shape])

    return timer(partial(run, weights), cuda_graph) / timer(partial(run, sparse), cuda_graph)


def _converted(weight: Tensor, kernel: str) -> Tensor:
    """Return a weight as a sparse tensor of a kernel."""
    classes: dict[str, Any] = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }
    tensor: Tensor = classes[kernel].from_dense(weight.contiguous())
    return tensor


def _qualified(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the Linears that sparse kernels support, by name."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    obstacles = {name: _obstacle(linear.weight.detach()) for name, linear in linears.items()}
    qualified = {name: linear for name, linear in linears.items() if obstacles[name] is None}
    if not qualified:
        reasons = Counter(filter(None, obstacles.values())).most_common()
        raise ValueError(
            "Expected argument `model` to hold Linear layers that sparse kernels support, but got none: "
            f"{'; '.join(f'{count} {reason}' for reason, count in reasons) or 'there are no Linear layers'}. "
            "Prune with sparsity_pattern='2:4', cast the model to bfloat16 or float16 and move it to an NVIDIA GPU "
            "(Ampere or newer); on other hardware zeros make nothing faster."
        )
    return qualified


def _obstacle(weight: Tensor) -> str | None:
    """Why sparse kernels do not support a weight of shape (out, in), or None if they do."""
    if weight.shape[1] % 4 or bool(((weight.reshape(-1, 4) != 0).sum(1) > 2).any()):
        return "not 2:4"
    return _kernel_obstacle(weight.shape, weight.dtype, weight.device)


def _kernel_obstacle(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why sparse kernels do not support a 2:4 weight of shape (out, in), or None if they do."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"in {str(dtype).removeprefix('torch.')}, not in 16-bit precision"
    if shape[0] % _ROWS or shape[1] % _COLUMNS:
        return f"of a shape that is not a multiple of {_ROWS} by {_COLUMNS}"
    return _device_obstacle(device)


def _device_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"on the {device.type.upper()}, which has no such kernels"
    if torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        return "on a GPU older than NVIDIA Ampere, which has no such kernels"
    return None
