"""Positions of a sample that are no padding."""

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["kept_positions", "select_rows"]

_FOUND = WeakTensorKeyDictionary()


def kept_positions(mask: Tensor) -> Tensor:
    """Return the flat positions where a mask is True, found once for each mask: a GPU makes the host wait for them.

    Args:
        mask: Bool of any shape, never changed in place.
    """
    if mask not in _FOUND:
        _FOUND[mask] = mask.reshape(-1).nonzero().squeeze(1)
    positions: Tensor = _FOUND[mask]
    return positions


def select_rows(rows: Tensor, mask: Tensor) -> Tensor:
    """Select the rows that are no padding; like a boolean index, without waiting for the device again.

    Args:
        rows: Shape (positions, width).
        mask: Bool with as many values as rows.
    """
    return rows.index_select(0, kept_positions(mask))
