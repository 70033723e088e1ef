"""What decides the result of a pruning, as hashes that can be compared and named."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from wandazeta.models.streaming import whole
from wandazeta.pruning.calibration import leaves
from wandazeta.utilities.hashing import digest_tensor

_PARTS = ("options", "model", "calibration", "environment")


@dataclass(frozen=True)
class PruneKey:
    """Everything that decides the result of a pruning, in parts so that a refusal can name the difference.

    Args:
        options: The pruning options, and the name of the block list.
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
        """Returns the parts as plain dictionaries, as JSON would give them back."""
        parts = {name: getattr(self, name) for name in _PARTS}
        return json.loads(json.dumps(parts))

    @classmethod
    def from_dict(cls, parts: dict[str, Any]) -> "PruneKey":
        """Rebuilds a key from `to_dict`.

        Args:
            parts: What `to_dict` returned.
        """
        return cls(**{name: parts[name] for name in _PARTS})

    def difference(self, found: "PruneKey", parts: Iterable[str]) -> str | None:
        """Names what differs, `found` (the folder) against this key (the run).

        Args:
            found: The key that a folder was made with.
            parts: The parts to compare.

        Returns:
            A phrase for an error message, or `None` if the parts are equal.
        """
        mine, theirs = self.to_dict(), found.to_dict()
        phrases = []
        for part in parts:
            names = [
                name for name in sorted({*mine[part], *theirs[part]}) if mine[part].get(name) != theirs[part].get(name)
            ]
            if not names:
                continue
            if part == "model":
                phrases.append(f"{len(names)} of {len(mine[part])} model tensors, first `{names[0]}`")
            elif part == "calibration":
                phrases.append(f"the calibration data ({', '.join(names)})")
            else:
                phrases += [f"`{name}` ({theirs[part].get(name)} there, {mine[part].get(name)} here)" for name in names]
        return ", ".join(phrases) or None


def digest_model(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Digests each tensor by name, sorted.

    Args:
        tensors: Parameters and buffers; those that are stored are read one at a time.
    """
    return {name: digest_tensor(whole(tensors[name])) for name in sorted(tensors)}


def digest_batches(batches: list[Any], token_mask: Callable[[Any], Tensor | None]) -> str:
    """Hashes calibration batches: their tensors, plain values and token masks, in order.

    Args:
        batches: What `collect_batches` returned.
        token_mask: The function that marks the tokens that count.

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
