"""LightningCLI with the options of wandazeta: one folder for a run, a group for pruning, presets, and resuming."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from wandazeta import presets
from wandazeta.callbacks import (
    AtomicCheckpointIO,
    PredictionWriter,
    RankConsistencyCheck,
    RankWatchdog,
    RunProgressBar,
    WandaPPPruneCallback,
)
from wandazeta.callbacks.run_record import RunRecord, keep_metrics
from wandazeta.cli.parser import PRESET, ConfigOrPreset
from wandazeta.lightning_compat import checkpoint_path, requeue_checkpoint
from wandazeta.utilities.arguments import check_at_least

_DATA_HOOKS = {
    "fit": "train_dataloader",
    "diagnose": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


class WandazetaCLI(LightningCLI):
    """LightningCLI with the commands `prune` and `diagnose`, in which a run resumes from its last checkpoint.

    A run has one folder, `run_dir`:

    - `log/` has the metrics as CSV, the configuration, the environment and the log of every rank, and `log/COMMAND/`
      those of the commands other than `fit`;
    - `checkpoints/` has `last.ckpt`, which `fit` goes on from and the other commands load;
    - `predictions.jsonl` has the result of `predict`;
    - `pruning/` has the progress and the result of the pruning that the `prune` group configures.

    Loggers, ModelCheckpoints and pruning callbacks in the trainer's arguments have folders of their own. Where none of
    the ModelCheckpoints has `save_last`, one more writes `last.ckpt`.

    `validate`, `test` and `predict` refuse a module that is trained where there is no checkpoint, unless `ckpt_path` is
    null.
    """

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return LightningCLI.subcommands() | {name: {"model", "datamodule"} for name in ("prune", "diagnose")}

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.parser_class(**kwargs)
        known = ", ".join(f"{PRESET}{name}" for name in presets.names())
        parser.add_argument(
            "-c",
            "--config",
            action=ConfigOrPreset,
            help=f"Configuration file in YAML, or one of {known}; later ones override it.",
        )
        return parser

    @override
    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_default_arguments_to_parser(parser)
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run: logs, checkpoints and progress of the pruning; by default "
            "`trainer.default_root_dir`, else the working directory.",
        )
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=50,
            help="Training steps between two checkpoints, unless `trainer.callbacks` has a ModelCheckpoint with "
            "`save_last`.",
        )

    @override
    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # the order of instantiation: the model comes last, so that other errors show before it is loaded
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_subclass_arguments(
            WandaPPPruneCallback,
            "prune",
            required=False,
            # the command `prune` has a group of this name, for its own arguments
            as_group=False,
            help="Prune the model before it is fitted; `{}` prunes with the default settings.",
        )
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand not in ("prune", "diagnose"):
            parser.set_defaults({"ckpt_path": "last"})
        return parser

    @override
    def _parse_ckpt_path(self) -> None:
        # LightningCLI reads the file here, for hyperparameters that it may hold
        given = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        if given is None:
            return
        _check_checkpoint(str(given))
        try:
            super()._parse_ckpt_path()
        except Exception as error:
            # torch raises errors of many types for a file that is no checkpoint
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise _no_checkpoint(str(given), f"which cannot be read as one ({first_line})") from error

    @override
    def before_instantiate_classes(self) -> None:
        # checked before the model is loaded, which takes long
        config = self._config
        check_at_least("checkpoint_every", config.checkpoint_every, 1)
        root = config.trainer.get("default_root_dir")
        if config.run_dir is not None and root not in (None, config.run_dir):
            raise ValueError(
                f"Expected argument `trainer.default_root_dir` to be left out with `run_dir`, but got {root!r} and "
                f"{config.run_dir!r}"
            )
        given = config.trainer.get("callbacks") or []
        paths = [str(callback.get("class_path", "")) for callback in (given if isinstance(given, list) else [given])]
        if any(map(_is_base_callback, paths)):
            raise ValueError(
                "Expected every entry of `trainer.callbacks` to name a class (`class_path`), but got one without; for "
                "example `class_path: KeepSparsity`"
            )
        _check_machine(config.trainer)
        if self.subcommand == "prune" and config.get("prune") is None and not any(map(_is_prune_callback, paths)):
            raise ValueError(
                "Expected a `prune:` group or a WandaPPPruneCallback in `trainer.callbacks`, but got neither; add "
                "`-c preset:best` for the recommended settings"
            )
        for argument, folder in _folders(config):
            _check_folder(argument, Path(folder).expanduser().absolute())
        if self.subcommand in _DATA_HOOKS:
            _check_module(self.subcommand, config)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get_config_init()
        given = config.trainer
        run_dir = Path(config.run_dir or given.default_root_dir or ".")
        command = "" if self.subcommand in (None, "fit") else str(self.subcommand)
        if config.run_dir is not None:
            kwargs["default_root_dir"] = config.run_dir
        if given.logger in (None, True):
            # without a version of its own, so that a second run continues in the same folder
            kwargs["logger"] = CSVLogger(run_dir, name="log", version=command)
        self.save_config_kwargs = self.save_config_kwargs | {"folder": run_dir / "log" / command}
        if self.subcommand == "prune":
            kwargs |= _started_devices(given.devices)
        trainer = super().instantiate_trainer(**kwargs)
        self._require_checkpoint(trainer, run_dir)
        keep_metrics(trainer.loggers)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        records = [callback for callback in callbacks if isinstance(callback, RunRecord)]
        others = [callback for callback in callbacks if not isinstance(callback, RunRecord)]
        # before callbacks that prune in their `setup`, for hours; LightningCLI would put RunRecord last
        first = [RankWatchdog(), *records, RankConsistencyCheck()]
        callbacks[:] = [*first, *self._pruning(run_dir), *others]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        checkpoints = [callback for callback in given if isinstance(callback, ModelCheckpoint)]
        run_dir = Path(config.get("default_root_dir") or ".")
        for checkpoint in checkpoints:
            if checkpoint.dirpath is None:
                # the folder of the logger differs between the commands, or even between two runs
                checkpoint.dirpath = str((run_dir / "checkpoints").absolute())
        has_last = any(checkpoint.save_last for checkpoint in checkpoints)
        if self.subcommand != "prune" and not has_last and config.get("enable_checkpointing") is not False:
            every = self._get_config_init().checkpoint_every
            callbacks = [
                *callbacks,
                ModelCheckpoint(run_dir / "checkpoints", every_n_train_steps=every, save_top_k=0, save_last=True),
            ]
        has_bar = config.get("enable_progress_bar") is False or any(isinstance(item, ProgressBar) for item in given)
        if not has_bar:
            callbacks = [*callbacks, RunProgressBar()]
        if self.subcommand == "predict" and not any(isinstance(callback, PredictionWriter) for callback in given):
            callbacks = [*callbacks, PredictionWriter(config.get("default_root_dir") or ".")]
        return super()._instantiate_trainer(config, callbacks)

    def _require_checkpoint(self, trainer: Trainer, run_dir: Path) -> None:
        """Refuse to evaluate an untrained module by mistake, before the model is loaded."""
        if self.subcommand not in ("validate", "test", "predict") or self._config.get("ckpt_path") != "last":
            return
        class_path = str(self._config.model.get("class_path", ""))
        if not is_overridden("configure_optimizers", resolve_name(class_path), parent=LightningModule):
            return
        if checkpoint_path(trainer, "last") is None and requeue_checkpoint(trainer) is None:
            raise ValueError(
                f"Expected a checkpoint of {class_path.rpartition('.')[2]} in '{run_dir / 'checkpoints'}', but there "
                "is none; run `fit` first, name the `run_dir` of an earlier run, or give `--ckpt_path null` to "
                f"{self.subcommand} the untrained module"
            )

    def _pruning(self, run_dir: Path) -> list[Callback]:
        callback: WandaPPPruneCallback | None = self._get_config_init().get("prune")
        if callback is None:
            return []
        if callback.output_dir == signature(WandaPPPruneCallback).parameters["output_dir"].default:
            callback.output_dir = str(run_dir / "pruning")
        return [callback]

    @property
    def _config(self) -> Namespace:
        """The options of the command, as parsed."""
        return self.config[self.subcommand] if self.subcommand else self.config

    def _get_config_init(self) -> Namespace:
        """The options of the command, with their classes instantiated."""
        return self.config_init[self.subcommand] if self.subcommand else self.config_init


def _check_machine(trainer: Namespace) -> None:
    """Check that the machine has the accelerator and the packages that the trainer is to use."""
    name, devices = trainer.get("accelerator"), trainer.get("devices")
    kinds = [kind for kind in ("cuda", "mps") if AcceleratorRegistry[kind]["accelerator"].is_available()]
    if name in ("gpu", "cuda", "mps") and not (kinds if name == "gpu" else name in kinds):
        raise ValueError(
            f"Expected argument `trainer.accelerator` to be one of this machine, but got {name!r}, which it does not "
            "have; use `--trainer.accelerator auto`"
        )
    # a string may be the number itself, or "auto"
    is_list = isinstance(devices, list) or (isinstance(devices, str) and "," in devices)
    if is_list and (name == "cpu" or (name == "auto" and not kinds)):
        raise ValueError(
            f"Expected argument `trainer.devices` to be the number of processes on a CPU, but got {devices}; use "
            f"{len(devices) if isinstance(devices, list) else devices.count(',') + 1}"
        )
    strategy = trainer.get("strategy")
    strategy = strategy if isinstance(strategy, str) else (strategy or Namespace()).get("class_path", "")
    if "deepspeed" in strategy.lower() and find_spec("deepspeed") is None:
        raise ValueError(
            f"Expected argument `trainer.strategy` to be one whose package is installed, but got {strategy!r}; "
            "`pip install deepspeed`, or use another strategy, such as ddp"
        )


def started_processes() -> tuple[int, int]:
    """Return the numbers of processes and of nodes that torchrun or srun started; both are 1 if neither did."""
    found = os.environ
    if TorchElasticEnvironment.detect():
        return int(found["WORLD_SIZE"]), int(found["WORLD_SIZE"]) // int(found["LOCAL_WORLD_SIZE"])
    if SLURMEnvironment.detect():
        return int(found.get("SLURM_STEP_NUM_TASKS", "1")), int(found.get("SLURM_STEP_NUM_NODES", "1"))
    return 1, 1


def _started_devices(devices: Any) -> dict[str, int]:
    """Return the trainer's `devices` and `num_nodes` for the processes that torchrun or srun started, if it did.

    With other numbers, such as the single device of a configuration, every process would prune alone, all into one
    folder.

    Args:
        devices: The devices that were asked for. A list of as many stays.

    Raises:
        ValueError: If the nodes have different numbers of processes.
    """
    size, num_nodes = started_processes()
    if size % num_nodes:
        raise ValueError(
            f"Expected as many processes on every node, but got {size} on {num_nodes} nodes; give `--ntasks-per-node`"
        )
    if size == 1 or (isinstance(devices, list) and len(devices) == size // num_nodes):
        return {}
    return {"devices": size // num_nodes, "num_nodes": num_nodes}


def _check_module(command: str, config: Namespace) -> None:
    """Check that the module is trained by `fit`, and that there are data for the command."""
    class_path = str(config.model.get("class_path", ""))
    kind = resolve_name(class_path)
    name = class_path.rpartition(".")[2]
    if command == "fit" and not is_overridden("training_step", kind, parent=LightningModule):
        raise ValueError(
            f"Expected argument `model` to be a module that can be trained, such as ZerothOrderModule, but got {name}; "
            "`test` evaluates it"
        )
    if config.get("data") is None and not is_overridden(_DATA_HOOKS[command], kind, parent=LightningModule):
        raise ValueError(
            f"Expected argument `data`, because {name} has no data of its own, but got none; for example `--data "
            "TextDataModule --data.source my_text.txt`"
        )


def _is_base_callback(class_path: str) -> bool:
    return bool(class_path) and resolve_name(class_path) is Callback


def _is_prune_callback(class_path: str) -> bool:
    kind = resolve_name(class_path) if class_path else None
    return isinstance(kind, type) and issubclass(kind, WandaPPPruneCallback)


def _check_checkpoint(ckpt_path: str) -> None:
    # names that Lightning resolves, and addresses
    if ckpt_path in ("last", "best", "hpc") or ckpt_path.startswith("registry") or "://" in ckpt_path:
        return
    path = Path(ckpt_path).expanduser()
    if not path.exists():
        raise _no_checkpoint(ckpt_path, "which does not exist")
    # files inside a checkpoint of DeepSpeed, and inside one that torch writes from several ranks
    if path.is_dir() and not any((path / name).exists() for name in ("checkpoint", "meta.pt", ".metadata")):
        raise _no_checkpoint(ckpt_path, "which is another folder")


def _no_checkpoint(ckpt_path: str, reason: str) -> ValueError:
    return ValueError(
        f"Expected argument `ckpt_path` to be last, best, null or the path of a checkpoint, but got {ckpt_path!r}, "
        f"{reason}; `last` is the newest checkpoint of the run"
    )


def _folders(config: Namespace) -> Iterator[tuple[str, str]]:
    """Yield the folders that a run writes to, as far as they are given, each after the argument that names it."""
    found = [(argument, config.get(argument)) for argument in ("output_dir", "run_dir")]
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
                f"Expected argument `{argument}` to be a folder or a path where one can be created, but got "
                f"'{folder}', where '{path}' is a file; choose another one"
            )
