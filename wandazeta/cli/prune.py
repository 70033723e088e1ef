"""The command `wandazeta prune`: prune a module without fitting it, and export its model."""

import os
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from wandazeta.callbacks import WandaPPPruneCallback
from wandazeta.lightning_compat import fast_dev_run
from wandazeta.models.pretrained import find_pretrained, has_save_pretrained
from wandazeta.pruning.export.pretrained import check_export_directory, check_exportable, export_pretrained
from wandazeta.pruning.progress.folder import ProgressFolder
from wandazeta.pruning.records import PruneReport
from wandazeta.utilities.files import check_writable
from wandazeta.utilities.ranks import Ranks

__all__ = ["attach", "prune_module"]


def prune_module(
    trainer: Trainer,
    module: LightningModule,
    datamodule: LightningDataModule | None,
    callback: WandaPPPruneCallback,
    output_dir: str | os.PathLike[str],
    *,
    pack: bool = False,
) -> PruneReport:
    """Prune a module without fitting it, and write its transformers model as a Hugging Face directory.

    The ranks of the process group share the calibration samples; rank 0 writes.

    Args:
        trainer: Determines the device and the ranks; no loop of it is run.
        module: Holds a transformers model. Its `tokenizer`, or else that of the data module, is written too.
        datamodule: Yields the calibration data, unless the callback has a source of its own.
        callback: Determines what to prune and how; its `output_dir` keeps the progress.
        output_dir: Directory to write.
        pack: Write the 2:4 packed file too.

    Returns:
        The report of the pruning.

    Raises:
        ValueError: If model, data, options or directories do not fit; raised before any long work.
        OSError: If the disk is full; finished blocks are kept for the next run.
    """
    target, progress = Path(output_dir).absolute(), ProgressFolder(Path(callback.output_dir).absolute())
    if pack and callback.options.pattern.sparsity_pattern != "2:4":
        raise ValueError(
            "Expected argument `pack` to be False unless sparsity_pattern='2:4', the only pattern with a packed form, "
            f"but got '{callback.options.pattern.sparsity_pattern}'; prune 2:4 or leave out `pack`."
        )
    if fast_dev_run(trainer):
        raise ValueError(
            "Expected argument `fast_dev_run` to be False to write a pruned model, but got "
            f"{fast_dev_run(trainer)}, with which only a part of it is pruned; leave it out."
        )
    if target.is_relative_to(progress.directory) or progress.directory.is_relative_to(target):
        raise ValueError(
            "Expected argument `output_dir` to be a folder outside the callback's `output_dir`, which keeps the "
            f"progress, and not to contain it, but got '{output_dir}' and '{callback.output_dir}'; choose another "
            "folder for one of them."
        )
    ranks = Ranks.of_process_group(trainer.strategy.root_device)
    ranks.run_on_all(lambda: check_export_directory(target, progress) if ranks.rank == 0 else None)
    attach(trainer, module, datamodule)
    module.configure_model()
    prefix, model = find_pretrained(module)
    num_bytes = sum(weight.nbytes for weight in model.parameters())
    ranks.run_on_all(lambda: check_writable(target.parent, needed_bytes=num_bytes) if ranks.rank == 0 else None)
    if datamodule is not None:
        prepares = trainer.local_rank == 0 and (datamodule.prepare_data_per_node or trainer.node_rank == 0)
        ranks.run_on_all(lambda: datamodule.prepare_data() if prepares else None)
        datamodule.setup("fit")
    tokenizers = (getattr(owner, "tokenizer", None) for owner in (module, datamodule))
    tokenizer = next(filter(has_save_pretrained, tokenizers), None)
    check_exportable(model, tokenizer)
    callback.setup(trainer, module, "fit")
    assert callback.report is not None
    if ranks.rank > 0:
        # not waiting for rank 0, which may write for longer than a collective may take
        return callback.report
    progress.open_existing()
    masks = {name.removeprefix(prefix): mask for name, mask in progress.stored_masks(callback.report).items()}
    export_pretrained(model, tokenizer, target, callback.report, masks, key=callback.key, pack=pack)
    return callback.report


def attach(trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None = None) -> None:
    """Connect a trainer, a module and its data as the trainer's own entry points do.

    Args:
        trainer: The trainer.
        module: The module.
        datamodule: The data, or None.
    """
    trainer.strategy.connect(module)
    module.trainer = trainer
    if datamodule is not None:
        trainer.datamodule = datamodule  # type: ignore[attr-defined]
        datamodule.trainer = trainer
