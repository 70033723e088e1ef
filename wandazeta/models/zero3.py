"""Weights that DeepSpeed's stage 3 has shared out over the ranks, whole again for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["full_shape", "gathered", "is_shared_out"]


def is_shared_out(weight: Tensor) -> bool:
    """Whether stage 3 has taken a weight into its hands, so that it is empty but when it is used."""
    return hasattr(weight, "ds_id")


def full_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight when it is whole."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


@contextmanager
def gathered(weights: Iterable[Tensor]) -> Iterator[None]:
    """Within this context every rank holds the weights whole; those that are not shared out are left alone.

    All ranks have to enter it, with the same weights. Changes to weights that are shared out are lost at its end.

    Args:
        weights: The weights.
    """
    shared = [weight for weight in weights if is_shared_out(weight)]
    if not shared:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shared):
        yield
