"""Masks from scores: True where a weight is kept. Of equal scores the lower index is pruned, on every device."""

import torch
from torch import Tensor

from wandazeta.pruning.pattern import SparsityPattern, num_pruned

# up to this group size, comparing all pairs is several times faster than a sort
_LARGEST_PAIRWISE = 8


def make_mask(score: Tensor, pattern: SparsityPattern) -> Tensor:
    """Choose the weights to keep from their scores.

    Args:
        score: Shape (out, in), finite.
        pattern: The sparsity pattern.

    Returns:
        Bool of shape (out, in), True where the weight is kept.
    """
    if pattern.group is not None:
        return group_mask(score, *pattern.group)
    return row_mask(score, pattern.target_sparsity)


def group_mask(score: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Keep the N largest of every M consecutive inputs of a row.

    Args:
        score: Shape (out, in), finite.
        num_kept: N.
        group_size: M, a divisor of the inputs.

    Returns:
        Bool of shape (out, in), exactly N True in every group.

    Examples:
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


def zero_where_false(weight: Tensor, mask: Tensor) -> None:
    """Set a weight to +0.0 where the mask is False, in place; other values keep their bits.

    The bits are multiplied as integers, which is many times faster on a CPU than `masked_fill_`; a product of floats
    would leave -0.0.

    Args:
        weight: Floating-point tensor.
        mask: Bool of the same shape.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    weight.detach().view(integers[weight.element_size()]).mul_(mask)


class OneGroup:
    """Mask of one N:M group of columns: `group_mask` with few operations, for a loop over many groups.

    Args:
        num_kept: N.
        group_size: M.
        device: Device of the scores.

    Examples:
        >>> OneGroup(2, 4)(torch.tensor([[1.0], [3.0], [2.0], [2.0]])).int().flatten()
        tensor([0, 1, 0, 1], dtype=torch.int32)
    """

    def __init__(self, num_kept: int, group_size: int, device: torch.device | str = "cpu") -> None:
        self._num_pruned = group_size - num_kept
        self._later, self._earlier = torch.tril_indices(group_size, group_size, -1, device=device)
        # a column beats all earlier ones except those that are larger
        self._beaten = torch.arange(group_size, dtype=torch.float32, device=device)[:, None]
        self._change = torch.zeros(group_size, len(self._later), dtype=torch.float32, device=device)
        self._change.scatter_(0, self._earlier[None], 1.0).scatter_(0, self._later[None], -1.0)

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the mask of one group.

        Args:
            scores: Shape (M, rows), finite.

        Returns:
            Bool of the same shape, exactly N True in every column.
        """
        earlier_wins = scores.index_select(0, self._earlier) > scores.index_select(0, self._later)
        return torch.addmm(self._beaten, self._change, earlier_wins.float()) >= self._num_pruned


def row_mask(score: Tensor, sparsity: float) -> Tensor:
    """Prune the `num_pruned(in, sparsity)` smallest scores of every row.

    Args:
        score: Shape (out, in), finite.
        sparsity: Fraction to prune.

    Returns:
        Bool of shape (out, in), with that many False in every row.
    """
    count = num_pruned(score.shape[1], sparsity)
    if count == 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = score.kthvalue(count, dim=1, keepdim=True).values
    kept = score > threshold
    # a CPU knows at once; a GPU would have to be waited for, and counts ties faster
    if score.device.type == "cpu" and bool((kept.sum(1) == score.shape[1] - count).all()):
        return kept
    # ties at the threshold: prune from the left until the row has its count
    tied = score == threshold
    num_tied = count - (score < threshold).sum(1, keepdim=True)
    return kept | (tied & (tied.cumsum(1) > num_tied))
