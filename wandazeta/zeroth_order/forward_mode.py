"""Exact directional derivatives by forward-mode differentiation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from wandazeta.zeroth_order.chunks import Evaluations, in_chunks
from wandazeta.zeroth_order.directions import Directions
from wandazeta.zeroth_order.estimators import LossFn


class ForwardMode:
    """Directional derivatives `⟨∇L(θ), z⟩` by forward-mode differentiation: exact, without a distance ε.

    The derivative goes through the model beside the value, so nothing is stored for a way back. A point is a query, its
    values the loss at θ and the derivative. Attention runs as torch's `math` kernel, the one that forward mode knows.
    (The forward gradient of arXiv 2202.08587.)
    """

    num_values = 2

    def num_points(self, num_queries: int) -> int:
        """Points of a step: its queries."""
        return num_queries

    def num_forwards(self, num_queries: int) -> int:
        """Two for each query: every product is taken of the value and of its derivative."""
        return 2 * num_queries

    @torch.no_grad()
    def evaluate(
        self, loss_fn: LossFn, theta: Tensor, directions: Directions, points: Sequence[int], chunk_size: int
    ) -> Evaluations:
        """Evaluate some queries, as `Estimator.evaluate` says.

        Raises:
            ValueError: If an operation of the loss has no forward-mode derivative.
        """

        def value_and_derivative(queries: Sequence[int]) -> Tensor:
            copies = theta.repeat(len(queries), 1)
            tangents = torch.stack([directions(query) for query in queries])
            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                loss, derivative = forward_ad.unpack_dual(loss_fn(forward_ad.make_dual(copies, tangents)))
                # a loss that does not depend on the vector at all carries no derivative
                return torch.stack([loss, torch.zeros_like(loss) if derivative is None else derivative])

        try:
            return in_chunks(value_and_derivative, points, chunk_size, self.num_values, theta.device)
        except RuntimeError as error:  # NotImplementedError among them
            text = str(error)
            if "forward AD" not in text and "forward mode AD" not in text and "jvp" not in text:
                raise
            raise ValueError(
                "Expected a model all of whose operations have forward-mode derivatives, but one has none "
                f"({text.splitlines()[0][:160]}); load it with eager or sdpa attention, or use another estimator"
            ) from error

    def slopes(self, values_VP: Tensor) -> Tensor:
        """Derivatives of all queries, `(Q,)`; not finite where the loss is not."""
        loss, derivative = values_VP
        return torch.where(loss.isfinite(), derivative, torch.nan)

    def loss(self, values_VP: Tensor) -> float:
        """Loss at the trained vector: the mean over the queries whose values are finite, all alike."""
        return float(values_VP[0, values_VP.isfinite().all(0)].mean())
