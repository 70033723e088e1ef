"""SparseGPT's loop over the columns of a block as one Triton kernel.

On a GPU the loop in torch takes four kernel launches a column, each of them longer for the host than for the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCK", "eliminate", "try_out"]

BLOCK = 128
"""Largest number of columns of a block, a power of two; it is the paper's."""

# rows of a weight for each program: its part of a block, 16 KiB, fits into the registers of its warps
_ROWS, _NUM_WARPS = 32, 8


def eliminate(columns: Tensor, errors: Tensor, kept: Tensor, factor: Tensor, group: tuple[int, int] | None) -> None:
    """Prune the columns of a block one after the other, passing the error of each on to the later ones.

    Args:
        columns: Transposed weights in float32, shape (block, rows), contiguous; they are changed, and those that are
            pruned are left with arbitrary values near zero.
        errors: Contiguous and of the same shape; gets the errors, which are zero where a weight is kept.
        kept: Mask, bool, contiguous and of the same shape; it is read if `group` is None, else written.
        factor: The block's part of the upper Cholesky factor of the inverse Gram matrix, shape (block, block).
        group: (N, M) to choose N of every M columns when their turn comes; M divides the block.
    """
    size, num_rows = columns.shape
    num_kept, group_size = group or (0, 0)
    # Triton launches on the current device
    with torch.cuda.device_of(columns):
        _eliminate[(triton.cdiv(num_rows, _ROWS),)](
            columns,
            errors,
            kept.view(torch.uint8),
            factor.contiguous(),
            num_rows,
            size,
            num_pruned=group_size - num_kept,
            group_size=group_size,
            block_size=BLOCK,
            rows_at_once=_ROWS,
            num_warps=_NUM_WARPS,
        )


def try_out(device: torch.device) -> None:
    """Compile and run the kernel on a few values.

    Args:
        device: The device.

    Raises:
        Exception: What Triton raises where it cannot compile or run it.
    """
    columns = torch.tensor([[1.0], [2.0]], device=device)
    errors, kept = torch.empty_like(columns), torch.empty_like(columns, dtype=torch.bool)
    eliminate(columns, errors, kept, torch.eye(2, device=device), (1, 2))
    errors.tolist()  # waits for the kernel


@triton.jit
def _eliminate(
    columns_ptr: tl.tensor,
    errors_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    num_pruned: tl.constexpr,
    group_size: tl.constexpr,
    block_size: tl.constexpr,
    rows_at_once: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * rows_at_once + tl.arange(0, rows_at_once)
    columns = tl.arange(0, block_size)
    inside = (columns < size)[:, None] & (rows < num_rows)[None, :]
    places = columns[:, None] * num_rows + rows[None, :]
    values = tl.load(columns_ptr + places, mask=inside, other=0.0)
    scale = 1.0 / tl.load(factor_ptr + columns * (size + 1), mask=columns < size, other=1.0)
    is_kept = tl.load(kept_ptr + places, mask=inside, other=1) != 0 if group_size == 0 else inside
    for column in range(size):
        if group_size != 0:  # noqa: SIM102 (one condition is for the compiler)
            if column % group_size == 0:
                scores = values * scale[:, None]
                scores = scores * scores
                num_beaten = tl.zeros([block_size, rows_at_once], dtype=tl.int32)
                for other in range(column, column + group_size):
                    score = tl.sum(tl.where((columns == other)[:, None], scores, 0.0), axis=0)[None, :]
                    # of equal scores the lower index is pruned
                    beats = (scores > score) | ((scores == score) & (columns > other)[:, None])
                    num_beaten += beats.to(tl.int32)
                in_group = ((columns >= column) & (columns < column + group_size))[:, None]
                is_kept = tl.where(in_group, num_beaten >= num_pruned, is_kept)
        is_pruned = (columns == column)[:, None] & (is_kept == 0)
        error = tl.sum(tl.where(is_pruned, values * scale[:, None], 0.0), axis=0)
        tl.store(errors_ptr + column * num_rows + rows, error, mask=rows < num_rows)
        later = (columns > column) & (columns < size)
        coupling = tl.load(factor_ptr + column * size + columns, mask=later, other=0.0)
        values -= coupling[:, None] * error[None, :]
    tl.store(columns_ptr + places, values, mask=inside)
    if group_size != 0:
        tl.store(kept_ptr + places, is_kept.to(tl.uint8), mask=inside)
