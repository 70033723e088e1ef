"""Find out which module a Lightning checkpoint is of, and refuse one that a module cannot load, in one line."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# entries that the modules add to their checkpoints
_ENTRIES = {"zeroth_order": "ZerothOrderModule", "first_order": "FirstOrderModule", "language_model": "LanguageModel"}


def class_of(checkpoint: Mapping[str, Any]) -> str:
    """Return the class of the module that wrote a checkpoint, for an error message.

    Args:
        checkpoint: A checkpoint of Lightning.
    """
    name = next((name for entry, name in _ENTRIES.items() if entry in checkpoint), None)
    if name is None:
        return "another module"
    trainable = checkpoint[next(entry for entry in _ENTRIES if entry in checkpoint)].get("trainable")
    return name if trainable is None else f"{name} ({trainable})"


def require_checkpoint_of(entry: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a module in a checkpoint.

    Args:
        entry: Name of the entry that the module adds to its checkpoints.
        checkpoint: A checkpoint of Lightning.

    Raises:
        ValueError: If the checkpoint is of a module of another class, naming both.
    """
    if entry not in checkpoint:
        raise ValueError(
            f"Expected a checkpoint of {_ENTRIES[entry]}, but got one of {class_of(checkpoint)}; give this checkpoint "
            "to a module of its class, or start without it"
        )
    found: dict[str, Any] = checkpoint[entry]
    return found


def require_weights_of(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Check that a checkpoint holds all weights of a module that trains none of its own, and no other.

    Args:
        module: The module.
        checkpoint: A checkpoint of Lightning; under DeepSpeed, whose files are separate, it holds no weights.

    Raises:
        ValueError: If it is an adapter checkpoint, naming the class that it is of, or its weights are other ones.
    """
    found = checkpoint.get("state_dict")
    if found is None:
        return
    kind, expected = type(module).__name__, module.state_dict()
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or unexpected:
        holds = ", which holds what was trained and not the model" if missing else ""
        names = [f"{len(missing)} weights are missing, first `{min(missing)}`"] if missing else []
        names += [f"{len(unexpected)} are unexpected, first `{min(unexpected)}`"] if unexpected else []
        raise ValueError(
            f"Expected a checkpoint of {kind}, but got one of {class_of(checkpoint)}{holds}: {', '.join(names)}; give "
            "it to a module of its class"
        )
    for name, tensor in expected.items():
        if isinstance(found[name], torch.Tensor) and found[name].shape != tensor.shape:
            raise ValueError(
                f"Expected a checkpoint of the model of this {kind}, but `{name}` has shape "
                f"{tuple(found[name].shape)} there and {tuple(tensor.shape)} here; name the model that it is of"
            )
