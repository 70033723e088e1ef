"""Rules that move the trained vector by an estimate of the gradient."""

from typing import Protocol

import torch
from torch import Tensor


class Update(Protocol):
    """A rule that moves the trained vector by an estimated gradient."""

    num_states: int

    def step_(self, theta: Tensor, grad: Tensor, states_Sd: Tensor, num_updates: int, lr: float) -> None:
        """Move `theta` and the rule's state in place.

        Args:
            theta: The trained vector, shape `(d,)`.
            grad: Estimated gradient, shape `(d,)`; may be overwritten.
            states_Sd: The rule's state, shape `(num_states, d)`, zeros before the first step.
            num_updates: Steps taken before this one.
            lr: Learning rate.
        """
        ...


class SGDUpdate:
    """Plain gradient descent, the rule of AdaZeta and MeZO: `theta ← theta - lr · grad`."""

    num_states = 0

    def step_(self, theta: Tensor, grad: Tensor, states_Sd: Tensor, num_updates: int, lr: float) -> None:
        """Move `theta` in place, as `Update.step_` says."""
        theta.add_(grad, alpha=-lr)


class RAdaZOUpdate:
    """Moments of the estimate, the second taken of the first, whose noise is smaller (R-AdaZO, arXiv 2502.01014).

    `m ← β₁ m + (1-β₁) grad`, `v ← β₂ v + (1-β₂) m²`, `theta ← theta - lr · m̂ / (√v̂ + eps)` with the bias
    corrections of Adam.

    Args:
        beta1: Decay of the mean of the gradient, in [0, 1).
        beta2: Decay of the mean of its square, in [0, 1).
        eps: Added to the root, above 0.

    Raises:
        ValueError: If an argument is out of range.
    """

    num_states = 2

    def __init__(self, beta1: float = 0.9, beta2: float = 0.99, eps: float = 1e-8) -> None:
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"Expected argument `{name}` to be in [0, 1), but got {value}")
        if eps <= 0:
            raise ValueError(f"Expected argument `eps` to be above 0, but got {eps}")
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps

    def step_(self, theta: Tensor, grad: Tensor, states_Sd: Tensor, num_updates: int, lr: float) -> None:
        """Move `theta` and both moments in place, as `Update.step_` says."""
        mean, square = states_Sd
        mean.lerp_(grad, 1 - self.beta1)
        square.mul_(self.beta2).addcmul_(mean, mean, value=1 - self.beta2)
        # in the gradient's place: a trained vector may be as long as the model
        root = torch.div(square, 1 - self.beta2 ** (num_updates + 1), out=grad).sqrt_().add_(self.eps)
        theta.addcdiv_(mean, root, value=-lr / (1 - self.beta1 ** (num_updates + 1)))
