"""Closed-form gradient of a trained head, from the base forward (ElasticZO, arXiv 2501.04287).

Legend: B examples, C classes, D hidden size, d length of the trained vector.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from wandazeta.utilities.arguments import check_choice, check_range
from wandazeta.utilities.random_streams import Directions


@dataclass(frozen=True)
class TrainedHead:
    """Options of a linear head that is trained together with adapters.

    On an encoder, this is the classification head that `loading.num_classes` adds. On a causal language model,
    `num_answers` adds a head that maps the hidden state before the answer to a correction of the answer options'
    scores; it starts at zero, so training starts from the answers of the prompt alone.

    Args:
        num_answers: Number of answer options of a causal language model; leave it out for an encoder.
        gradient: Gradient of the head: `estimated` along the random directions like that of the adapters, or `exact`,
            in closed form from the base forward of `OneSided`.
        learning_rate: Learning rate of the head; by default that of the adapters. A learning rate scheduler scales
            both. A head starts at zero and often needs a larger rate than adapters, which start at the model itself.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_answers: int | None = None
    gradient: Literal["estimated", "exact"] = "estimated"
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        check_range("num_answers", self.num_answers, self.num_answers is None or self.num_answers >= 2, "at least 2")
        check_choice("gradient", self.gradient, ("estimated", "exact"))
        check_range(
            "learning_rate", self.learning_rate, self.learning_rate is None or self.learning_rate > 0, "above 0"
        )


class HeadGradient:
    """Computes the gradient of the cross-entropy with respect to a linear head, from the base forward.

    The head is the last layer, so its gradient is `(softmax(scores) - onehot)ᵀ features` and nothing is
    back-propagated. It is exact, where a slope along a direction measures one number about the C·(D + 1) values of the
    head. The head is not perturbed, so the slopes are those of the adapters alone.

    Args:
        head: Slice of the trained vector that holds the head, its weight `(C, D)` and then its bias `(C,)`.
    """

    def __init__(self, head: slice) -> None:
        self.slice = head
        self._observed: Tensor | None = None

    def directions(self, directions: Directions) -> Directions:
        """Return directions that do not perturb the head."""

        def without_head(query: int) -> Tensor:
            z = directions(query).clone()
            z[self.slice].zero_()
            return z

        return without_head

    def clear(self) -> None:
        """Forget the gradient of the last step."""
        self._observed = None

    @property
    def is_observed(self) -> bool:
        """Whether the gradient of this step has been computed."""
        return self._observed is not None

    def observe(self, features_BD: Tensor, scores_BC: Tensor, labels_B: Tensor) -> None:
        """Compute and keep the gradient of a batch.

        Args:
            features_BD: Inputs of the head in the base forward.
            scores_BC: Scores of the classes or answer options in the base forward, in fp64.
            labels_B: Correct classes or answers.
        """
        error_BC = scores_BC.softmax(-1) - F.one_hot(labels_B, scores_BC.shape[-1])
        grad_CD = error_BC.mT @ features_BD.to(error_BC) / len(labels_B)
        self._observed = torch.cat([grad_CD.flatten(), error_BC.mean(0)])

    def observed(self, theta: Tensor) -> tuple[Tensor, bool]:
        """Return the gradient `(C·(D + 1),)` of this rank, and whether there is one.

        Args:
            theta: The trained vector, for dtype and device. A rank that has not evaluated the base returns zeros.
        """
        if self._observed is None:
            return torch.zeros_like(theta[self.slice]), False
        return self._observed.to(theta), True
