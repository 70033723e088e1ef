"""Callbacks of Lightning beside modules that insert adapters in `setup`."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from wandazeta.lightning_compat import copies_module

__all__ = ["copy_module_again", "model_states", "refuse_callbacks"]


def refuse_callbacks(trainer: Trainer, owner: str, refused: Mapping[type[Callback], str]) -> None:
    """Raise an error if a callback of the trainer does not work with a module.

    Args:
        trainer: The trainer.
        owner: What the callbacks do not work with.
        refused: Classes of callbacks, each with the reason and the remedy.

    Raises:
        ValueError: If there is one.
    """
    for callback in _callbacks(trainer):
        for kind, reason in refused.items():
            if isinstance(callback, kind):
                raise ValueError(
                    f"Expected argument `callbacks` to have no {type(callback).__name__} for {owner}, but got one: "
                    f"{reason}"
                )


def copy_module_again(trainer: Trainer, module: LightningModule, stage: str) -> None:
    """Repeat the `setup` of callbacks that copy the module there, once it has its adapters.

    Callbacks are set up before the module, because one of them may prune the weights that adapters go on.

    Args:
        trainer: The trainer.
        module: The module.
        stage: The stage of the trainer.
    """
    for callback in _callbacks(trainer):
        if copies_module(callback):
            callback.setup(trainer, module, stage)


def model_states(checkpoint: dict[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the states of the module in a checkpoint with their keys: with WeightAveraging, two of them.

    `state_dict` is then the average, and `current_model_state` what training continues from.

    Args:
        checkpoint: The checkpoint; without any of them under DeepSpeed, which saves them itself.
    """
    for key in ("state_dict", "current_model_state"):
        if key in checkpoint:
            yield key, checkpoint[key]


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return list(callbacks)
