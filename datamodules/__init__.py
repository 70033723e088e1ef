"""LightningDataModules: text windows and prompted classification."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classification import PromptedClassificationDataModule
    from .text import TextDataModule

__all__ = ["PromptedClassificationDataModule", "TextDataModule"]

_HOMES = {"PromptedClassificationDataModule": ".classification", "TextDataModule": ".text"}


def __getattr__(name: str) -> Any:
    # lazy, so that fetching samples (`python -m wandazeta.datamodules.samples`) loads no lightning
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
