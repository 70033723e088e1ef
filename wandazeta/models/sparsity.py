"""Tell pruned weights from dense ones by their zeros."""

from torch import Tensor

__all__ = ["is_pruned"]

# values compared at a time: the comparison of a whole embedding matrix would take as much memory as a copy of it
_CHUNK_NUMEL = 1 << 20


def is_pruned(weight: Tensor, rows_dim: int = 0) -> bool:
    """Whether a weight matrix was pruned: every row has zeros, and not all values are zero.

    Wanda++ and its relatives prune each row by the same fraction, N:M patterns prune every group of a row. Zeros that
    a dense weight has by chance are in few of its rows, and a matrix of nothing but zeros is newly initialised (the
    second factor of a low-rank adapter is).

    Args:
        weight: A weight of two or more dimensions; any other is never pruned.
        rows_dim: Dimension of the output features: 0 for `nn.Linear`, 1 for the `Conv1D` of transformers.

    Examples:
        >>> import torch
        >>> is_pruned(torch.tensor([[0.0, 1.0], [2.0, 0.0]])), is_pruned(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
        (True, False)
    """
    if weight.ndim < 2 or weight.numel() == 0:
        return False
    rows = weight.detach().movedim(rows_dim, 0)
    chunks = rows.split(max(1, _CHUNK_NUMEL // rows[0].numel()))
    # ends at the first dense chunk
    every_row_has_zeros = all(bool((chunk == 0).flatten(1).any(1).all()) for chunk in chunks)
    return every_row_has_zeros and any(bool(chunk.any()) for chunk in chunks)
