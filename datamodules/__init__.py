"""LightningDataModules: text windows, and classification by a head or by prompts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classification import ClassificationDataModule
    from .prompted import PromptedClassificationDataModule
    from .text import TextDataModule

__all__ = ["ClassificationDataModule", "PromptedClassificationDataModule", "TextDataModule"]

_HOMES = {
    "ClassificationDataModule": ".classification",
    "PromptedClassificationDataModule": ".prompted",
    "TextDataModule": ".text",
}


def __getattr__(name: str) -> Any:
    # lazy, so that fetching samples (`python -m wandazeta.datamodules.samples`) loads no lightning
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
