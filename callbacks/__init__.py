"""Lightning callbacks, reusable in any project."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .end_together import EndTogether
    from .keep_sparsity import KeepSparsity
    from .monitors import PeakMemoryMonitor
    from .requeue import RequeueTogether
    from .start_alike import StartAlike
    from .wandapp import WandaPPPruneCallback
    from .whole_files import WholeFileCheckpointIO

__all__ = [
    "EndTogether",
    "KeepSparsity",
    "PeakMemoryMonitor",
    "RequeueTogether",
    "StartAlike",
    "WandaPPPruneCallback",
    "WholeFileCheckpointIO",
]

_HOMES = {
    "EndTogether": ".end_together",
    "KeepSparsity": ".keep_sparsity",
    "PeakMemoryMonitor": ".monitors",
    "RequeueTogether": ".requeue",
    "StartAlike": ".start_alike",
    "WandaPPPruneCallback": ".wandapp",
    "WholeFileCheckpointIO": ".whole_files",
}


def __getattr__(name: str) -> Any:
    # lazy, so that the plain-torch core `wandazeta.callbacks.pruning` imports without lightning
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
