"""Key of a pruning: hashes of everything that decides its result, which can be compared part by part."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from wandazeta.models.streaming import materialize
from wandazeta.pruning.calibration import leaves
from wandazeta.utilities.hashing import digest_tensor

__all__ = ["PruneKey", "digest_batches", "digest_model"]

_PARTS = ("options", "model", "calibration", "environment")


@dataclass(frozen=True)
class PruneKey:
    """Everything that decides the result of a pruning, in parts, so that an error message can name the difference.

    Args:
        options: The pruning options, and the name of the list of blocks.
        model: A digest of every tensor that the calibration forward reads, by name.
        calibration: The number of samples and a digest of their contents.
        environment: Versions of the software, and the kind of device.
    """

    options: dict[str, Any]
    model: dict[str, str]
    calibration: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """One hash over all parts."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:32]

    def to_dict(self) -> dict[str, Any]:
        """The parts as plain dictionaries, equal to what reading them from JSON returns."""
        parts = {name: getattr(self, name) for name in _PARTS}
        return json.loads(json.dumps(parts))

    @classmethod
    def from_dict(cls, parts: dict[str, Any]) -> "PruneKey":
        """Build a key from the dictionary that `to_dict` returned."""
        return cls(**{name: parts[name] for name in _PARTS})

    def difference(self, found: "PruneKey", parts: Iterable[str]) -> str | None:
        """Describe how another key differs from this one.

        Args:
            found: The other key, such as that of a progress folder ("there"); this key is that of the run ("here").
            parts: The parts to compare.

        Returns:
            A phrase for an error message, or None if the parts are equal.
        """
        mine, theirs = self.to_dict(), found.to_dict()
        # an option for the user, though it belongs to the data
        for key in (mine, theirs):
            if key["calibration"]:
                key["options"]["num_calibration_samples"] = key["calibration"].pop("num_samples")
        if not (mine["calibration"] and theirs["calibration"]):
            # nothing to compare: one is without calibration data, by its method or for reading
            for key in (mine, theirs):
                key["options"].pop("num_calibration_samples", None)
        phrases: list[str] = []
        for part in parts:
            here, there = mine[part], theirs[part]
            names = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
            if phrases:
                # options decide which tensors and samples are read, so only what both have read can differ, too
                names = [name for name in names if name in here and name in there and part != "calibration"]
            if not names:
                continue
            if part == "model":
                phrases.append(f"{len(names)} of {len(here)} model tensors, first `{names[0]}`")
            elif part == "calibration":
                phrases.append("the calibration data")
            else:
                phrases += [f"`{name}` ({there.get(name)} there, {here.get(name)} here)" for name in names]
        return ", ".join(phrases) or None


def digest_model(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Hash every tensor of a model.

    Args:
        tensors: Parameters and buffers by name; those stored in files are read one at a time.

    Returns:
        Hashes by name, sorted by name.
    """
    return {name: digest_tensor(materialize(tensors[name])) for name in sorted(tensors)}


def digest_batches(batches: list[Any], token_mask: Callable[[Any], Tensor | None]) -> str:
    """Hash calibration batches: their tensors, plain values and token masks, in order.

    Args:
        batches: The batches.
        token_mask: Returns the mask of the tokens of a batch that are not padding, or None.

    Returns:
        A hexadecimal SHA-256, cut to 32 digits.
    """
    digest = hashlib.sha256()
    for batch in batches:
        for leaf in [*leaves(batch), token_mask(batch)]:
            if isinstance(leaf, Tensor):
                digest.update(digest_tensor(leaf).encode())
            elif leaf is None or isinstance(leaf, (str, int, float, bool)):
                digest.update(repr(leaf).encode())
    return digest.hexdigest()[:32]
