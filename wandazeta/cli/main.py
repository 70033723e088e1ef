"""The command line: `wandazeta fit | prune | diagnose | validate | test | predict`."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch.distributed as dist
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from wandazeta import __version__

# imported for their short names in YAML (`class_path: ZerothOrderModule`), too
from wandazeta.callbacks import (
    AtomicCheckpointIO,
    KeepSparsity,
    PeakMemoryMonitor,
    RankConsistencyCheck,
    RankWatchdog,
    SLURMRequeue,
    WandaPPPruneCallback,
)
from wandazeta.callbacks.run_record import RankLog, RunRecord, keep_metrics
from wandazeta.datamodules import ClassificationDataModule, PromptedClassificationDataModule, TextDataModule
from wandazeta.modules import FirstOrderModule, LanguageModel, ZerothOrderModule

__all__ = [
    "ClassificationDataModule",
    "FirstOrderModule",
    "KeepSparsity",
    "LanguageModel",
    "PeakMemoryMonitor",
    "PromptedClassificationDataModule",
    "PruningTrainer",
    "RankConsistencyCheck",
    "RankWatchdog",
    "TextDataModule",
    "WandaPPPruneCallback",
    "WandazetaCLI",
    "ZerothOrderModule",
    "command_line",
    "main",
]

_DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class PruningTrainer(Trainer):
    """Lightning's Trainer, and with it the commands `prune` and `diagnose`."""

    callbacks: list[Callback]

    def prune(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        output_dir: str = "runs/pruned_model",
        pack: bool = False,
    ) -> None:
        """Prune without fitting and write a Hugging Face directory.

        Args:
            model: The module whose model is pruned.
            datamodule: Where calibration data come from, unless the callback has its own.
            output_dir: Directory to write: weights, tokenizer, masks, report and model card.
            pack: Write the 2:4 packed form too, `sparsity/model.2of4.safetensors`: smaller to ship, the same weights.

        Raises:
            ValueError: If the trainer does not have exactly one WandaPPPruneCallback, or anything does not fit.
        """
        from wandazeta.pruning.export.pretrained import prune_and_export

        callbacks = [callback for callback in self.callbacks if isinstance(callback, WandaPPPruneCallback)]
        if len(callbacks) != 1:
            raise ValueError(
                f"Expected one WandaPPPruneCallback in `trainer.callbacks`, but got {len(callbacks)}; "
                "it says what to prune and how"
            )
        for callback in self.callbacks:
            if isinstance(callback, RunRecord):
                # the only other callback with a part in this
                callback.setup(self, model, "fit")
        prune_and_export(self, model, datamodule, callbacks[0], output_dir, pack=pack)
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
        """Measure at which epsilon the differences of losses are slopes, for a ZerothOrderModule; nothing is trained.

        Args:
            model: The module, with the adapters and the precision that it is to be trained with.
            datamodule: The data that it is to be trained on.
            ckpt_path: Checkpoint whose adapters to measure at; by default where training starts.
            output_dir: Directory to write: epsilon.json and, with matplotlib, epsilon.svg.
            num_batches: Training batches to measure on.
            num_queries: Directions for each batch.
            epsilons: Distances to try; by default half decades from 1e-5 to 0.1.

        Raises:
            ValueError: If anything does not fit.
        """
        from wandazeta.modules.diagnose import EpsilonDiagnosis
        from wandazeta.utilities.files import check_writable

        # written at the end, after all the work
        check_writable(Path(output_dir))
        diagnosis = EpsilonDiagnosis(num_batches, num_queries, epsilons)
        checkpoint: str | Path | None = ckpt_path
        if ckpt_path in ("best", "last"):
            # found by the callbacks that go next
            checkpoint = self._checkpoint_connector._parse_ckpt_path(
                TrainerFn.FITTING, ckpt_path, model_provided=True, model_connected=False
            )
        # nothing is trained: what they wrote would be the newest, and the next `fit` would go on from it
        self.callbacks[:] = [callback for callback in self.callbacks if not isinstance(callback, Checkpoint)]
        self.callbacks.append(diagnosis)
        self.num_sanity_val_steps = 0
        self.fit(model, datamodule=datamodule, ckpt_path=checkpoint)
        diagnosis.write_report(output_dir)


class WandazetaCLI(LightningCLI):
    """LightningCLI with `prune` and `diagnose`; all others go on from the last checkpoint unless told otherwise."""

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return LightningCLI.subcommands() | {name: {"model", "datamodule"} for name in ("prune", "diagnose")}

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # the model last, for that is the order of instantiation: what is wrong elsewhere shows before it is loaded
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand not in ("prune", "diagnose"):
            parser.set_defaults({"ckpt_path": "last"})
        return parser

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self._get(self.config_init, "trainer")
        if given.logger in (None, True):
            # Lightning's default, but for tensorboard, which it would choose where that happens to be installed
            root = given.default_root_dir or "."
            kwargs["logger"] = CSVLogger(root, version=SLURMEnvironment.job_id())
        trainer = super().instantiate_trainer(**kwargs)
        keep_metrics(trainer.loggers)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        records = [callback for callback in callbacks if isinstance(callback, RunRecord)]
        others = [callback for callback in callbacks if not isinstance(callback, RunRecord)]
        # before the one that prunes in its `setup`, for hours; LightningCLI would put them behind
        callbacks[:] = [RankWatchdog(), *records, RankConsistencyCheck(), *others]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    @override
    def _parse_ckpt_path(self) -> None:
        # a file is read here, for parameters that it may hold
        given = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        if given is None:
            return
        _check_checkpoint(str(given))
        try:
            super()._parse_ckpt_path()
        except Exception as error:
            # torch raises many kinds, by where the bytes stop making sense
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise _no_checkpoint(str(given), f"which cannot be read as one ({first_line})") from error

    @override
    def before_instantiate_classes(self) -> None:
        # checked here because loading a model comes next
        config = self.config[self.subcommand] if self.subcommand else self.config
        found = config.trainer.get("callbacks") or []
        paths = [str(callback.get("class_path", "")) for callback in (found if isinstance(found, list) else [found])]
        if self.subcommand == "prune" and not any(map(_prunes, paths)):
            raise ValueError(
                "Expected a WandaPPPruneCallback in `trainer.callbacks`, but there is none; "
                "it says what to prune and how (see configs/prune/)"
            )
        for argument, folder in _folders(config):
            _check_folder(argument, Path(folder).expanduser().absolute())


def _prunes(class_path: str) -> bool:
    kind = resolve_name(class_path) if class_path else None
    return isinstance(kind, type) and issubclass(kind, WandaPPPruneCallback)


def _check_checkpoint(ckpt_path: str) -> None:
    # what Lightning finds by itself or fetches
    if ckpt_path in ("last", "best", "hpc") or ckpt_path.startswith("registry") or "://" in ckpt_path:
        return
    path = Path(ckpt_path).expanduser()
    if not path.exists():
        raise _no_checkpoint(ckpt_path, "which does not exist")
    # what DeepSpeed writes, or torch where the ranks write their shares
    if path.is_dir() and not any((path / name).exists() for name in ("checkpoint", "meta.pt", ".metadata")):
        raise _no_checkpoint(ckpt_path, "which is another folder")


def _no_checkpoint(ckpt_path: str, reason: str) -> ValueError:
    return ValueError(
        f"Expected argument `ckpt_path` to be last, best, null or the path of a checkpoint, but got {ckpt_path!r}, "
        f"{reason}; `last` is the newest that the run's ModelCheckpoint has written"
    )


def _folders(config: Namespace) -> Iterator[tuple[str, str]]:
    """The folders that a run writes to, each with the argument that names it, as far as it is given."""
    found = [("output_dir", config.get("output_dir"))]
    found.append(("trainer.default_root_dir", config.trainer.get("default_root_dir")))
    for name, argument in (("logger", "save_dir"), ("callbacks", "dirpath")):
        given = config.trainer.get(name)
        for item in given if isinstance(given, list) else [given]:
            if isinstance(item, Namespace):
                found.append((argument, (item.get("init_args") or Namespace()).get(argument)))
    return ((argument, str(folder)) for argument, folder in found if folder and "://" not in str(folder))


def _check_folder(argument: str, folder: Path) -> None:
    for path in (folder, *folder.parents):
        if path.is_dir():
            return
        if path.exists():
            raise ValueError(
                f"Expected argument `{argument}` to be a folder, there or to be made, but got '{folder}', where "
                f"'{path}' is a file; choose another one"
            )


def _hide_known_noise() -> None:
    for message in (
        # the batches are tokenised and in memory: workers would only cost
        r".*does not have many workers",
        # a first run has no checkpoint to go on from
        r"\.fit\(ckpt_path=.last.\) is set, but there is no last checkpoint available",
        # metrics of an earlier run in the folder are moved aside
        r"Experiment logs directory .* exists and is not empty",
        # forward passes are made in evaluation mode throughout, and a model comes in it from its files
        r"Found \d+ module\(s\) in eval mode at the start of training",
        # the state after the step is the one to go on from
        r"Using ModelCheckpoint with manual optimization and every_n_train_steps",
        # lightning's own use of torch
        r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
    # advertisements for other products
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))
    # goes to standard output, where `--print_config` writes YAML
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in str(record.msg))


def _explained(error: BaseException) -> BaseException:
    """Unwrap an error that jsonargparse reports as one of several types that a value could have had."""
    while str(error).startswith("Does not validate against any") and isinstance(error.__cause__, ValueError):
        error = error.__cause__
    return error


def _remedy(error: OSError) -> str | None:
    """What to do about a file or folder that could not be used, where that is known."""
    if error.errno in _DISK_ERRORS:
        return "make room and start again, what is finished is kept"
    if error.errno == errno.EISDIR and any(Path(error.filename).glob("checkpoint/*_model_states.pt")):
        return "DeepSpeed wrote this checkpoint and alone reads it: use its strategy again, or give another `ckpt_path`"
    if "not a valid DeepSpeed checkpoint" in str(error):
        return "another strategy wrote it: use that again, or give another `ckpt_path`"
    return None


def command_line(args: ArgsType = None, run: bool = True, log: RankLog | None = None) -> WandazetaCLI:
    """Build the command line and run it.

    Args:
        args: The arguments; those of the process by default.
        run: Whether to expect a subcommand and run it; without, `model`, `datamodule` and `trainer` are only made.
        log: Where this process logs to; it is opened once the folder of the run is known.

    Raises:
        ValueError: If an argument does not fit.
    """
    _hide_known_noise()
    return WandazetaCLI(
        trainer_class=PruningTrainer,
        trainer_defaults={"callbacks": [SLURMRequeue()]},
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=RunRecord,
        save_config_kwargs={"log": log},
        # modules bring their own; checkpoints hold no hyperparameters that would have to be code
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={"prog": "wandazeta", "version": __version__, "description": __doc__},
        args=args,
        run=run,
    )


def _leave_process_group() -> None:
    """Stop gloo's threads, which would abort a process that ends under them; Lightning does this for NCCL only."""
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def main(args: ArgsType = None) -> None:
    """Run the command line; what a user got wrong is told in a line, exit code 2, and files that cannot be used with 1.

    Args:
        args: The arguments; those of the process by default.
    """
    try:
        with RankLog() as log:
            command_line(args, log=log)
    except (ValueError, MisconfigurationException) as error:
        if os.environ.get("WANDAZETA_DEBUG"):
            raise
        sys.stderr.write(f"error: {_explained(error)}\n")
        raise SystemExit(2) from None
    except OSError as error:
        remedy = _remedy(error)
        if remedy is None or os.environ.get("WANDAZETA_DEBUG"):
            raise
        where = f": '{error.filename}'" if error.filename else ""
        sys.stderr.write(f"error: {error.strerror or error}{where}; {remedy}\n")
        raise SystemExit(1) from None
    finally:
        _leave_process_group()
