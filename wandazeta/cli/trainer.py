"""Lightning's Trainer with the commands `prune` and `diagnose`."""

import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from wandazeta.callbacks import RankWatchdog, WandaPPPruneCallback
from wandazeta.callbacks.run_record import RunRecord
from wandazeta.lightning_compat import checkpoint_path
from wandazeta.utilities.ranks import prepare_to_join


class PruningTrainer(Trainer):
    """Lightning's Trainer with two more entry points; each is a command of `wandazeta`."""

    callbacks: list[Callback]

    def prune(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        output_dir: str = "runs/pruned_model",
        pack: bool = False,
    ) -> None:
        """Prune without fitting and write a Hugging Face directory.

        Several processes share the calibration samples, those of torchrun or srun or as many as `trainer.devices`.

        Args:
            model: The module whose model is pruned.
            datamodule: Calibration data, unless the callback has its own.
            output_dir: Directory to write: weights, tokenizer, masks, report and model card.
            pack: Write the 2:4 packed form too, `sparsity/model.2of4.safetensors`: smaller to ship, the same weights.

        Raises:
            ValueError: If the trainer does not have exactly one WandaPPPruneCallback, or an argument does not fit.
        """
        callbacks = [callback for callback in self.callbacks if isinstance(callback, WandaPPPruneCallback)]
        if len(callbacks) != 1:
            raise ValueError(
                f"Expected one WandaPPPruneCallback, but got {len(callbacks)}; give a `prune:` group or one in "
                "`trainer.callbacks`"
            )
        launcher, arguments = self.strategy.launcher, (model, datamodule, callbacks[0], output_dir, pack)
        if launcher is None:
            self._prune(*arguments)
        else:
            launcher.launch(self._prune, *arguments, trainer=self)

    def _prune(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None,
        pruning: WandaPPPruneCallback,
        output_dir: str,
        pack: bool,
    ) -> None:
        """Prune, as one of the processes that the launcher started."""
        from wandazeta.cli.prune import prune_module

        if self.world_size > 1:
            prepare_to_join()
        self.strategy.setup_environment()
        # of the other callbacks, only these work without a fit
        others = [callback for callback in self.callbacks if isinstance(callback, (RankWatchdog, RunRecord))]
        try:
            for callback in others:
                callback.setup(self, model, "fit")
            prune_module(self, model, datamodule, pruning, output_dir, pack=pack)
        except BaseException as error:
            for callback in others:
                callback.on_exception(self, model, error)
            raise
        for callback in others:
            callback.teardown(self, model, "fit")
        if self.is_global_zero:
            sys.stdout.write(f"pruned model: {Path(output_dir).absolute()}\n")

    def diagnose(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        output_dir: str = "runs/diagnosis",
        num_batches: int = 2,
        num_queries: int = 16,
        epsilons: list[float] | None = None,
    ) -> None:
        """Find the range of epsilon that suits a ZerothOrderModule and its data, without training.

        Args:
            model: The module, with the adapters and the precision of the planned training.
            datamodule: The data of the planned training.
            ckpt_path: Checkpoint to measure at; by default the start of training.
            output_dir: Directory to write: epsilon.json and, with matplotlib, epsilon.svg.
            num_batches: Training batches to measure on.
            num_queries: Directions per batch.
            epsilons: Values to try; by default half decades from 1e-5 to 0.1.

        Raises:
            ValueError: If an argument does not fit.
        """
        from wandazeta.modules.diagnose import EpsilonDiagnosis
        from wandazeta.utilities.files import check_writable

        # before the measurement, which takes minutes
        check_writable(Path(output_dir))
        diagnosis = EpsilonDiagnosis(num_batches, num_queries, epsilons)
        if ckpt_path in ("best", "last"):
            # resolved here, because the callbacks that know the file are removed next
            ckpt_path = checkpoint_path(self, ckpt_path)
        # a checkpoint of this untrained module would be the newest one, and the next `fit` would resume from it
        self.callbacks[:] = [callback for callback in self.callbacks if not isinstance(callback, Checkpoint)]
        self.callbacks.append(diagnosis)
        self.num_sanity_val_steps = 0
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        diagnosis.write_report(output_dir)
