"""Record of a run: its configuration, its environment and a log file of every rank."""

import json
import logging
import os
import platform
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from typing_extensions import override

from wandazeta.lightning_compat import num_training_steps
from wandazeta.utilities import environment

_logger = logging.getLogger(__name__)
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_NEVER = sys.maxsize


@rank_zero_only
def keep_metrics(loggers: Sequence[Logger]) -> None:
    """Rename the metrics of an earlier run in the same folder, which CSVLogger would delete.

    A resumed run uses the same folder again. `metrics-1.csv` is the oldest file.

    Args:
        loggers: The loggers of the run.
    """
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            metrics = Path(logger.log_dir) / "metrics.csv"
            if metrics.is_file():
                others = (metrics.with_name(f"metrics-{number}.csv") for number in count(1))
                metrics.rename(next(other for other in others if not other.exists()))


class RankLog:
    """Context manager that writes log records and warnings of this rank to a file, with the time.

    Records are held in memory until `open` is called, because the folder of a run is known late. An exception that
    ends the context is written with its traceback. The terminal shows what rank 0 would show without this context, and
    only errors of the other ranks.

    A process that gets a pickled log, as those of the strategy `ddp_spawn` do, has a log of its own, which ends with
    the process.
    """

    def __init__(self) -> None:
        self._records = MemoryHandler(capacity=_NEVER, flushLevel=_NEVER, flushOnClose=False)
        # some libraries log every detail at lower levels
        self._records.setLevel(logging.INFO)
        self._terminal = logging.StreamHandler()
        # as Python itself does for loggers without handlers and for warnings
        self._terminal.setLevel(logging.WARNING)
        self._terminal.addFilter(_is_shown_by_no_other_handler)
        self._terminal.setFormatter(_StrippingFormatter())

    def __enter__(self) -> "RankLog":
        logging.captureWarnings(True)
        logging.getLogger().addHandler(self._terminal)
        self._attach(getattr(rank_zero_only, "rank", None) or 0)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # handlers cannot be pickled, and belong to the loggers of one process
        return _entered_log, ()

    def open(self, folder: Path, rank: int, world_size: int) -> None:
        """Write the records held so far, and all later ones immediately, to `logs/rank-<rank>.log`.

        Args:
            folder: The folder of the run.
            rank: Rank of this process.
            world_size: Number of ranks.
        """
        if self._records.target is not None:
            return
        path = folder / "logs" / f"rank-{rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _LossyFileHandler(path, encoding="utf-8")
        file.setFormatter(_StrippingFormatter(_FORMAT))
        self._records.setTarget(file)
        self._records.flushLevel = logging.NOTSET
        self._attach(rank)
        self._note(logging.INFO, f"rank {rank} of {world_size}, process {os.getpid()} on {socket.gethostname()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            self._note(logging.ERROR, f"ended by {type(error).__name__}", error)
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self._terminal)
        for logger in _top_loggers():
            logger.removeHandler(self._records)
        if self._records.target is not None:
            with suppress(OSError):
                self._records.target.close()
        self._records.close()

    def _note(self, level: int, message: str, error: BaseException | None = None) -> None:
        """Write a record to the file, not to the terminal."""
        exc_info = None if error is None else (type(error), error, error.__traceback__)
        self._records.handle(_logger.makeRecord(_logger.name, level, __file__, 0, message, (), exc_info))

    def _attach(self, rank: int) -> None:
        for logger in _top_loggers():
            logger.addHandler(self._records)
        if rank > 0:
            _show_errors_only()


def _entered_log() -> RankLog:
    return RankLog().__enter__()


class _LossyFileHandler(logging.FileHandler):
    """File handler that drops records when the disk is full, which is reported where the run writes its own files."""

    @override
    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _StrippingFormatter(logging.Formatter):
    """Formatter without the trailing newline that warnings have."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).rstrip("\n")


def _loggers() -> list[logging.Logger]:
    known = logging.getLogger().manager.loggerDict.values()
    return [logging.getLogger(), *(logger for logger in known if isinstance(logger, logging.Logger))]


def _top_loggers() -> list[logging.Logger]:
    """Return the root logger and those that do not propagate to it, as of lightning, transformers and deepspeed."""
    return [logger for logger in _loggers() if logger.parent is None or not logger.propagate]


def _writes_to_a_stream(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


def _is_shown_by_no_other_handler(record: logging.LogRecord) -> bool:
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None and logger.parent is not None:
        if any(_writes_to_a_stream(handler) for handler in logger.handlers):
            return False
        logger = logger.parent
    return True


def _show_errors_only() -> None:
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    for logger in _loggers():
        for handler in logger.handlers:
            if _writes_to_a_stream(handler):
                handler.setLevel(logging.ERROR)
    disable_progress_bar()
    disable_progress_bars()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # datasets is imported later


class RunRecord(SaveConfigCallback):
    """Writes `config.yaml`, `environment.json` and the log of every rank into the folder of the run's first logger.

    It also reports the step at which a fit starts, or goes on from a checkpoint.

    Args:
        parser: Parser of the command.
        config: The parsed configuration.
        folder: Folder for runs without a logger.
        log: Log of this rank, if there is one.
    """

    def __init__(
        self, parser: LightningArgumentParser, config: Namespace, folder: Path, log: RankLog | None = None
    ) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self._log = log
        self._folder = folder
        self._has_trained = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # on every rank, because rank 0 broadcasts it
        folder = trainer.log_dir if trainer.loggers else None
        self._folder = Path(folder or self._folder).absolute()
        if self._log is not None:
            self._log.open(self._folder, trainer.global_rank, trainer.world_size)
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_trained = True
        step, num_steps = trainer.global_step, num_training_steps(trainer)
        of = f" of {num_steps:,}" if num_steps is not None else ""
        if trainer.ckpt_path is None:
            rank_zero_info(f"The training starts at step {step:,}{of}.")
        else:
            rank_zero_info(f"The training goes on at step {step:,}{of}, from '{trainer.ckpt_path}'.")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._has_trained and trainer.ckpt_path is not None:
            rank_zero_info(
                f"The training has nothing left to do after step {trainer.global_step:,} in '{trainer.ckpt_path}'; "
                "give more `trainer.max_steps` or `trainer.max_epochs` to go on, or `--ckpt_path null` to start anew."
            )

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        config = str(self._folder / self.config_filename)
        self.parser.save(self.config, config, skip_none=False, overwrite=True, multifile=False)
        content = json.dumps(run_environment(trainer), indent=2)
        (self._folder / "environment.json").write_text(content + "\n")
        rank_zero_info(f"Configuration, environment and logs of this run: {self._folder}")


def run_environment(trainer: Trainer) -> dict[str, Any]:
    """Return the environment of a run in plain values: command, date, commit, versions, hardware and ranks.

    Args:
        trainer: The trainer, after the setup of its strategy.
    """
    return {
        "command": environment.command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": environment.commit(),
        "versions": environment.versions(),
        "platform": platform.platform(),
        "hardware": environment.hardware(),
        "accelerator": type(trainer.accelerator).__name__,
        "strategy": type(trainer.strategy).__name__,
        "precision": trainer.precision,
        "world_size": trainer.world_size,
        "num_nodes": trainer.num_nodes,
        "slurm_job_id": SLURMEnvironment.job_id(),
    }
