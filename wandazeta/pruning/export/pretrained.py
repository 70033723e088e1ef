"""Write a pruned transformers model as a Hugging Face directory."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wandazeta.models.checkpoint import drop_stale_quantization
from wandazeta.models.pretrained import is_streamed, names_on_disk
from wandazeta.models.safetensors_io import LazyTensor, open_safetensors, write_streamed
from wandazeta.models.streaming import StoredTensor, materialize
from wandazeta.pruning.export.card import PAGE_FILE, REPORT_FILE, hub_name, model_card
from wandazeta.pruning.export.masks import MASKS_FILE
from wandazeta.pruning.export.packed import write_packed
from wandazeta.pruning.progress.folder import ProgressFolder
from wandazeta.pruning.records import PruneReport
from wandazeta.pruning.report.page import write_page
from wandazeta.utilities.files import check_writable, replace_directory, write_json

__all__ = ["check_export_directory", "export_pretrained"]

# files of a streamed model; other models are saved by transformers, with its default
_SHARD_SIZE = "5GB"
_logger = logging.getLogger(__name__)


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
    """Write a pruned model as a Hugging Face directory: weights, tokenizer, masks, report and model card.

    The directory appears under its name only once it is complete. `from_pretrained` loads the same weights bit for
    bit, and so gives the same logits; kernels whose rounding depends on the address of a weight may differ in the last
    bit.

    Args:
        model: The pruned transformers model.
        tokenizer: Its tokenizer, or None.
        directory: Where to write; what it held before is deleted.
        report: The report of the pruning.
        masks: Bool masks, True where a weight is kept, by parameter name in `model`; masks that are stored in files
            are read one at a time.
        key: Digest of the key of the pruning, by which a later export recognises its own directory.
        pack: Write the 2:4 packed file beside the plain ones.

    Raises:
        ValueError: If a mask does not belong to a weight, a pruned weight is not zero, or a mask is not 2:4 although
            `pack` is set.
        OSError: If a file cannot be written, for example on a full disk; nothing is left of the new directory.
    """
    with replace_directory(Path(directory).absolute()) as target:
        _write_weights(model, target)
        drop_stale_quantization(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        masks_on_disk = names_on_disk(model, dict(masks))
        _check_masks(target, masks_on_disk)
        (target / MASKS_FILE).parent.mkdir()
        lazy_masks = {name: LazyTensor.of(mask) for name, mask in masks_on_disk.items()}
        write_streamed(target / MASKS_FILE, lazy_masks, {"format": "pt"})
        if pack:
            write_packed(target)
        write_json(target / REPORT_FILE, {"key": key, **report.to_dict()})
        has_page = _write_page(target / PAGE_FILE, report, model)
        card = model_card(model, report, has_tokenizer=tokenizer is not None, has_page=has_page, is_packed=pack)
        (target / "README.md").write_text(card, encoding="utf-8")
        _reset_permissions(target)


def check_export_directory(directory: Path, progress: ProgressFolder) -> None:
    """Refuse a directory that holds anything but an earlier export of the same pruning.

    Args:
        directory: Where the model is to be written.
        progress: Folder of the pruning that is to be exported.

    Raises:
        ValueError: If the directory holds other files, or cannot be written to.
    """
    check_writable(directory.parent)
    if not directory.exists():
        return
    check_writable(directory)
    if not any(directory.iterdir()):
        return
    key = progress.read_key()
    try:
        exported_key = json.loads((directory / REPORT_FILE).read_bytes())["key"]
    except (OSError, ValueError, KeyError, TypeError):
        exported_key = None
    if key is None or exported_key != key.digest:
        what = "other files" if exported_key is None else "another pruned model"
        raise ValueError(
            f"Expected argument `output_dir` to be a new or empty folder, but '{directory}' holds {what}; choose "
            "another one or delete it."
        )


def _write_weights(model: Any, directory: Path) -> None:
    """Write configuration and weights, those of a streamed model one tensor at a time (transformers needs all)."""
    if not is_streamed(model):
        model.save_pretrained(directory)
        return
    from huggingface_hub import split_torch_state_dict_into_shards

    # everything but the weights
    model.save_pretrained(directory, state_dict={})
    state = model.state_dict(keep_vars=True)
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    tensors = {name: state[name] for name in state if name not in left_out}
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD_SIZE
    )
    for file, names in plan.filename_to_tensors.items():
        write_streamed(directory / file, {name: LazyTensor.of(tensors[name]) for name in names}, {"format": "pt"})
    if plan.is_sharded:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename}
        write_json(directory / "model.safetensors.index.json", index)


def _check_masks(directory: Path, masks: Mapping[str, Tensor]) -> None:
    """Check that every mask belongs to a weight in the files, which is zero wherever the mask prunes it."""
    missing = set(masks)
    for path in sorted(directory.glob("model*.safetensors")):
        with open_safetensors(path) as file:
            names = missing & set(file.keys())
        for name in names:
            # opened again for each weight, so that no memory-mapped page stays in memory
            if bool(StoredTensor(path, name).read()[~materialize(masks[name])].any()):
                raise ValueError(f"Expected the mask of `{name}` to fit the model, but a pruned weight is not zero.")
        missing -= names
    if missing:
        raise ValueError(
            f"Expected a weight in the model's files for every mask, but there is none for `{min(missing)}` and "
            f"{len(missing) - 1} others."
        )


def _write_page(path: Path, report: PruneReport, model: Any) -> bool:
    """Write the report as an HTML page if the packages for it are installed; returns whether it was written."""
    try:
        write_page(report, path, model=hub_name(model) or type(model).__name__)
    except ModuleNotFoundError as error:
        _logger.warning("Skipped %s: %s", path.name, error)
        return False
    return True


def _reset_permissions(directory: Path) -> None:
    """Give files the permissions of any new file; safetensors makes its files readable to their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
