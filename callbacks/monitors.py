"""Peak memory of a training run, logged and kept in its checkpoints."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from wandazeta.lightning_compat import is_logging_step
from wandazeta.utilities.memory import peak_memory


class PeakMemoryMonitor(Callback):
    """Logs `peak_memory_gib`, the peak memory of the GPU, or of the process if the module is on the CPU.

    A resumed run continues with the peak of its checkpoint; `peak_bytes` holds it.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.peak_bytes = max(self.peak_bytes, peak_memory(pl_module.device))
        if is_logging_step(trainer, batch_idx):
            pl_module.log("peak_memory_gib", self.peak_bytes / 2**30)

    @override
    def state_dict(self) -> dict[str, int]:
        return {"peak_bytes": self.peak_bytes}

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.peak_bytes = max(self.peak_bytes, state_dict["peak_bytes"])
