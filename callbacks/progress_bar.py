"""Lightning callback that draws the progress of a whole fit."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

from wandazeta.lightning_compat import num_training_steps, update_bar_metrics


class RunProgressBar(RichProgressBar):
    """Progress bar whose steps and time left are those of the whole fit instead of the epoch.

    A fit without a known end shows the epoch, as Lightning's own bar does.

    Args:
        refresh_rate: Number of updates per second; 0 turns the bar off.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_disabled or num_training_steps(trainer) is None:
            super().on_train_epoch_start(trainer, pl_module)
        else:
            self._show_step(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_disabled or num_training_steps(trainer) is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        self._show_step(trainer)
        update_bar_metrics(self, trainer, pl_module)
        self.refresh()

    def _show_step(self, trainer: Trainer) -> None:
        assert self.progress is not None
        # as wide as that of the validation, so that the bars do not move
        description = f"{f'Epoch {trainer.current_epoch}':{len(self.validation_description)}}"
        step, total = trainer.global_step, num_training_steps(trainer)
        if self.train_progress_bar_id is None:
            self.train_progress_bar_id = self.progress.add_task(description, total=total, completed=step)
        self.progress.update(self.train_progress_bar_id, total=total, completed=step, description=description)
        self.refresh()
