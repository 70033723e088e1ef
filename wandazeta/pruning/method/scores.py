"""Scores: what is pruned is what scores lowest within its row or group."""

import torch
from torch import Tensor

from wandazeta.pruning.options import Alpha

# of the norms' mean, by the ablation
_AUTO_SHARE = 0.1


def magnitude_score(weight: Tensor) -> Tensor:
    """|W|, in float32.

    Args:
        weight: Shape (out, in).
    """
    return weight.detach().float().abs()


def regional_score(weight: Tensor, input_norm: Tensor, gradient: Tensor | None = None, alpha: Alpha = 0.0) -> Tensor:
    """The RGS score `(α·G + ‖X‖)·|W|` (Wanda++, equation 4); without a gradient it is Wanda's `‖X‖·|W|`.

    Args:
        weight: Shape (out, in).
        input_norm: Norm of each input feature, shape (in,).
        gradient: Regional gradient, shape (out, in).
        alpha: Its weight; with `auto` the mean of α·G is a tenth of the norms'.

    Returns:
        Scores in float32, shape (out, in).

    Example:
        >>> regional_score(torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 1.0]), torch.tensor([[0.0, 1.0]]), alpha=2.0)
        tensor([[3., 6.]])
    """
    score = magnitude_score(weight)
    if gradient is None or alpha == 0:
        return score.mul_(input_norm)
    if alpha == "auto":
        # on the device: a number of Python would wait for it
        share = _AUTO_SHARE * input_norm.mean() / gradient.mean()
        # a layer that the loss does not depend on, as one before an output that is still zero
        share = torch.where(share.isfinite(), share, 0.0)
        return score.mul_(torch.addcmul(input_norm, gradient, share))
    return score.mul_(torch.add(input_norm, gradient, alpha=alpha))
