"""wandazeta: prune language models with Wanda++, fine-tune them with forward passes alone (AdaZeta)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wandazeta.version import __version__

if TYPE_CHECKING:
    from wandazeta.adapters.files import load_adapters
    from wandazeta.api import evaluate, prune

__all__ = ["__version__", "evaluate", "load_adapters", "prune"]

_MODULES = {
    "evaluate": "wandazeta.api",
    "load_adapters": "wandazeta.adapters.files",
    "prune": "wandazeta.api",
}


def __getattr__(name: str) -> Any:
    # lazy: `wandazeta --help` and `--version` must not wait for torch
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
