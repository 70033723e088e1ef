"""wandazeta: prune language models with Wanda++, fine-tune them with forward passes alone (AdaZeta)."""

from typing import TYPE_CHECKING, Any

from wandazeta.version import __version__

if TYPE_CHECKING:
    from wandazeta.adapters.files import load_adapters

__all__ = ["__version__", "load_adapters"]


def __getattr__(name: str) -> Any:
    # lazy: `wandazeta --help` and `--version` must not wait for torch
    if name == "load_adapters":
        from wandazeta.adapters.files import load_adapters

        return load_adapters
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
