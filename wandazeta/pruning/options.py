"""The options that decide the result of a pruning."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from wandazeta.pruning.methods import PruningMethod, TunedRO, make_method, method_from_dict
from wandazeta.pruning.pattern import SparsityPattern
from wandazeta.utilities.arguments import check_at_least, check_choice

ComputeDtype = Literal["model", "bfloat16"]

_PATTERN = ("sparsity_pattern", "sparsity", "sparsity_slope")
_OTHERS = ("exclude_modules", "compute_dtype", "seed")


@dataclass(frozen=True)
class PruneOptions:
    """Options of a pruning; two prunings with equal options, model and data give the same weights.

    Args:
        method: The pruning method; a name such as `"wanda"` is converted to the method with its default options.
        pattern: The sparsity pattern; a string such as `"2:4"` is converted.
        exclude_modules: Names of modules inside the blocks that stay dense, or regular expressions.
        compute_dtype: Precision of the block's matrix products: the `model`'s, or `bfloat16` by autocast. Weights,
            statistics and scores keep their precision.
        seed: Seed of the calibration samples and of the draws of each round.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> PruneOptions("wanda", "4:8").to_dict()["sparsity_pattern"]
        '4:8'
    """

    method: PruningMethod = field(default_factory=TunedRO)
    pattern: SparsityPattern = field(default_factory=SparsityPattern)
    exclude_modules: tuple[str, ...] = ()
    compute_dtype: ComputeDtype = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", make_method(self.method))
        if not isinstance(self.pattern, SparsityPattern):
            object.__setattr__(self, "pattern", SparsityPattern(self.pattern))
        check_choice("compute_dtype", self.compute_dtype, get_args(ComputeDtype))
        check_at_least("seed", self.seed, 0)
        if isinstance(self.exclude_modules, str):
            raise ValueError(f"Expected argument `exclude_modules` to be a list, but got {self.exclude_modules!r}")
        # a list, as YAML and JSON give it, would make the options unhashable
        object.__setattr__(self, "exclude_modules", tuple(self.exclude_modules))
        for pattern in self.exclude_modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"Expected argument `exclude_modules` to hold names or regular expressions, but got {pattern!r} "
                    f"({error})"
                ) from error

    def for_samples(self, num_samples: int) -> "PruneOptions":
        """Return the options with the defaults that depend on the number of calibration samples filled in.

        Args:
            num_samples: Number of calibration samples.

        Raises:
            ValueError: If there are too few for the method.
        """
        return replace(self, method=self.method.for_samples(num_samples))

    def for_trial(self, num_samples: int) -> "PruneOptions":
        """Return the options for a quick trial on a few samples: at most one round of optimisation.

        Args:
            num_samples: Number of calibration samples.
        """
        return replace(self, method=self.method.for_trial()).for_samples(num_samples)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as one flat dictionary of plain values, for JSON and for keys."""
        return {
            **self.method.to_dict(),
            **self.pattern.to_dict(),
            "exclude_modules": list(self.exclude_modules),
            "compute_dtype": self.compute_dtype,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PruneOptions":
        """Build options from a flat dictionary; the inverse of `to_dict`.

        Args:
            values: Options by name; those that are left out have their defaults.

        Raises:
            ValueError: If the method has no such option, or a value is out of range.
        """
        pattern = {name: values[name] for name in _PATTERN if name in values}
        others = {name: values[name] for name in _OTHERS if name in values}
        of_method = {name: value for name, value in values.items() if name not in (*_PATTERN, *_OTHERS)}
        return cls(method_from_dict(of_method), SparsityPattern(**pattern), **others)
