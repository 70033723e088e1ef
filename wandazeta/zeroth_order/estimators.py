"""Gradient estimators: slopes of the loss along random directions, from forward passes alone.

The work of a step is divided into points, which are grouped into chunks and distributed over ranks. A point is the
smallest unit of evaluation, such as one side of a query. Legend: V values of a point, P points of the step, Q queries,
N vectors, d length of the trained vector.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, Self

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from wandazeta.utilities.arguments import check_choice, check_range
from wandazeta.utilities.random_streams import DISTRIBUTIONS, Direction, Directions
from wandazeta.zeroth_order.aggregation import AGGREGATIONS, ProjectedGradients
from wandazeta.zeroth_order.chunks import Evaluations, in_chunks

LossFn = Callable[[Tensor], Tensor]
"""Maps vectors `(N, d)` to their losses `(N,)`."""

# The best of `wandazeta diagnose` on SmolLM2-135M, for the worse of two initialisations of the adapters
# (benchmarks/results/epsilon.json). fp16 is not measured: its rounding is far below bf16's, its curvature that of fp32.
DEFAULT_EPSILON = {torch.float32: 1e-3, torch.float16: 3e-3, torch.bfloat16: 3e-3}
"""Default ε of finite differences, by the precision of the forward pass."""

# a loss is rounded to about eps of itself: below a quarter of it, rounding is a large part of every slope
_NOISY_EPSILON = {dtype: torch.finfo(dtype).eps / 4 for dtype in DEFAULT_EPSILON}


class Estimator(ABC):
    """Base class of gradient estimators.

    A subclass defines the points of a step and how they become slopes along the queries' directions; this class holds
    the distribution of the directions and the aggregation of the slopes to a gradient.

    Args:
        directions: Distribution of the directions, `gaussian` (AdaZeta's) or `rademacher` (random signs).
        aggregation: How slopes become a gradient: their `mean` (AdaZeta's), `align` (projection on the span of the
            directions) or `fzoo` (mean divided by the slopes' standard deviation).

    Raises:
        ValueError: If an argument is unknown.
    """

    num_values: int
    """Values of a point, V."""
    evaluates_base = False
    """Whether one of the points is the trained vector itself."""
    needs_differentiable_loss = False
    """Whether the loss is differentiated, so that it cannot be a metric or of weights that are changed in place."""
    epsilon: float | None = None
    """Distance of the perturbed vectors, for estimators that have one."""

    def __init__(
        self,
        directions: Literal["gaussian", "rademacher"] = "gaussian",
        aggregation: Literal["mean", "align", "fzoo"] = "mean",
    ) -> None:
        check_choice("directions", directions, DISTRIBUTIONS)
        check_choice("aggregation", aggregation, AGGREGATIONS)
        self.directions = directions
        self.aggregation = aggregation

    @property
    def draw(self) -> Direction:
        """Function that draws a direction."""
        return DISTRIBUTIONS[self.directions]

    @property
    def min_queries(self) -> int:
        """Fewest queries of a step that the aggregation works with."""
        return 2 if self.aggregation == "fzoo" else 1

    @abstractmethod
    def num_points(self, num_queries: int) -> int:
        """Return the number of points of a step, P."""

    @abstractmethod
    def num_forwards(self, num_queries: int) -> int:
        """Return the number of forward passes of a step over its batch, whatever the number of ranks."""

    @abstractmethod
    def evaluate(
        self, loss_fn: LossFn, theta: Tensor, directions: Directions, points: Sequence[int], chunk_size: int
    ) -> Evaluations:
        """Evaluate some points. `theta` is never changed; `loss_fn` gets copies.

        Args:
            loss_fn: Computes the losses of any number of vectors.
            theta: The trained vector, shape `(d,)`.
            directions: The directions of the step.
            points: Points to evaluate; a rank may have none.
            chunk_size: Points per call of `loss_fn`; halved when memory runs out.
        """

    @abstractmethod
    def slopes(self, values_VP: Tensor) -> Tensor:
        """Return the slopes of all queries `(Q,)` from the values of all points; not finite where a loss was not."""

    @abstractmethod
    def loss(self, values_VP: Tensor) -> float:
        """Return the loss at the trained vector, or an estimate of it (`nan` without a finite query)."""

    def gradient(self, theta: Tensor, slopes: ProjectedGradients, directions: Directions) -> Tensor | None:
        """Aggregate slopes to a gradient.

        Args:
            theta: The trained vector, shape `(d,)`.
            slopes: Slopes of all ranks.
            directions: The directions of the step.

        Returns:
            The gradient `(d,)`, or None if the finite slopes do not determine one.
        """
        return AGGREGATIONS[self.aggregation](theta, slopes, directions)

    def with_default_epsilon(self, dtype: torch.dtype) -> Self:
        """Return the estimator with an epsilon for a precision of the forward, if it needs one and has none."""
        return self

    def precision_warning(self, dtype: torch.dtype) -> str | None:
        """Return a warning if rounding in this precision of the forward dominates the slopes."""
        return None

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class FiniteDifferences(Estimator):
    """Base class of estimators that divide a difference of losses by a distance.

    Args:
        epsilon: Distance of the perturbed vectors from the trained one, in units of the direction. By default 1e-3 for
            forward passes in fp32 and 3e-3 in bf16 and fp16; `wandazeta diagnose` measures which one fits.
        directions: Distribution of the directions, `gaussian` (AdaZeta's) or `rademacher` (random signs).
        aggregation: How slopes become a gradient: their `mean` (AdaZeta's), `align` (projection on the span of the
            directions) or `fzoo` (mean divided by the slopes' standard deviation).

    Raises:
        ValueError: If an argument is out of range.
    """

    num_values = 1

    def __init__(
        self,
        epsilon: float | None = None,
        directions: Literal["gaussian", "rademacher"] = "gaussian",
        aggregation: Literal["mean", "align", "fzoo"] = "mean",
    ) -> None:
        check_range("epsilon", epsilon, epsilon is None or epsilon > 0, "above 0")
        self.epsilon = epsilon
        super().__init__(directions, aggregation)

    @override
    def with_default_epsilon(self, dtype: torch.dtype) -> Self:
        if self.epsilon is not None:
            return self
        return type(self)(DEFAULT_EPSILON[dtype], self.directions, self.aggregation)

    @override
    def precision_warning(self, dtype: torch.dtype) -> str | None:
        if self.epsilon is None or self.epsilon >= _NOISY_EPSILON[dtype]:
            return None
        return (
            f"epsilon={self.epsilon} is small for {dtype}: rounding will be a large part of the loss differences; the "
            f"default is {DEFAULT_EPSILON[dtype]}, and `wandazeta diagnose` measures which one fits"
        )

    @property
    def _distance(self) -> float:
        if self.epsilon is None:
            raise ValueError(
                "Expected argument `epsilon` to be set before losses are evaluated, but got None; pass it, or call "
                "`with_default_epsilon` with the precision of the forward"
            )
        return self.epsilon


class TwoSided(FiniteDifferences):
    """Central differences, `(L(θ + ε z) - L(θ - ε z)) / 2ε`: 2Q forwards, error O(ε²) (MeZO and AdaZeta, eq. 3).

    Point 2q is the plus side of query q, point 2q + 1 its minus side. The arguments are those of `FiniteDifferences`.
    """

    @override
    def num_points(self, num_queries: int) -> int:
        return 2 * num_queries

    @override
    def num_forwards(self, num_queries: int) -> int:
        return 2 * num_queries

    @override
    @torch.no_grad()
    def evaluate(
        self, loss_fn: LossFn, theta: Tensor, directions: Directions, points: Sequence[int], chunk_size: int
    ) -> Evaluations:
        epsilon = self._distance

        def sides(chunk: Sequence[int]) -> Tensor:
            moves = [(point // 2, -epsilon if point % 2 else epsilon) for point in chunk]
            return loss_fn(_perturbed(theta, directions, moves))

        return in_chunks(sides, points, chunk_size, self.num_values, theta.device)

    @override
    def slopes(self, values_VP: Tensor) -> Tensor:
        plus, minus = values_VP.view(-1, 2).T
        return (plus - minus) / (2 * self._distance)

    @override
    def loss(self, values_VP: Tensor) -> float:
        # the mean of both sides, over the queries whose losses are finite
        sides_Q2 = values_VP.view(-1, 2)
        return float(sides_Q2[sides_Q2.isfinite().all(1)].mean())


class OneSided(FiniteDifferences):
    """Forward differences, `(L(θ + ε z) - L(θ)) / ε`, from one shared base: Q + 1 forwards, error O(ε).

    Half the forwards of `TwoSided`, and the loss at θ itself is among them. The curvature along z stays in the slope,
    and an error of the base is the same in all slopes. Point 0 is the base, point q + 1 the query q. The arguments are
    those of `FiniteDifferences`.
    """

    evaluates_base = True

    @override
    def num_points(self, num_queries: int) -> int:
        return num_queries + 1

    @override
    def num_forwards(self, num_queries: int) -> int:
        return num_queries + 1

    @override
    @torch.no_grad()
    def evaluate(
        self, loss_fn: LossFn, theta: Tensor, directions: Directions, points: Sequence[int], chunk_size: int
    ) -> Evaluations:
        epsilon = self._distance

        def one_side(chunk: Sequence[int]) -> Tensor:
            return loss_fn(_perturbed(theta, directions, [(point - 1, epsilon) for point in chunk]))

        return in_chunks(one_side, points, chunk_size, self.num_values, theta.device)

    @override
    def slopes(self, values_VP: Tensor) -> Tensor:
        return (values_VP[0, 1:] - values_VP[0, 0]) / self._distance

    @override
    def loss(self, values_VP: Tensor) -> float:
        return float(values_VP[0, 0])


class ForwardMode(Estimator):
    """Directional derivatives `⟨∇L(θ), z⟩` by forward-mode differentiation: exact, without an ε (arXiv 2202.08587).

    The derivative is propagated along with the value, so no activations are stored for a backward pass. A point is a
    query; its values are the loss at θ and the derivative. Attention runs as torch's `math` kernel, which supports
    forward mode.

    Args:
        directions: Distribution of the directions, `gaussian` (AdaZeta's) or `rademacher` (random signs).
        aggregation: How slopes become a gradient: their `mean` (AdaZeta's), `align` (projection on the span of the
            directions) or `fzoo` (mean divided by the slopes' standard deviation).
    """

    num_values = 2
    needs_differentiable_loss = True

    @override
    def num_points(self, num_queries: int) -> int:
        return num_queries

    @override
    def num_forwards(self, num_queries: int) -> int:
        # every product is computed for the value and for the derivative
        return 2 * num_queries

    @override
    @torch.no_grad()
    def evaluate(
        self, loss_fn: LossFn, theta: Tensor, directions: Directions, points: Sequence[int], chunk_size: int
    ) -> Evaluations:
        """Evaluate some queries, as `Estimator.evaluate` does.

        Raises:
            ValueError: If an operation of the loss has no forward-mode derivative.
        """

        def value_and_derivative(queries: Sequence[int]) -> Tensor:
            copies = theta.repeat(len(queries), 1)
            tangents = torch.stack([directions(query) for query in queries])
            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                loss, derivative = forward_ad.unpack_dual(loss_fn(forward_ad.make_dual(copies, tangents)))
                # a loss that does not depend on the vector at all has no derivative
                return torch.stack([loss, torch.zeros_like(loss) if derivative is None else derivative])

        try:
            return in_chunks(value_and_derivative, points, chunk_size, self.num_values, theta.device)
        except RuntimeError as error:  # torch raises it, or its subclass NotImplementedError
            text = str(error)
            if "forward AD" not in text and "forward mode AD" not in text and "jvp" not in text:
                raise
            raise ValueError(
                "Expected a model whose operations all have forward-mode derivatives, but one has none "
                f"({text.splitlines()[0][:160]}); load it with eager or sdpa attention, or use another estimator"
            ) from error

    @override
    def slopes(self, values_VP: Tensor) -> Tensor:
        loss, derivative = values_VP
        return torch.where(loss.isfinite(), derivative, torch.nan)

    @override
    def loss(self, values_VP: Tensor) -> float:
        # equal for all queries; the mean over those whose values are finite
        return float(values_VP[0, values_VP.isfinite().all(0)].mean())


def _perturbed(theta: Tensor, directions: Directions, moves: Sequence[tuple[int, float]]) -> Tensor:
    """Return copies of a vector `(N, d)`, each moved along the direction of a query by a length; query -1 stays."""
    copies = theta.repeat(len(moves), 1)
    drawn, z = -1, theta
    for copy, (query, length) in zip(copies, moves, strict=True):
        if query != drawn:
            z = theta  # frees the last direction before the next one is drawn
            drawn, z = query, directions(query)
        if query >= 0:
            copy.add_(z, alpha=length)
    return copies
