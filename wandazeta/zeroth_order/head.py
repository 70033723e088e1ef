"""The gradient of what comes last in closed form, from a forward that is made anyway (ElasticZO, arXiv 2501.04287).

Legend: B examples, C classes, D hidden size, P perturbed copies, d length of the trained vector.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wandazeta.adapters import AdapterVector, TensorTrainAdapters
from wandazeta.scoring.scorer import Scores
from wandazeta.utilities.arguments import check_range
from wandazeta.zeroth_order import Directions


class HeadGradient:
    """Takes the gradient of the cross-entropy by a new head, or by the answers, from the base of one-sided slopes.

    The head is the last thing that a forward computes, so its gradient is `(softmax(logits) - onehot)ᵀ features`: there
    is nothing to propagate back. It is exact where a slope would tell one number about its C·(D + 1) coordinates, and
    as directions leave it alone, the slopes are those of the adapters only.

    Args:
        bank: Holds the adapters and, at the end of its vector, the head.
    """

    def __init__(self, bank: AdapterVector) -> None:
        self.bank = bank
        self._scores: Scores | None = None
        # the only Linear that is trained in full
        ((self._classes, self._width),) = bank.linear_shapes.values()
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

    def note_scores(self, scores: Scores) -> None:
        """Keep the scores of the losses that are watched, for `objective_losses`."""
        self._scores = scores

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
        assert self._scores is not None
        assert self._scores.features is not None
        features_PBD, scores_PBC = self._scores.features.unflatten(0, (num_copies, -1)), self._scores.values
        wrong_BC = scores_PBC[0].softmax(-1) - F.one_hot(labels, scores_PBC.shape[-1])
        grad_CD = wrong_BC.mT @ features_PBD[0].to(wrong_BC) / len(labels)
        return torch.cat([grad_CD.flatten(), wrong_BC.mean(0)]).to(self.bank.theta)

    def _head(self, vector: Tensor) -> Tensor:
        return vector[-self._classes * (self._width + 1) :]


def answers_head(width: int, num_answers: int) -> nn.Linear:
    """A Linear of zeros, which leaves a model its own answers to begin with."""
    with torch.inference_mode(False):
        answers = nn.Linear(width, num_answers)
        for parameter in answers.parameters():
            nn.init.zeros_(parameter)
    return answers


def check_num_answers(num_answers: int | None, num_classes: int | None, trainable: Any) -> None:
    """Check what goes with trained answers.

    Raises:
        ValueError: If there are fewer than two, a new head is there instead, or no tensor trains are beside them.
    """
    if num_answers is None:
        return
    check_range("num_answers", num_answers, num_answers >= 2, "at least 2")
    if num_classes is not None:
        raise ValueError("Expected either `num_classes`, for an encoder, or `num_answers`, for a language model")
    if trainable is not None and not isinstance(trainable, TensorTrainAdapters):
        raise ValueError(
            f"Expected `trainable` to be TensorTrainAdapters beside `num_answers`, but got {type(trainable).__name__}; "
            "other formats have no place for the answers"
        )


def check_head_gradient(
    head_gradient: str, num_trained: int | None, objective: Any, estimator: str, aggregation: str, weights: bool
) -> None:
    """Check what goes with the head's exact gradient.

    Args:
        head_gradient: As it was given.
        num_trained: Classes of a new head, or answers.
        objective: What is lowered instead of the cross-entropy, if anything.
        estimator: How slopes are measured.
        aggregation: How slopes become a gradient.
        weights: Whether the model's own weights are trained.

    Raises:
        ValueError: If there is no head, its loss has no gradient, or no forward is made at the trained vector itself.
    """
    check_range("head_gradient", head_gradient, head_gradient in ("estimated", "exact"), "estimated or exact")
    if head_gradient == "estimated":
        return
    for what, fits, remedy in (
        ("`num_classes` or `num_answers`", num_trained is not None, "there is neither a new head nor answers"),
        ("no `objective`", objective is None, "a metric has no gradient"),
        ("adapters in `trainable`", not weights, "`Weights` are moved one by one"),
        ('`estimator="one_sided"`', estimator == "one_sided", "two sides have no forward at the vector itself"),
        ("`aggregation` mean or fzoo", aggregation != "align", "the head has no share in the span of the directions"),
    ):
        if not fits:
            raise ValueError(f'Expected {what} for `head_gradient="exact"`, but {remedy}; change either')


def check_head_learning_rate(rate: float | None, num_trained: int | None, weights: bool) -> None:
    """Check a learning rate of the head's own.

    Args:
        rate: As it was given.
        num_trained: Classes of a new head, or answers.
        weights: Whether the model's own weights are trained.

    Raises:
        ValueError: If it is not above 0, or there is no head beside adapters.
    """
    if rate is None:
        return
    check_range("head_learning_rate", rate, rate > 0, "above 0")
    if num_trained is None or weights:
        raise ValueError(
            "Expected `num_classes` or `num_answers` and adapters in `trainable` for `head_learning_rate`, but "
            + ("`Weights` have one rate" if weights else "there is neither a new head nor answers")
        )
