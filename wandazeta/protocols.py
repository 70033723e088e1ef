"""Optional methods and attributes by which modules, data modules and callbacks work together.

Each protocol names one thing that a callback or a data module looks for on an object of another kind. A module or data
module of your own takes part by having the method or attribute; it does not have to inherit from anything here.

Examples:
    >>> from wandazeta.protocols import SupportsFingerprint
    >>> class Words:
    ...     def fingerprint(self) -> str:
    ...         return "42"
    >>> isinstance(Words(), SupportsFingerprint)
    True
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

__all__ = [
    "HasMaxPositions",
    "HasPrunedBackboneKey",
    "HasStepBudget",
    "HasTokenizer",
    "HasUnusedModules",
    "SupportsCalibrationData",
    "SupportsCalibrationForward",
    "SupportsDataSharding",
    "SupportsFingerprint",
]


@runtime_checkable
class SupportsCalibrationForward(Protocol):
    """A module that knows how to run its model on a calibration batch.

    `WandaPPPruneCallback` calls it instead of the module's `forward`, for modules whose `forward` or `training_step`
    does more than run the model.
    """

    def calibration_forward(self, batch: Any) -> object:
        """Run every decoder block on one calibration batch; the return value is ignored.

        Args:
            batch: A batch of the calibration data.
        """
        ...


@runtime_checkable
class SupportsCalibrationData(Protocol):
    """A data module with data to calibrate a pruning, other than its training data."""

    def calibration_dataloader(self) -> Iterable[Any] | None:
        """Return the batches of the calibration data, or None to use the training data.

        `WandaPPPruneCallback` calls it after `prepare_data` and `setup`.
        """
        ...


@runtime_checkable
class SupportsDataSharding(Protocol):
    """A module that decides how training data are divided among the ranks.

    Without it, every rank gets a share of its own. `wandazeta`'s data modules read it through the trainer; a sampler
    of your own has to do the same if ranks shall see equal batches.
    """

    @property
    def data_sharding(self) -> tuple[int, int]:
        """Number of shares of the training data, and the share of this rank: `(1, 0)` gives every rank all data."""
        ...


@runtime_checkable
class SupportsFingerprint(Protocol):
    """A module or data module whose content can be compared across ranks.

    `RankConsistencyCheck` refuses to fit if the fingerprints of two ranks differ.
    """

    def fingerprint(self) -> str:
        """Return a digest of the weights or of the training data, equal on every rank that has the same ones."""
        ...


@runtime_checkable
class HasTokenizer(Protocol):
    """A module or data module with a tokenizer of transformers.

    Data modules without a tokenizer of their own use the module's, and `wandazeta prune` saves it with the model.
    """

    tokenizer: Any
    """The tokenizer, or None as long as it is not loaded."""


@runtime_checkable
class HasMaxPositions(Protocol):
    """A module that knows how many positions its model has learned.

    Data modules refuse longer texts. Without the attribute they look for a table of positions in the module, which a
    module that builds its model late does not have yet.
    """

    @property
    def max_positions(self) -> int | None:
        """Largest number of tokens of a sequence, or None for no limit, as with rotary positions."""
        ...


@runtime_checkable
class HasPrunedBackboneKey(Protocol):
    """A module that stores in its checkpoints which pruning they were trained on.

    `WandaPPPruneCallback` sets the attribute once the module is pruned.
    """

    pruned_backbone_key: str | None
    """Key of the pruning, or None if the model was not pruned by a callback."""


@runtime_checkable
class HasStepBudget(Protocol):
    """A module that ends its training by itself, for a budget of its own.

    Progress bar and messages show the steps up to that end.
    """

    @property
    def step_budget(self) -> int | None:
        """Number of steps from the start of the training after which it ends, as known now; None for no end."""
        ...


@runtime_checkable
class HasUnusedModules(Protocol):
    """A model with submodules whose output it does not use, such as an encoder's pooler below a new head.

    They get no adapters and are not trained.
    """

    @property
    def unused_modules(self) -> Sequence[nn.Module]:
        """The modules; everything inside them is unused, too."""
        ...
