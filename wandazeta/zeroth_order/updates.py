"""Update rules: how an estimated gradient moves the trained vector."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from wandazeta.utilities.arguments import check_range


class Update(ABC):
    """Base class of update rules.

    Args:
        weight_decay: Weight decay, decoupled from the gradient: a step takes `lr · weight_decay` of the matrices away.
            Biases have none.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_states = 0
    """State values for each trained value."""

    def __init__(self, weight_decay: float = 0.0) -> None:
        check_range("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        self.weight_decay = weight_decay

    @abstractmethod
    def step_(self, theta: Tensor, grad: Tensor, states_Sd: Tensor, num_updates: int, lr: float) -> None:
        """Move `theta` and the state of the rule in place, without the weight decay.

        Args:
            theta: The trained vector, shape `(d,)`.
            grad: Estimated gradient, shape `(d,)`; may be overwritten.
            states_Sd: State of the rule, shape `(num_states, d)`, zeros before the first step.
            num_updates: Number of updates before this one.
            lr: Learning rate.
        """


class SGDUpdate(Update):
    """Gradient descent, the rule of AdaZeta and MeZO: `theta ← theta - lr · grad`.

    Args:
        weight_decay: Weight decay of the matrices; biases have none.

    Raises:
        ValueError: If it is negative.
    """

    def __init__(self, weight_decay: float = 0.0) -> None:
        super().__init__(weight_decay)

    @override
    def step_(self, theta: Tensor, grad: Tensor, states_Sd: Tensor, num_updates: int, lr: float) -> None:
        theta.add_(grad, alpha=-lr)


class RAdaZOUpdate(Update):
    """Moments of the estimated gradient, the second one of the first, which is less noisy (R-AdaZO, arXiv 2502.01014).

    `m ← β₁ m + (1-β₁) grad`, `v ← β₂ v + (1-β₂) m²`, `theta ← theta - lr · m̂ / (√v̂ + eps)` with the bias
    corrections of Adam.

    Args:
        beta1: Decay rate of the first moment, in [0, 1).
        beta2: Decay rate of the second moment, in [0, 1).
        eps: Added to the square root, above 0.
        weight_decay: Weight decay of the matrices; biases have none.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_states = 2

    def __init__(self, beta1: float = 0.9, beta2: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        check_range("beta1", beta1, 0 <= beta1 < 1, "in [0, 1)")
        check_range("beta2", beta2, 0 <= beta2 < 1, "in [0, 1)")
        check_range("eps", eps, eps > 0, "above 0")
        super().__init__(weight_decay)
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps

    @override
    def step_(self, theta: Tensor, grad: Tensor, states_Sd: Tensor, num_updates: int, lr: float) -> None:
        mean, square = states_Sd
        mean.lerp_(grad, 1 - self.beta1)
        square.mul_(self.beta2).addcmul_(mean, mean, value=1 - self.beta2)
        # in the memory of the gradient, as the trained vector may be as long as the model
        root = torch.div(square, 1 - self.beta2 ** (num_updates + 1), out=grad).sqrt_().add_(self.eps)
        theta.addcdiv_(mean, root, value=-lr / (1 - self.beta1 ** (num_updates + 1)))
