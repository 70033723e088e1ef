"""The tensor-train adapter of a site as one Triton kernel for NVIDIA and AMD GPUs.

The products of an adapter are small, so its time on a GPU is that of reading and writing activations. As separate
kernels they are read or written about ten times, here once each. All arithmetic is in fp32 without TF32, and an
activation is rounded to its own precision once.

Legend: P perturbed copies, N rows of a copy, D features, r rank, H bottleneck.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wandazeta.adapters.tensor_train_vector import AdapterLayout, AdapterMatrices

__all__ = ["apply_fused", "try_out"]

# values of activations that a program holds, in whole rows, and its warps: with 32 values a thread, the registers of
# two programs of LLaMA-7B's width fit on a multiprocessor of an H100, and none are spilled
_VALUES, _WARPS = 1 << 13, 8


@triton.jit
def _adapter_kernel(
    x_PND: tl.tensor,
    y_PND: tl.tensor,
    down_A: tl.tensor,
    down_A_copy: int,
    down_A_row: int,
    down_A_column: int,
    down_B: tl.tensor,
    down_B_copy: int,
    down_B_row: int,
    down_bias: tl.tensor,
    down_bias_copy: int,
    up_A: tl.tensor,
    up_A_copy: int,
    up_A_row: int,
    up_A_column: int,
    up_B: tl.tensor,
    up_B_copy: int,
    up_B_row: int,
    up_bias: tl.tensor,
    up_bias_copy: int,
    num_rows: int,
    width: int,
    bottleneck: int,
    rank: tl.constexpr,
    rows: tl.constexpr,
    padded_width: tl.constexpr,
    padded_bottleneck: tl.constexpr,
) -> None:
    """Adapt some rows of one copy.

    Matrices come with the strides of their copies, rows and columns, where these are not 1.
    """
    copy = tl.program_id(1)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    d, h = tl.arange(0, padded_width), tl.arange(0, padded_bottleneck)
    is_d, is_h = d < width, h < bottleneck
    place = (copy * num_rows + row).to(tl.int64)[:, None] * width + d[None, :]
    is_inside = (row < num_rows)[:, None] & is_d[None, :]
    x = tl.load(x_PND + place, mask=is_inside, other=0.0).to(tl.float32)
    bias = tl.load(down_bias + copy * down_bias_copy + h, mask=is_h, other=0.0)
    hidden = tl.zeros([rows, padded_bottleneck], dtype=tl.float32) + bias[None, :]
    for k in tl.static_range(rank):
        left = tl.load(down_A + copy * down_A_copy + d * down_A_row + k * down_A_column, mask=is_d, other=0.0)
        right = tl.load(down_B + copy * down_B_copy + k * down_B_row + h, mask=is_h, other=0.0)
        hidden += tl.sum(x * left[None, :], axis=1)[:, None] * right[None, :]
    # not tl.maximum, which turns nan into zero and would hide that a query has diverged
    hidden = tl.where(hidden < 0.0, 0.0, hidden)
    y = x + tl.load(up_bias + copy * up_bias_copy + d, mask=is_d, other=0.0)[None, :]
    for k in tl.static_range(rank):
        left = tl.load(up_A + copy * up_A_copy + h * up_A_row + k * up_A_column, mask=is_h, other=0.0)
        right = tl.load(up_B + copy * up_B_copy + k * up_B_row + d, mask=is_d, other=0.0)
        y += tl.sum(hidden * left[None, :], axis=1)[:, None] * right[None, :]
    tl.store(y_PND + place, y.to(y_PND.dtype.element_ty), mask=is_inside)


def apply_fused(x_PND: Tensor, matrices: AdapterMatrices) -> Tensor:
    """Adapt activations and return them in the same shape and dtype.

    Args:
        x_PND: Activations `(P, N, D)`, or `(N, D)` for matrices without P.
        matrices: Merged adapter of the site, in fp32.
    """
    x_PND = x_PND.contiguous()
    y_PND = torch.empty_like(x_PND)
    num_rows, width = x_PND.shape[-2:]
    copies = x_PND.shape[0] if x_PND.ndim == 3 else 1
    rank, bottleneck = matrices.down_B.shape[-2:]

    def strides(matrix: Tensor, dims: int) -> tuple[int, ...]:
        """Return the strides of the copies and of the first dimensions of a matrix."""
        return (matrix.stride(0) if matrix.ndim == 3 else 0, *matrix.stride()[matrix.ndim - 2 :][:dims])

    padded = triton.next_power_of_2(width)
    rows = max(1, min(16, _VALUES // padded))
    # Triton launches on the current device
    with torch.cuda.device_of(x_PND):
        _adapter_kernel[(triton.cdiv(num_rows, rows), copies)](
            x_PND,
            y_PND,
            matrices.down_A,
            *strides(matrices.down_A, 2),
            matrices.down_B,
            *strides(matrices.down_B, 1),
            matrices.down_bias,
            *strides(matrices.down_bias, 0),
            matrices.up_A,
            *strides(matrices.up_A, 2),
            matrices.up_B,
            *strides(matrices.up_B, 1),
            matrices.up_bias,
            *strides(matrices.up_bias, 0),
            num_rows,
            width,
            bottleneck,
            rank=rank,
            rows=rows,
            padded_width=padded,
            padded_bottleneck=triton.next_power_of_2(bottleneck),
            num_warps=_WARPS,
        )
    return y_PND


def try_out(device: torch.device) -> None:
    """Compile the kernel and compare it with torch on a few values.

    Args:
        device: A GPU.

    Raises:
        Exception: What Triton raises where it cannot compile or run it.
        AssertionError: If the values differ.
    """
    layout = AdapterLayout([8], rank=2, bottleneck=4)
    theta = torch.linspace(-1, 1, layout.num_parameters, dtype=torch.float32, device=device)
    x = torch.linspace(-1, 1, 24, dtype=torch.float64, device=device).view(3, 8)
    found = apply_fused(x.float(), layout.merge(theta)[0])
    # the fp64 adapter is not the kernel
    expected = layout.merge(theta.double())[0].apply(x, (-1,)).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
