"""Masks from scores: True is kept. Equal scores: the lower index is pruned first, on every device."""

import torch
from torch import Tensor

from .options import PruneOptions

# up to this group size comparing all pairs is several times faster than a sort
_LARGEST_PAIRWISE = 8


def make_mask(score: Tensor, options: PruneOptions) -> Tensor:
    """The mask that the options' pattern gives.

    Args:
        score: Shape (out, in).
        options: The pattern.

    Returns:
        Bool of shape (out, in), True where the weight is kept.
    """
    if options.group is not None:
        return group_mask(score, *options.group)
    return row_mask(score, options.target_sparsity)


def group_mask(score: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Keeps the N largest of every M consecutive inputs of a row.

    Args:
        score: Shape (out, in), finite.
        num_kept: N.
        group_size: M, a divisor of the inputs.

    Returns:
        Bool of shape (out, in), exactly N True in every group.

    Example:
        >>> group_mask(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2, 4).int()
        tensor([[0, 1, 0, 1]], dtype=torch.int32)
    """
    grouped = score.reshape(-1, group_size)
    if group_size > _LARGEST_PAIRWISE:
        pruned = grouped.sort(dim=-1, stable=True).indices[:, : group_size - num_kept]
        kept = torch.ones_like(grouped, dtype=torch.bool).scatter_(-1, pruned, False)
        return kept.view(score.shape)
    columns = grouped.t().contiguous()
    beaten = torch.zeros(columns.shape, dtype=torch.int8, device=score.device)
    for j in range(group_size):
        for i in range(j):
            earlier_wins = columns[i] > columns[j]
            beaten[i] += earlier_wins
            beaten[j] += ~earlier_wins
    return (beaten >= group_size - num_kept).t().reshape(score.shape)


def row_mask(score: Tensor, sparsity: float) -> Tensor:
    """Prunes the `int(in * sparsity)` smallest of every row.

    Args:
        score: Shape (out, in), finite.
        sparsity: Fraction to prune.

    Returns:
        Bool of shape (out, in), exactly `int(in * sparsity)` False in every row.
    """
    num_pruned = int(score.shape[1] * sparsity)
    if num_pruned == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = score.kthvalue(num_pruned, dim=1, keepdim=True).values
    kept = score > threshold
    if bool((kept.sum(1) == score.shape[1] - num_pruned).all()):
        return kept
    # ties at the threshold: prune from the left until the row has its count
    tied = score == threshold
    num_tied = num_pruned - (score < threshold).sum(1, keepdim=True)
    return kept | (tied & (tied.cumsum(1) > num_tied))
