"""The gradient of a new head in closed form, from a forward that is made anyway (ElasticZO, arXiv 2501.04287).

Legend: B examples, C classes, D hidden size, P perturbed copies, d length of the trained vector.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapters import FlatBank
from .arguments import check_range
from .encoder import HeadScorer
from .zo import Directions


class HeadGradient:
    """Takes the gradient of the cross-entropy by the head of an encoder from the base of one-sided slopes.

    The head is the last thing that a forward computes, so its gradient is `(softmax(logits) - onehot)ᵀ features`: there
    is nothing to propagate back. It is exact where a slope would tell one number about its C·(D + 1) coordinates, and
    as directions leave it alone, the slopes are those of the adapters only.

    Args:
        bank: Holds the adapters and, at the end of its vector, the head.
        scorer: Runs the model.
        name: Name of the head in the bank.
    """

    def __init__(self, bank: FlatBank, scorer: HeadScorer, name: str = "head") -> None:
        self.bank = bank
        self.scorer = scorer
        self.name = name
        self._found: Tensor | None = None

    def directions(self, directions: Directions) -> Directions:
        """Directions that leave the head alone."""

        def masked(query: int) -> Tensor:
            z = directions(query).clone()
            self._head(z).zero_()
            return z

        return masked

    def watch(self, losses: Callable[[Tensor], Tensor], labels: Tensor) -> Callable[[Tensor], Tensor]:
        """Losses of perturbed copies that note the gradient down when one of them is the vector itself.

        Args:
            losses: Losses of copies `(P, d)`, all in one forward.
            labels: Right classes `(B,)`.
        """
        self._found = None

        def watched(theta_Pd: Tensor) -> Tensor:
            result = losses(theta_Pd)
            if torch.equal(theta_Pd[0], self.bank.theta):
                self._found = self._of_first(len(theta_Pd), labels)
            return result

        return watched

    def take(self, exchange: Any, batch_size: int) -> Tensor:
        """The gradient `(C·(D + 1),)` of what was watched, the same bits on every rank.

        Args:
            exchange: What the ranks share out.
            batch_size: Examples of this rank's batch.
        """
        found = self._found if self._found is not None else torch.zeros_like(self._head(self.bank.theta))
        return exchange.of_base(found, self._found is not None, batch_size)

    def put(self, grad: Tensor, head_grad: Tensor) -> None:
        """Write the head's gradient into one of the whole vector `(d,)`."""
        self._head(grad).copy_(head_grad)

    def _of_first(self, num_copies: int, labels: Tensor) -> Tensor:
        features_PBD, logits_PBC = self.scorer.last_features.unflatten(0, (num_copies, -1)), self.scorer.last_logits
        wrong_BC = logits_PBC[0].softmax(-1) - F.one_hot(labels, logits_PBC.shape[-1])
        grad_CD = wrong_BC.mT @ features_PBD[0].to(wrong_BC) / len(labels)
        return torch.cat([grad_CD.flatten(), wrong_BC.mean(0)]).to(self.bank.theta)

    def _head(self, vector: Tensor) -> Tensor:
        rows, columns = self.bank.linear_shapes[self.name]
        # the only Linear that is trained in full
        return vector[-rows * (columns + 1) :]


def check_head_gradient(
    head_gradient: str, num_classes: int | None, objective: Any, estimator: str, aggregation: str, weights: bool
) -> None:
    """Check what goes with the head's exact gradient.

    Raises:
        ValueError: If there is no head, its loss has no gradient, or no forward is made at the trained vector itself.
    """
    check_range("head_gradient", head_gradient, head_gradient in ("estimated", "exact"), "estimated or exact")
    if head_gradient == "estimated":
        return
    for what, fits, remedy in (
        ("a model with `num_classes`", num_classes is not None, "there is no new head"),
        ("no `objective`", objective is None, "a metric has no gradient"),
        ("adapters in `trainable`", not weights, "`Weights` are moved one by one"),
        ('`estimator="one_sided"`', estimator == "one_sided", "two sides have no forward at the vector itself"),
        ("`aggregation` mean or fzoo", aggregation != "align", "the head has no share in the span of the directions"),
    ):
        if not fits:
            raise ValueError(f'Expected {what} for `head_gradient="exact"`, but {remedy}; change either')
