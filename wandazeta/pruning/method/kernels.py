"""Triton kernels of the optimisation of a block: a step of an optimizer on one layer, and sums of squared gradients.

Importing this module needs Triton; `wandazeta.pruning.method.optimizer.load_kernels` does so where the kernels can be
used. Numbers that change from step to step are read from the device, so that CUDA graphs can replay the kernels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# values that a program processes, and its warps
_SIZE = 4096
_WARPS = 8


@dataclass(frozen=True)
class LayerState:
    """Tensors of one layer that a step reads and writes, contiguous and at fixed addresses.

    Args:
        weight: The weight in the precision of the model; None if the master is the weight.
        master: The weight in float32.
        square: Moving average of the squared gradient, in float32.
        average: Moving average of the gradient, in float32; None for RMSprop, which has none.
        rate: Learning rate before the schedule, a number in float32.
    """

    weight: Tensor | None
    master: Tensor
    square: Tensor
    average: Tensor | None
    rate: Tensor


@triton.jit
def _step(
    gradient: tl.tensor,
    weight: tl.tensor,
    master: tl.tensor,
    square: tl.tensor,
    average: tl.tensor,
    mask: tl.tensor,
    rate: tl.tensor,
    schedule: tl.tensor,
    number: tl.tensor,
    scale: tl.tensor,
    num_values: int,
    beta1: tl.constexpr,
    beta2: tl.constexpr,
    epsilon: tl.constexpr,
    size: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = at < num_values
    row = schedule + 2 * tl.load(number)
    step_size, correction = tl.load(rate) * tl.load(row), tl.load(row + 1)
    v = tl.load(square + at, inside, 0.0) * beta2
    if gradient is None:
        g = tl.zeros_like(v)
    else:
        g = tl.div_rn(tl.load(gradient + at, inside, 0.0).to(tl.float32), tl.load(scale))
        v += (1 - beta2) * g * g
    tl.store(square + at, v, inside)
    if average is None:
        m = g
    else:
        m = tl.load(average + at, inside, 0.0)
        m += (1 - beta1) * (g - m)
        tl.store(average + at, m, inside)
    p = tl.load(master + at, inside, 0.0)
    p -= step_size * tl.div_rn(m, tl.sqrt_rn(v) * correction + epsilon)
    if mask is not None:
        p = tl.where(tl.load(mask + at, inside, 0) != 0, p, 0.0)
    tl.store(master + at, p, inside)
    if weight is not None:
        tl.store(weight + at, p.to(weight.dtype.element_ty), inside)


@triton.jit
def _add_square(total: tl.tensor, gradient: tl.tensor, num_values: int, size: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = at < num_values
    g = tl.load(gradient + at, inside, 0.0).to(tl.float32)
    tl.store(total + at, tl.load(total + at, inside, 0.0) + g * g, inside)


def step(
    layer: LayerState,
    gradient: Tensor | None,
    mask: Tensor | None,
    schedule: Tensor,
    number: Tensor,
    scale: Tensor,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """Take a step of RMSprop or AdamW on one layer: unscale, update moments and master, mask, and round to the weight.

    Args:
        layer: The layer.
        gradient: Gradient in any precision; None stands for zeros.
        mask: Unsigned 8-bit, zero where a weight is pruned; None if all may move.
        schedule: Shape (steps, 2), float32: the factor of the rate with the bias correction of the average, and the
            factor of the root of the square, its bias correction.
        number: Steps that were taken, a 32-bit integer; the row of the schedule.
        scale: Number in float32 by which the gradient is divided.
        betas: Decay of the average and of the square.
        epsilon: Added to the root of the square.
    """
    num_values = layer.master.numel()
    with torch.cuda.device_of(layer.master):
        _step[(triton.cdiv(num_values, _SIZE),)](
            None if gradient is None else gradient.contiguous(),
            layer.weight,
            layer.master,
            layer.square,
            layer.average,
            mask,
            layer.rate,
            schedule,
            number,
            scale,
            num_values,
            beta1=betas[0],
            beta2=betas[1],
            epsilon=epsilon,
            size=_SIZE,
            num_warps=_WARPS,
        )


def add_square_(total: Tensor, gradient: Tensor) -> None:
    """Add the square of a gradient to a sum, in place.

    Args:
        total: The sum, in float32, contiguous.
        gradient: The gradient, of the same shape, in any precision.
    """
    num_values = total.numel()
    with torch.cuda.device_of(total):
        _add_square[(triton.cdiv(num_values, _SIZE),)](
            total, gradient.contiguous(), num_values, size=_SIZE, num_warps=_WARPS
        )


def try_out(device: torch.device) -> None:
    """Compile and run all kernels on a few values.

    Args:
        device: A GPU.

    Raises:
        Exception: What Triton raises where it cannot compile or run them.
    """
    values = torch.zeros(16, device=device)
    one, number = torch.ones((), device=device), torch.zeros((), dtype=torch.int32, device=device)
    for average in (None, values):
        layer = LayerState(values.bfloat16(), values, values, average, one)
        step(layer, values.bfloat16(), None, torch.ones(1, 2, device=device), number, one, (0.9, 0.99), 1e-8)
    add_square_(values, values.bfloat16())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
