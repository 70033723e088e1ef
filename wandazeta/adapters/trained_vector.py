"""Interface between what is trained of a model and the zeroth-order step that trains it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from wandazeta.utilities.random_streams import Direction, Directions


class TrainedVector(nn.Module, ABC):
    """Base class of what is trained of a model, as one flat vector `theta`.

    Estimators and update rules see the vector alone. A subclass runs the model with perturbed copies of it, and applies
    updates. Legend: P perturbed copies, d length of the vector.
    """

    theta: Tensor
    """The vector, shape `(d,)`."""
    parameter_names: frozenset[str] = frozenset()
    """Names of the model's own parameters that are trained; checkpoints hold them."""
    folds_queries: bool
    """Whether one forward can serve several copies, each on its share of the rows."""
    supports_prefix: bool
    """Whether what lies below the first adapted module is the same for every copy, and can be computed once."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Number of trained values."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Return what is trained, in plain values, to compare it with a checkpoint."""

    def prepare_fit(self) -> None:
        """Check the vector once the trainer's strategy and precision are set up.

        Raises:
            ValueError: If it cannot be trained.
        """

    @abstractmethod
    def start_step(self, seed: int, step: int, num_queries: int, draw: Direction) -> Directions:
        """Begin a step and return its directions.

        Args:
            seed: Base seed of the run.
            step: Global step.
            num_queries: Queries of the step.
            draw: Distribution of the directions.
        """

    @abstractmethod
    def use(self, theta_Pd: Tensor) -> AbstractContextManager[None]:
        """Return a context in which the model runs with other vectors.

        Args:
            theta_Pd: Vectors of shape `(P, d)`; more than one only with `folds_queries`.
        """

    @abstractmethod
    def apply_update(self, updated: Tensor, decay: float, stored: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Replace the vector by an updated one, and tensors that belong to it by new values.

        A signal handler that writes a checkpoint sees either all old values or all new ones.

        Args:
            updated: The updated vector; may be changed.
            decay: Factor of the weight decay, the learning rate included.
            stored: Tensors to replace, such as the progress of the training.
            new: Their new values.
        """

    @abstractmethod
    def drift_probe(self) -> Tensor:
        """Return a tensor that differs between ranks as soon as their trained values do."""

    def rows(self, linear: nn.Linear, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return rows `(R, D)` of a Linear's weight and `(R,)` of its bias, as the current forward should see them.

        Args:
            linear: The Linear, trained or not.
            ids: Indices of the rows, `(R,)`.
        """
        return linear.weight[ids], None if linear.bias is None else linear.bias[ids]

    @property
    def linears_slice(self) -> slice:
        """Slice of `theta` that holds Linears trained in full, such as a new head."""
        return slice(0, 0)

    def append_linear(self, name: str, in_features: int, out_features: int) -> Callable[[Tensor], Tensor]:
        """Train a further Linear, which starts at zero, and return its forward.

        Args:
            name: Name of the Linear in saved files.
            in_features: Input width.
            out_features: Output width.

        Raises:
            ValueError: If the vector cannot be extended.
        """
        raise ValueError(f"Expected adapters to append a Linear to, but got {type(self).__name__}")
