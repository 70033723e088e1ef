"""Pruning methods: how weights are scored, and how a pruned block is optimised."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from wandazeta.pruning.method.scores import Alpha, magnitude_score, regional_score
from wandazeta.utilities.arguments import check_at_least, closest_names

# samples of a round, unless asked otherwise; the paper's M
_SAMPLES_PER_ROUND = 32
# samples that the rounds of the tuned optimisation see in all, and its largest number of rounds (docs/ablation.md)
_TUNING_SAMPLES = 256
_MAX_TUNING_ROUNDS = 4


@dataclass(frozen=True)
class RegionalOptimisation:
    """Options of the regional optimisation: each block is trained to reproduce its dense output (Wanda++, section 4.2).

    Each round prunes the block, then trains it by RMSprop, which moves pruned weights away from zero. After the last
    round the block is pruned once more.

    Args:
        rounds: Number of rounds, K.
        samples_per_round: Calibration samples of each round, M; one optimizer step per sample. By default 32, or all
            if there are fewer.
        learning_rate: Learning rate.

    Raises:
        ValueError: If an argument is out of range.
    """

    rounds: int = 5
    samples_per_round: int | None = None
    learning_rate: float = 3e-7

    def __post_init__(self) -> None:
        check_at_least("rounds", self.rounds, 0)
        if self.samples_per_round is not None:
            check_at_least("samples_per_round", self.samples_per_round, 1)
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"Expected argument `learning_rate` to be larger than 0, but got {self.learning_rate!r}")

    def for_samples(self, num_samples: int) -> "RegionalOptimisation":
        """Return the options with `samples_per_round` filled in.

        Args:
            num_samples: Number of calibration samples.

        Raises:
            ValueError: If a round needs more samples than there are.
        """
        if self.samples_per_round is None:
            return replace(self, samples_per_round=min(_SAMPLES_PER_ROUND, num_samples))
        if self.rounds > 0 and self.samples_per_round > num_samples:
            raise ValueError(
                "Expected argument `samples_per_round` to be at most the number of calibration samples "
                f"({num_samples}), but got {self.samples_per_round}; lower it or calibrate on more samples"
            )
        return self


class PruningMethod(ABC):
    """Base class of pruning methods: a score, and what computing it takes.

    Subclasses are frozen dataclasses whose fields are the method's options, and are registered in `METHODS`. What the
    pruning has to do for a method is decided by the properties here, never by the method's name.
    """

    name: ClassVar[str]
    """Name in reports, on the command line and in keys."""

    @property
    def uses_calibration(self) -> bool:
        """Whether the method runs the model on calibration data."""
        return True

    @property
    def uses_gradients(self) -> bool:
        """Whether the score contains regional gradients (RGS)."""
        return False

    @property
    def uses_gram(self) -> bool:
        """Whether weights are solved for with the Gram matrices of the inputs (SparseGPT)."""
        return False

    @property
    def active_optimisation(self) -> RegionalOptimisation | None:
        """Options of the regional optimisation, or None if the block is not optimised with given rates and rounds."""
        return None

    @property
    def tuning_rounds(self) -> int:
        """Rounds of the optimisation that tunes itself; 0 if there is none."""
        return 0

    @abstractmethod
    def score(self, weight: Tensor, input_norm: Tensor | None = None, gradient: Tensor | None = None) -> Tensor:
        """Score a weight matrix; the lowest scores of each row or group are pruned.

        Args:
            weight: Shape (out, in).
            input_norm: Norm of each input feature, shape (in,); given if `uses_calibration`.
            gradient: Regional gradient, shape (out, in); given if `uses_gradients`.

        Returns:
            Scores in float32, shape (out, in).
        """

    def for_samples(self, num_samples: int) -> Self:
        """Return the method with the defaults that depend on the number of calibration samples filled in.

        Args:
            num_samples: Number of calibration samples.

        Raises:
            ValueError: If there are too few.
        """
        if self.uses_calibration and num_samples == 0:
            raise ValueError(f"Expected calibration samples for method={self.name!r}, but got none")
        return self

    def for_trial(self) -> Self:
        """Return the method for a quick trial: at most one round of optimisation."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return name and options as one flat dictionary, for JSON and for keys."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        optimisation = values.pop("optimisation", None)
        nested = {} if optimisation is None else {f.name: getattr(optimisation, f.name) for f in fields(optimisation)}
        return {"method": self.name, **values, **nested}


@dataclass(frozen=True)
class Magnitude(PruningMethod):
    """Magnitude pruning: the score is |W|, without calibration data."""

    name = "magnitude"

    @property
    def uses_calibration(self) -> bool:
        """Whether the method runs the model on calibration data."""
        return False

    def score(self, weight: Tensor, input_norm: Tensor | None = None, gradient: Tensor | None = None) -> Tensor:
        """Score a weight matrix; see `PruningMethod.score`."""
        return magnitude_score(weight)


@dataclass(frozen=True)
class Wanda(PruningMethod):
    """Wanda (arXiv 2306.11695): the score is ‖X‖·|W|."""

    name = "wanda"

    def score(self, weight: Tensor, input_norm: Tensor | None = None, gradient: Tensor | None = None) -> Tensor:
        """Score a weight matrix; see `PruningMethod.score`."""
        assert input_norm is not None
        return regional_score(weight, input_norm)


class _WithGradients(PruningMethod):
    """A method whose score contains regional gradients, weighted by `alpha`."""

    alpha: Alpha

    def __post_init__(self) -> None:
        if self.alpha != "auto" and (isinstance(self.alpha, str) or not 0 <= self.alpha < float("inf")):
            raise ValueError(
                f'Expected argument `alpha` to be a number of at least 0 or "auto", but got {self.alpha!r}'
            )
        if self.alpha != "auto":
            # 5 and 5.0 are one option, so they have one key
            object.__setattr__(self, "alpha", float(self.alpha))

    @property
    def uses_gradients(self) -> bool:
        """Whether the score contains regional gradients (RGS)."""
        return self.alpha != 0

    def score(self, weight: Tensor, input_norm: Tensor | None = None, gradient: Tensor | None = None) -> Tensor:
        """Score a weight matrix; see `PruningMethod.score`."""
        assert input_norm is not None
        return regional_score(weight, input_norm, gradient, self.alpha)


class _WithOptimisation(PruningMethod):
    """A method that optimises each pruned block."""

    optimisation: RegionalOptimisation

    @property
    def active_optimisation(self) -> RegionalOptimisation | None:
        """Options of the regional optimisation, or None if the block is not optimised."""
        return self.optimisation if self.optimisation.rounds > 0 else None

    def for_samples(self, num_samples: int) -> Self:
        """Return the method with `samples_per_round` filled in; see `PruningMethod.for_samples`."""
        method = super().for_samples(num_samples)
        return replace(method, optimisation=self.optimisation.for_samples(num_samples))  # type: ignore[type-var]

    def for_trial(self) -> Self:
        """Return the method with at most one round; see `PruningMethod.for_trial`."""
        if self.active_optimisation is None:
            return self
        trial = replace(self.optimisation, rounds=1, samples_per_round=None)
        return replace(self, optimisation=trial)  # type: ignore[type-var]


@dataclass(frozen=True)
class RGS(_WithGradients):
    """Regional gradient score (Wanda++, section 4.1), without optimisation.

    Args:
        alpha: Weight of the regional gradient in the score. The paper's 100 suits its models' width and text; `auto`
            scales the gradient in each layer so that its mean is a tenth of that of the input norms.

    Raises:
        ValueError: If `alpha` is negative.
    """

    name = "rgs"
    alpha: Alpha = 100.0


@dataclass(frozen=True)
class RO(_WithOptimisation):
    """Wanda's score with regional optimisation (Wanda++, section 4.2).

    Args:
        optimisation: Options of the regional optimisation.
    """

    name = "ro"
    optimisation: RegionalOptimisation = RegionalOptimisation()

    def score(self, weight: Tensor, input_norm: Tensor | None = None, gradient: Tensor | None = None) -> Tensor:
        """Score a weight matrix; see `PruningMethod.score`."""
        assert input_norm is not None
        return regional_score(weight, input_norm)


@dataclass(frozen=True)
class WandaPP(_WithGradients, _WithOptimisation):
    """Wanda++ (ACL Findings 2025, arXiv 2503.04992): regional gradient score and regional optimisation.

    Args:
        alpha: Weight of the regional gradient in the score. The paper's 100 suits its models' width and text; `auto`
            scales the gradient in each layer so that its mean is a tenth of that of the input norms.
        optimisation: Options of the regional optimisation.

    Raises:
        ValueError: If `alpha` is negative.
    """

    name = "wanda++"
    alpha: Alpha = 100.0
    optimisation: RegionalOptimisation = RegionalOptimisation()


@dataclass(frozen=True)
class SparseGPT(PruningMethod):
    """SparseGPT (arXiv 2301.00774): prune column by column and adjust the later columns for the error."""

    name = "sparsegpt"

    @property
    def uses_gram(self) -> bool:
        """Whether weights are solved for with the Gram matrices of the inputs (SparseGPT)."""
        return True

    def score(self, weight: Tensor, input_norm: Tensor | None = None, gradient: Tensor | None = None) -> Tensor:
        """Magnitudes, for the report only: masks are chosen column by column in `method.sparsegpt`."""
        return magnitude_score(weight)


@dataclass(frozen=True)
class TunedRO(SparseGPT):
    """Regional optimisation that tunes itself, from the masks and weights of SparseGPT.

    As in the regional optimisation of Wanda++ (section 4.2), each block is trained to reproduce its output. It differs
    in that nothing has to be chosen for a model: the target is the hidden states of the unpruned model, the error of a
    token is relative to its size, steps are relative to the size of a layer's weights, and one calibration sample in
    eight is held out to choose the rate and the round that is kept. No block ends with a larger held-out error than
    SparseGPT's. Findings and figures: docs/ablation.md.

    Args:
        rounds: Passes over the calibration samples that are not held out, with one optimizer step per sample. By
            default 4, or fewer if there are more than 64 samples, down to 1 with 256 or more.

    Raises:
        ValueError: If `rounds` is less than 1.
    """

    name = "tuned-ro"
    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.rounds is not None:
            check_at_least("rounds", self.rounds, 1)

    @property
    def tuning_rounds(self) -> int:
        """Rounds of the optimisation that tunes itself."""
        return _MAX_TUNING_ROUNDS if self.rounds is None else self.rounds

    def for_samples(self, num_samples: int) -> Self:
        """Return the method with `rounds` filled in; see `PruningMethod.for_samples`."""
        method = super().for_samples(num_samples)
        if method.rounds is not None:
            return method
        # more text is worth more than more passes
        rounds = min(_MAX_TUNING_ROUNDS, max(1, round(_TUNING_SAMPLES / num_samples)))
        return replace(method, rounds=rounds)

    def for_trial(self) -> Self:
        """Return the method with one round; see `PruningMethod.for_trial`."""
        return replace(self, rounds=1)


METHODS: dict[str, type[PruningMethod]] = {
    method.name: method for method in (Magnitude, Wanda, RGS, RO, WandaPP, SparseGPT, TunedRO)
}
"""All methods by name."""


def make_method(method: PruningMethod | str) -> PruningMethod:
    """Return a method as given, or one with its default options by name.

    Args:
        method: A method, or a name such as `wanda`.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(method, PruningMethod):
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"Expected argument `method` to be one of {', '.join(METHODS)}, or a PruningMethod, but got {method!r}"
        )
    return METHODS[method]()


def method_from_dict(values: Mapping[str, Any]) -> PruningMethod:
    """Build a method from its flat dictionary; the inverse of `PruningMethod.to_dict`.

    Args:
        values: `method`, the name, and options of this method; options that are left out have their defaults.

    Raises:
        ValueError: If the method is unknown, or has no such option.
    """
    method = make_method(values.get("method", TunedRO.name))
    options = {name: value for name, value in values.items() if name != "method"}
    known = {field.name: field for field in fields(method)}  # type: ignore[arg-type]
    if "optimisation" in known:
        nested = {field.name for field in fields(RegionalOptimisation)}
        given = {name: options.pop(name) for name in nested & options.keys()}
        options["optimisation"] = RegionalOptimisation(**given)
    for name in options.keys() - known.keys():
        choices = [*known.keys() - {"optimisation"}, *(nested if "optimisation" in known else ())]
        raise ValueError(
            f"Expected options of method={method.name!r}, but got `{name}`; {closest_names(name, sorted(choices))}"
        )
    return replace(method, **options)  # type: ignore[type-var]
