"""LightningModules: a language model to evaluate, and fine-tuned with forward passes alone or by back-propagation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter_files import load_adapters
    from .first_order import FirstOrderModule
    from .language_model import LanguageModel
    from .zeroth_order import ZerothOrderModule

__all__ = ["FirstOrderModule", "LanguageModel", "ZerothOrderModule", "load_adapters"]

_HOMES = {
    "FirstOrderModule": ".first_order",
    "LanguageModel": ".language_model",
    "ZerothOrderModule": ".zeroth_order",
    "load_adapters": ".adapter_files",
}


def __getattr__(name: str) -> Any:
    # lazy, so that the plain-torch cores (adapters, zo) import without lightning
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
