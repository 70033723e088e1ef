"""Pruning scores: the lowest scores of each row or group are pruned."""

from typing import Literal

import torch
from torch import Tensor

Alpha = float | Literal["auto"]

# mean of α·G as a fraction of the mean input norm (docs/ablation.md)
_AUTO_FRACTION = 0.1


def magnitude_score(weight: Tensor) -> Tensor:
    """Magnitude score |W|, in float32.

    Args:
        weight: Shape (out, in).
    """
    return weight.detach().float().abs()


def regional_score(weight: Tensor, input_norm: Tensor, gradient: Tensor | None = None, alpha: Alpha = 0.0) -> Tensor:
    """Regional gradient score `(α·G + ‖X‖)·|W|` (Wanda++, equation 4); without a gradient Wanda's `‖X‖·|W|`.

    Args:
        weight: Shape (out, in).
        input_norm: Norm of each input feature, shape (in,).
        gradient: Regional gradient G, shape (out, in).
        alpha: Weight of the gradient; `auto` makes the mean of α·G a tenth of the mean input norm.

    Returns:
        Scores in float32, shape (out, in).

    Examples:
        >>> regional_score(torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 1.0]), torch.tensor([[0.0, 1.0]]), alpha=2.0)
        tensor([[3., 6.]])
    """
    score = magnitude_score(weight)
    if gradient is None or alpha == 0:
        return score.mul_(input_norm)
    if alpha == "auto":
        # computed on the device: a Python number would synchronise with it
        scale = _AUTO_FRACTION * input_norm.mean() / gradient.mean()
        # the gradient is zero in a layer that the loss does not depend on, such as one before a zero output
        scale = torch.where(scale.isfinite(), scale, 0.0)
        return score.mul_(torch.addcmul(input_norm, gradient, scale))
    return score.mul_(torch.add(input_norm, gradient, alpha=alpha))
