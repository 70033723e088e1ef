"""The command line: `wandazeta fit | prune | diagnose | validate | test | predict`."""

import logging
import os
import re
import sys
import warnings

import torch.distributed as dist
from lightning.pytorch.cli import ArgsType
from transformers.utils.logging import disable_progress_bar

# imported for their short names in YAML (`class_path: ZerothOrderModule`), too
from wandazeta.callbacks import (
    KeepSparsity,
    PeakMemoryMonitor,
    PredictionWriter,
    RankConsistencyCheck,
    RankWatchdog,
    SLURMRequeue,
    WandaPPPruneCallback,
)
from wandazeta.callbacks.run_record import RankLog, RunRecord
from wandazeta.cli.errors import reported_errors
from wandazeta.cli.lightning_cli import WandazetaCLI
from wandazeta.cli.parser import Parser, command_first
from wandazeta.cli.trainer import PruningTrainer
from wandazeta.datamodules import ClassificationDataModule, PromptedClassificationDataModule, TextDataModule
from wandazeta.modules import FirstOrderModule, LanguageModel, ZerothOrderModule
from wandazeta.version import __version__

__all__ = [
    "ClassificationDataModule",
    "FirstOrderModule",
    "KeepSparsity",
    "LanguageModel",
    "PeakMemoryMonitor",
    "PredictionWriter",
    "PromptedClassificationDataModule",
    "PruningTrainer",
    "RankConsistencyCheck",
    "RankWatchdog",
    "SLURMRequeue",
    "TextDataModule",
    "WandaPPPruneCallback",
    "WandazetaCLI",
    "ZerothOrderModule",
    "command_line",
    "hide_known_noise",
    "main",
]


def _is_no_noise(record: logging.LogRecord) -> bool:
    """Whether a record is no advertisement, no news that some hardware is absent, and no advice that does not fit.

    The advice is to let matrix products in float32 run in TF32. They are those of adapters, whose updates are smaller
    than TF32 resolves, and torch's default keeps them exact.
    """
    advice = r"You are using a CUDA device .* Tensor Cores"
    return re.match(rf".*Tip:|\w+ available: False|{advice}", str(record.msg)) is None


def hide_known_noise() -> None:
    """Hide warnings and progress bars that say nothing to the user of a command."""
    for message in (
        # the batches are tokenised and in memory, so workers would only cost time
        r".*does not have many workers",
        # a first run has no checkpoint to resume from
        r"\.\w+\(ckpt_path=.last.\) is set, but there is no last checkpoint available",
        # the metrics of an earlier run in the folder are kept under another name
        r"Experiment logs directory .* exists and is not empty",
        # zeroth-order training runs in evaluation mode, which a loaded model is in
        r"Found \d+ module\(s\) in eval mode at the start of training",
        # with manual optimization the checkpoint holds the state after the step, which is right
        r"Using ModelCheckpoint with manual optimization and every_n_train_steps",
        # with one process DeepSpeed binds it to no device, of which it has only one
        r"barrier\(\): using the device under current context",
        # deprecated calls inside Lightning
        r".is_gradient_checkpointing. is deprecated",
        r".*isinstance\(treespec, LeafSpec\).* is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
    if int(os.environ.get("SLURM_NTASKS", "1")) == 1:
        # a hint for those who asked for several tasks
        warnings.filterwarnings("ignore", r"The `srun` command is available on your system but is not used")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_no_noise)
    # bars of every file that is loaded or written, however small
    disable_progress_bar()
    # it goes to standard output, where `--print_config` writes YAML
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in str(record.msg))


def command_line(args: ArgsType = None, run: bool = True, log: RankLog | None = None) -> WandazetaCLI:
    """Build the command line and run it.

    Args:
        args: The arguments; those of the process by default.
        run: Run the subcommand; otherwise there is none, and model, data module and trainer are only created.
        log: Log of this process; its file is opened when the folder of the run is known.

    Raises:
        ValueError: If an argument does not fit.
    """
    hide_known_noise()
    return WandazetaCLI(
        trainer_class=PruningTrainer,
        parser_class=Parser,
        trainer_defaults={"callbacks": [SLURMRequeue()]},
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_callback=RunRecord,
        save_config_kwargs={"log": log},
        # the modules create their optimizers, and checkpoints hold plain values only
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={"prog": "wandazeta", "version": __version__, "description": __doc__},
        args=args,
        run=run,
    )


def _leave_process_group(failed: bool) -> None:
    """Leave the ranks: torch warns otherwise, and gloo's threads abort a process that ends under them.

    Lightning does this for NCCL only, and not under DeepSpeed. After an error a rank may be lost, and NCCL would wait
    for it.
    """
    if dist.is_available() and dist.is_initialized() and (not failed or dist.get_backend() == "gloo"):
        dist.destroy_process_group()


def main(args: ArgsType = None) -> None:
    """Run the command line and report errors in one line; see `wandazeta.cli.errors.reported_errors`.

    Args:
        args: The arguments; those of the process by default.
    """
    if args is None:
        # also for the processes of other ranks, which Lightning starts with the same arguments
        sys.argv[1:] = command_first(sys.argv[1:])
    elif isinstance(args, list):
        args = command_first(args)
    failed = True
    try:
        with reported_errors(), RankLog() as log:
            command_line(args, log=log)
        failed = False
    finally:
        _leave_process_group(failed)


if __name__ == "__main__":
    main()
