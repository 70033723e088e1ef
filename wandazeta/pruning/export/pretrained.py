"""A pruned transformers model as a directory that every loader reads."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from wandazeta.models.safetensors_io import lazy, open_safetensors, write_streamed
from wandazeta.models.streaming import Stored, is_stored, whole
from wandazeta.pruning.export.packed import MASKS_FILE, PACKED_FILE, write_packed
from wandazeta.pruning.progress.folder import ProgressFolder
from wandazeta.pruning.records import PruneReport
from wandazeta.pruning.report.page import write_page
from wandazeta.utilities.files import check_writable, removed_if_unwritten, write_json

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    from wandazeta.callbacks import WandaPPPruneCallback

_REPORT = "prune_report.json"
_PACKED_NOTE = (
    f"- `{PACKED_FILE}`: the same weights packed, all that need be shipped besides configuration and tokenizer; "
    "`python -m wandazeta.pruning.export.packed SRC DST` restores the plain file bit for bit"
)
_PAGE = "prune_report.html"
# of a streamed model
_SHARD_SIZE = "5GB"
_logger = logging.getLogger(__name__)


def prune_and_export(
    trainer: "Trainer",
    model: "LightningModule",
    datamodule: "LightningDataModule | None",
    callback: "WandaPPPruneCallback",
    output_dir: str | os.PathLike[str],
    *,
    pack: bool = False,
) -> PruneReport:
    """Prunes a module without fitting it and writes its transformers model as a Hugging Face directory.

    Args:
        trainer: Gives the device; nothing is run on it.
        model: The module; it holds a transformers model, and a `tokenizer` if that is to be written too.
        datamodule: The calibration data, unless the callback has its own.
        callback: Says what to prune and how, and keeps the progress in its own `output_dir`.
        output_dir: The directory to write.
        pack: Write the 2:4 packed file, too.

    Returns:
        The report.

    Raises:
        ValueError: If model, data, options or folders do not fit, before any long work.
        OSError: If the disk is full; what is finished is kept for the next run.
    """
    target = Path(output_dir).absolute()
    if pack and callback.options.pattern.sparsity_pattern != "2:4":
        raise ValueError(
            "Expected argument `pack` to go with sparsity_pattern='2:4', the one pattern with a packed form, but got "
            f"{callback.options.pattern.sparsity_pattern!r}; prune 2:4 or leave `pack` out."
        )
    if trainer.world_size > 1:
        raise ValueError(
            f"Expected one process to prune with, but got {trainer.world_size}; set trainer.devices and "
            "trainer.num_nodes to 1."
        )
    progress = Path(callback.output_dir).absolute()
    if target.is_relative_to(progress) or progress.is_relative_to(target):
        raise ValueError(
            f"Expected argument `output_dir` to lie apart from the callback's, which keeps the progress, but got "
            f"'{output_dir}' and '{callback.output_dir}'; choose another folder for one of them."
        )
    _check_target(target, ProgressFolder(progress))
    trainer.strategy.connect(model)
    model.trainer = trainer
    if datamodule is not None:
        trainer.datamodule = datamodule  # type: ignore[attr-defined]
        datamodule.trainer = trainer
    model.configure_model()
    prefix, backbone = find_pretrained(model)
    check_writable(target.parent, needed_bytes=sum(weight.nbytes for weight in backbone.parameters()))
    if datamodule is not None:
        datamodule.prepare_data()
        datamodule.setup("fit")
    callback.setup(trainer, model, "fit")
    report = callback.report
    assert report is not None
    folder = ProgressFolder(progress)
    folder.open_again()
    masks = {
        f"{block.name}.{name}".removeprefix(prefix): mask
        for block, result in zip(report.blocks, folder.results(len(report.blocks)), strict=True)
        for name, mask in folder.stored_masks(block.index, result).items()
    }
    tokenizer = next((t for owner in (model, datamodule) if _saves(t := getattr(owner, "tokenizer", None))), None)
    with removed_if_unwritten(_fresh(target), target):
        export_pretrained(backbone, tokenizer, target, report, masks, key=callback.key, pack=pack)
    return report


def find_pretrained(module: nn.Module) -> tuple[str, nn.Module]:
    """Finds the transformers model in a module.

    Args:
        module: A transformers model, or a module that holds one.

    Returns:
        The dotted name of the model with a dot behind it (empty for the module itself), and the model.

    Raises:
        ValueError: If there is none.
    """
    for name, child in module.named_modules():
        if _saves(child) and hasattr(child, "config"):
            return f"{name}." if name else "", child
    raise ValueError(
        f"Expected {type(module).__name__} to hold a transformers model, which can be written as a Hugging Face "
        "directory, but found none; use `fit` with the callback for other modules."
    )


def export_pretrained(
    model: Any,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    report: PruneReport,
    masks: Mapping[str, Tensor],
    *,
    key: str | None = None,
    pack: bool = False,
) -> None:
    """Writes a Hugging Face directory: zero-filled safetensors, tokenizer, masks, report, its page and model card.

    The directory appears whole or not at all. Loaded by transformers alone, the model has the same weights bit for
    bit, and so the same logits; kernels that round by where a weight lies in memory may change their last bit.

    Args:
        model: The pruned transformers model.
        tokenizer: Its tokenizer, or `None`.
        directory: Where to write; what it held before is replaced.
        report: What was done.
        masks: True where a weight was kept, by parameter name in `model`; stored ones are read one at a time.
        key: The hash that names the pruning.
        pack: Write the 2:4 packed file beside the plain ones.

    Raises:
        ValueError: If a mask is not that of a written weight, or not 2:4 where that is to be packed.
    """
    directory = Path(directory).absolute()
    fresh = _fresh(directory)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    _write_weights(model, fresh)
    if tokenizer is not None:
        tokenizer.save_pretrained(fresh)
    on_disk = names_on_disk(model, dict(masks))
    _check_masks(fresh, on_disk)
    (fresh / MASKS_FILE).parent.mkdir()
    write_streamed(fresh / MASKS_FILE, {name: lazy(mask) for name, mask in on_disk.items()}, {"format": "pt"})
    if pack:
        write_packed(fresh)
    write_json(fresh / _REPORT, {"key": key, **report.to_dict()})
    has_page = _write_page(fresh / _PAGE, report, model)
    card = _model_card(model, report, has_tokenizer=tokenizer is not None, has_page=has_page, is_packed=pack)
    (fresh / "README.md").write_text(card, encoding="utf-8")
    _make_readable(fresh)
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    fresh.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _write_weights(model: Any, directory: Path) -> None:
    """Writes configuration and weights; of a streamed model one tensor at a time, which transformers does not do."""
    if not _is_streamed(model):
        model.save_pretrained(directory)
        return
    from huggingface_hub import split_torch_state_dict_into_shards

    # everything but the weights
    model.save_pretrained(directory, state_dict={})
    saved = model.state_dict(keep_vars=True)
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    tensors = {name: saved[name] for name in saved if name not in left_out}
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD_SIZE
    )
    for file, names in plan.filename_to_tensors.items():
        write_streamed(directory / file, {name: lazy(tensors[name]) for name in names}, {"format": "pt"})
    if plan.is_sharded:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename}
        write_json(directory / "model.safetensors.index.json", index)


def _is_streamed(model: nn.Module) -> bool:
    return any(is_stored(parameter) for parameter in model.parameters())


def _fresh(directory: Path) -> Path:
    """Where a directory is written before it takes its name."""
    return directory.with_name(f".{directory.name}.new")


def _make_readable(directory: Path) -> None:
    """Gives files the permissions of any other new file: safetensors leaves its own readable to the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _saves(thing: Any) -> bool:
    return callable(getattr(thing, "save_pretrained", None))


def _check_target(target: Path, progress: ProgressFolder) -> None:
    """Refuses a folder that holds anything but an earlier export of the same pruning."""
    check_writable(target.parent)
    if not target.exists():
        return
    check_writable(target)
    if not any(target.iterdir()):
        return
    begun = progress.read_key()
    try:
        previous = json.loads((target / _REPORT).read_bytes())["key"]
    except (OSError, ValueError, KeyError, TypeError):
        previous = None
    if begun is None or previous != begun.digest:
        what = "other files" if previous is None else "another pruned model"
        raise ValueError(
            f"Expected argument `output_dir` to be a new or empty folder, but '{target}' holds {what}; choose another "
            "one or delete it."
        )


def names_on_disk(model: Any, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Maps masks from the names in memory to those in the files, which transformers keeps in the original format.

    Args:
        model: The model.
        masks: A tensor for each weight, by parameter name.

    Returns:
        The same tensors by the names in the files, in the order of these.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    # the files of a streamed model have its own names
    if isinstance(model, PreTrainedModel) and not _is_streamed(model):
        masks = revert_weight_conversion(model, {name: whole(mask) for name, mask in masks.items()})
    return {name: masks[name] for name in sorted(masks)}


def _check_masks(directory: Path, masks: Mapping[str, Tensor]) -> None:
    unseen = set(masks)
    for path in sorted(directory.glob("model*.safetensors")):
        with open_safetensors(path) as file:
            names = unseen & set(file.keys())
        for name in names:
            # opened for each, so that no mapped page stays
            if bool(Stored(path, name).read()[~whole(masks[name])].any()):
                raise ValueError(f"Expected the mask of `{name}` to fit the model, but a removed weight is not zero.")
        unseen -= names
    if unseen:
        raise ValueError(
            f"Expected a written weight for every mask, but there is none for `{min(unseen)}` and "
            f"{len(unseen) - 1} others."
        )


def _write_page(path: Path, report: PruneReport, model: Any) -> bool:
    """Writes the report as a page, if what draws it is installed; without it the model is no worse."""
    try:
        write_page(report, path, model=_hub_name(model) or type(model).__name__)
    except ModuleNotFoundError as error:
        _logger.warning("Wrote no %s: %s", path.name, error)
        return False
    return True


def _hub_name(model: Any) -> str | None:
    base = getattr(model.config, "_name_or_path", "") or ""
    is_hub_name = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    return base if is_hub_name else None


def _model_card(model: Any, report: PruneReport, *, has_tokenizer: bool, has_page: bool, is_packed: bool) -> str:
    options = report.options
    base = _hub_name(model)
    header = ["---", "library_name: transformers", "tags: [pruned, sparse, wandazeta]"]
    if base:
        header.append(f"base_model: {base}")
    layers = sum(len(block.layers) for block in report.blocks)
    settings = "\n".join(f"| `{name}` | `{value}` |" for name, value in options.items())
    name = type(model).__name__
    lines = [
        *header,
        "---",
        "",
        f"# {base or name}, pruned",
        "",
        f"{report.sparsity:.2%} of the weights in {layers} Linear layers of {len(report.blocks)} blocks are zero "
        f"(method `{options.get('method')}`, pattern `{options.get('sparsity_pattern')}`). Embeddings, norms and head "
        f"are as they were. Calibrated on {report.num_samples} samples, {report.num_tokens} tokens.",
        "",
        report.gain,
        "",
        "```python",
        f"from transformers import {'AutoTokenizer, ' if has_tokenizer else ''}{name}",
        "",
        f'model = {name}.from_pretrained("path/to/this/directory")',
        *(['tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")'] if has_tokenizer else []),
        "```",
        "",
        "- `model*.safetensors`: the weights, zeros in place",
        f"- `{MASKS_FILE}`: true where a weight was kept; a byte a weight, not needed to run the model",
        *([_PACKED_NOTE] if is_packed else []),
        f"- `{_REPORT}`: what was done to each layer",
        *([f"- `{_PAGE}`: the same with pictures, to open in a browser"] if has_page else []),
        "",
        "| option | value |",
        "|---|---|",
        settings,
        "",
    ]
    return "\n".join(lines)
