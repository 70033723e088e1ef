"""Write a pruned transformers model as a Hugging Face directory."""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wandazeta.models.checkpoint import drop_stale_quantization
from wandazeta.models.peft_layers import adapter_modules, saved_without_adapters, without_adapters
from wandazeta.models.pretrained import is_streamed, names_on_disk
from wandazeta.models.safetensors_io import LazyTensor, open_safetensors, write_streamed
from wandazeta.models.streaming import StoredTensor, is_file_backed, materialize
from wandazeta.pruning.export.card import ADAPTERS_FOLDER, PAGE_FILE, REPORT_FILE, hub_name, model_card
from wandazeta.pruning.export.masks import MASKS_FILE
from wandazeta.pruning.export.packed import write_packed
from wandazeta.pruning.progress.folder import ProgressFolder
from wandazeta.pruning.records import PruneReport
from wandazeta.pruning.report.page import write_page
from wandazeta.utilities.files import check_writable, replace_directory, write_json

__all__ = ["check_export_directory", "check_exportable", "export_pretrained"]

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

    Of a model with adapters of peft, its own weights are written, and the adapters beside them in `adapters`.
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
        ValueError: If a mask does not belong to a weight, a pruned weight is not zero, a mask is not 2:4 although
            `pack` is set, or the written files do not hold the tensors of the model.
        OSError: If a file cannot be written, for example on a full disk; nothing is left of the new directory.
    """
    with replace_directory(Path(directory).absolute()) as target:
        tensors = _write_weights(model, target)
        drop_stale_quantization(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        masks_on_disk = names_on_disk(model, dict(masks))
        _check_files(target, tensors, masks_on_disk)
        (target / MASKS_FILE).parent.mkdir()
        lazy_masks = {name: LazyTensor.of(mask) for name, mask in masks_on_disk.items()}
        write_streamed(target / MASKS_FILE, lazy_masks, {"format": "pt"})
        if pack:
            write_packed(target)
        name = hub_name(model) or type(model).__name__
        write_json(target / REPORT_FILE, {"key": key, "model": name, **report.to_dict()})
        has_page = _write_page(target / PAGE_FILE, report, name)
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


def check_exportable(model: Any, tokenizer: Any) -> None:
    """Try to write everything of a model but its weights, so that nothing fails after the pruning.

    Args:
        model: The model that is to be pruned and exported.
        tokenizer: Its tokenizer, or None.

    Raises:
        ValueError: If configuration, generation settings, adapters or tokenizer cannot be written.
    """
    with tempfile.TemporaryDirectory() as directory:
        for what, thing in (("model", model), ("tokenizer", tokenizer)):
            try:
                if thing is model:
                    _write_all_but_weights(model, Path(directory))
                    _write_adapters(model, Path(directory))
                elif thing is not None:
                    thing.save_pretrained(directory)
            except Exception as error:
                raise ValueError(
                    f"Expected a {what} that can be saved, but saving {type(thing).__name__} fails: {error}; mend its "
                    "settings before it is pruned"
                ) from error


def _write_all_but_weights(model: Any, directory: Path) -> None:
    with saved_without_adapters(model):
        model.save_pretrained(directory, state_dict={})


def _write_weights(model: Any, directory: Path) -> dict[str, Tensor]:
    """Write configuration and weights, those of a streamed model one tensor at a time (transformers needs all).

    Args:
        model: The model.
        directory: Where to write.

    Returns:
        The tensors that the files hold, by name on disk.
    """
    tensors = _state_to_save(model)
    _write_adapters(model, directory)
    if not is_streamed(model):
        with saved_without_adapters(model):
            model.save_pretrained(directory, state_dict=without_adapters(model, tensors))
        return names_on_disk(model, tensors)
    from huggingface_hub import split_torch_state_dict_into_shards

    _write_all_but_weights(model, directory)
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD_SIZE
    )
    for file, names in plan.filename_to_tensors.items():
        write_streamed(directory / file, {name: LazyTensor.of(tensors[name]) for name in names}, {"format": "pt"})
    if plan.is_sharded:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename}
        write_json(directory / "model.safetensors.index.json", index)
    return tensors


def _state_to_save(model: Any) -> dict[str, Tensor]:
    """Return every tensor that the files need, by name in memory.

    Tensors that are tied by the configuration are there once, as loading ties them again. What is tied by hand would
    not be tied again, so every name gets a copy; transformers writes one and loads the others with random values.
    """
    declared = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in ignored}
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        key = id(tensor) if is_file_backed(tensor) else tensor.untyped_storage().data_ptr() or id(tensor)
        groups.setdefault(key, []).append(name)
    for names in groups.values():
        if len(names) == 1:
            continue
        written = [name for name in names if name not in declared] or names[:1]
        for name in names:
            if name not in written:
                del state[name]
            elif name != written[0] and not is_file_backed(state[name]):
                state[name] = state[name].detach().clone()
    return {name: tensor if is_file_backed(tensor) else tensor.detach() for name, tensor in state.items()}


def _write_adapters(model: Any, directory: Path) -> None:
    """Write the adapters of peft in a model, each as a directory that `PeftModel.from_pretrained` loads."""
    if not adapter_modules(model):
        return
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    for name, config in model.peft_config.items():
        target = directory / ADAPTERS_FOLDER / name
        target.mkdir(parents=True)
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        state = {f"base_model.model.{key}": tensor.detach().cpu().contiguous() for key, tensor in state.items()}
        save_file(state, target / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(target)


def _check_files(directory: Path, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Check that the files hold every tensor of the model bit for bit, no other one, and zeros where masks prune."""
    missing_masks, missing = set(masks), set(tensors)
    for path in sorted(directory.glob("model*.safetensors")):
        with open_safetensors(path) as file:
            names = list(file.keys())
        for name in names:
            # opened again for each weight, so that no memory-mapped page stays in memory
            written = StoredTensor(path, name).read()
            if name in masks and bool(written[~materialize(masks[name])].any()):
                raise ValueError(f"Expected the mask of `{name}` to fit the model, but a pruned weight is not zero.")
            if name not in tensors or not _same_bits(written, materialize(tensors[name]).detach()):
                what = "have other values of" if name in tensors else "hold"
                raise ValueError(f"Expected files that hold the tensors of the model, but they {what} `{name}`.")
        missing_masks -= set(names)
        missing -= set(names)
    if missing_masks:
        raise ValueError(
            f"Expected a weight in the model's files for every mask, but there is none for `{min(missing_masks)}` and "
            f"{len(missing_masks) - 1} others."
        )
    if missing:
        raise ValueError(
            f"Expected files that hold the tensors of the model, but they lack `{min(missing)}` and "
            f"{len(missing) - 1} others."
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # as bytes, so that NaN equals itself
    same_type = a.dtype == b.dtype and a.shape == b.shape
    return same_type and torch.equal(_as_bytes(a), _as_bytes(b))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def _write_page(path: Path, report: PruneReport, model: str) -> bool:
    """Write the report as an HTML page if the packages for it are installed; returns whether it was written."""
    try:
        write_page(report, path, model=model)
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
