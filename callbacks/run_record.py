"""What every run leaves behind: its configuration, its environment, and a log file of each rank."""

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

from wandazeta.utilities import environment

_logger = logging.getLogger(__name__)
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_NEVER = sys.maxsize


@rank_zero_only
def keep_metrics(loggers: Sequence[Logger]) -> None:
    """Move metrics of an earlier run in the same folder aside: CSVLogger would delete them.

    A requeued job has the folder that it had, and so has a run with a fixed version. `metrics-1.csv` are the oldest.

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
    """While this context is open, what Python logs and warns of goes into a file of this rank, with the time.

    It waits in memory until `open` is called, for the folder of a run is known late. The exception that ends the
    context goes into the file with its traceback. On the terminal, rank 0 shows what it would without this context, the
    others nothing but errors.
    """

    def __init__(self) -> None:
        self._records = MemoryHandler(capacity=_NEVER, flushLevel=_NEVER, flushOnClose=False)
        # some libraries report every detail to whoever listens
        self._records.setLevel(logging.INFO)
        self._terminal = logging.StreamHandler()
        # what Python itself does for a logger without handlers, and for warnings
        self._terminal.setLevel(logging.WARNING)
        self._terminal.addFilter(_nobody_else_shows)
        self._terminal.setFormatter(_WithoutLastNewline())

    def __enter__(self) -> "RankLog":
        logging.captureWarnings(True)
        logging.getLogger().addHandler(self._terminal)
        self._listen(getattr(rank_zero_only, "rank", None) or 0)
        return self

    def open(self, folder: Path, rank: int, world_size: int) -> None:
        """Write what was collected, and from now on everything at once, to `logs/rank-<rank>.log`.

        Args:
            folder: The folder of the run.
            rank: The number of this process.
            world_size: How many there are.
        """
        if self._records.target is not None:
            return
        path = folder / "logs" / f"rank-{rank}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _ForgivingFile(path, encoding="utf-8")
        file.setFormatter(_WithoutLastNewline(_FORMAT))
        self._records.setTarget(file)
        self._records.flushLevel = logging.NOTSET
        self._listen(rank)
        self._note(logging.INFO, f"rank {rank} of {world_size}, process {os.getpid()} on {socket.gethostname()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            self._note(logging.ERROR, f"ended by {type(error).__name__}", error)
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self._terminal)
        for logger in _ends_of_the_line():
            logger.removeHandler(self._records)
        if self._records.target is not None:
            with suppress(OSError):
                self._records.target.close()
        self._records.close()

    def _note(self, level: int, message: str, error: BaseException | None = None) -> None:
        """Write to the file alone."""
        exc_info = None if error is None else (type(error), error, error.__traceback__)
        self._records.handle(_logger.makeRecord(_logger.name, level, __file__, 0, message, (), exc_info))

    def _listen(self, rank: int) -> None:
        for logger in _ends_of_the_line():
            logger.addHandler(self._records)
        if rank > 0:
            _show_errors_only()


class _ForgivingFile(logging.FileHandler):
    """On a full disk lines are left out; whoever fills it has an error of its own to tell."""

    @override
    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _WithoutLastNewline(logging.Formatter):
    """Warnings come with one."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).rstrip("\n")


def _loggers() -> list[logging.Logger]:
    known = logging.getLogger().manager.loggerDict.values()
    return [logging.getLogger(), *(logger for logger in known if isinstance(logger, logging.Logger))]


def _ends_of_the_line() -> list[logging.Logger]:
    """The root, and the loggers of libraries (lightning, transformers, deepspeed) that pass nothing on to it."""
    return [logger for logger in _loggers() if logger.parent is None or not logger.propagate]


def _writes_to_a_stream(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)


def _nobody_else_shows(record: logging.LogRecord) -> bool:
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
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # not imported by now


class RunRecord(SaveConfigCallback):
    """Writes `config.yaml` and `environment.json` into the folder of the run, and lets each rank's log begin there.

    The folder is that of the first logger, and `lightning_logs` in `default_root_dir` where there is none.

    Args:
        parser: The parser of the command.
        config: What it has read.
        log: The log of this rank, if it keeps one.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, log: RankLog | None = None) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self._log = log
        self._folder = Path()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # asked of every rank, for rank 0 tells the others
        folder = trainer.log_dir if trainer.loggers else None
        self._folder = Path(folder or Path(trainer.default_root_dir, "lightning_logs")).absolute()
        if self._log is not None:
            self._log.open(self._folder, trainer.global_rank, trainer.world_size)
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        config = str(self._folder / self.config_filename)
        self.parser.save(self.config, config, skip_none=False, overwrite=True, multifile=False)
        content = json.dumps(run_environment(trainer), indent=2)
        (self._folder / "environment.json").write_text(content + "\n")
        rank_zero_info(f"Configuration, environment and logs of this run: {self._folder}")


def run_environment(trainer: Trainer) -> dict[str, Any]:
    """What a run is made with, in plain values.

    Args:
        trainer: The trainer, its strategy set up.
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
