"""Lightning callbacks, reusable in any project."""

from wandazeta.callbacks.checkpoint_io import AtomicCheckpointIO
from wandazeta.callbacks.cluster.consistency import RankConsistencyCheck
from wandazeta.callbacks.cluster.requeue import SLURMRequeue
from wandazeta.callbacks.cluster.watchdog import RankWatchdog
from wandazeta.callbacks.keep_sparsity import KeepSparsity
from wandazeta.callbacks.monitors import PeakMemoryMonitor
from wandazeta.callbacks.predictions import PredictionWriter
from wandazeta.callbacks.progress_bar import RunProgressBar
from wandazeta.callbacks.prune import WandaPPPruneCallback

__all__ = [
    "AtomicCheckpointIO",
    "KeepSparsity",
    "PeakMemoryMonitor",
    "PredictionWriter",
    "RankConsistencyCheck",
    "RankWatchdog",
    "RunProgressBar",
    "SLURMRequeue",
    "WandaPPPruneCallback",
]


def __dir__() -> list[str]:
    return __all__
