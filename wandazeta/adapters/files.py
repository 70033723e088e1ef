"""Adapters on disk: what they fit, and files of their own."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from wandazeta.adapters import AdapterVector, LoRASite, LoRAVector, Site, TensorTrainVector, train_linears
from wandazeta.adapters.card import adapter_card
from wandazeta.adapters.inject import refuse_adapted, wrap_sites
from wandazeta.adapters.lora import wrap_linears
from wandazeta.models.blocks import find_blocks
from wandazeta.models.zero3 import gathered

_WHAT = {
    "trainable": "`trainable`",
    "backbone_key": "the backbone that training began from (model and pruning)",
    "backbone_fingerprint": "the model that the adapters were trained on (weights, pruning and precision)",
    "kind": "the kind of `trainable`",
    "rank": "`rank`",
    "bottleneck": "`bottleneck`",
    "alpha": "`alpha`",
    "sites": "what carries adapters (`sites`, `target_modules`, `layers`)",
    "linears": "what is trained in full, a new head (`num_classes`) or answers (`num_answers`)",
    "update": "`update`",
    "learning_rate": "`learning_rate`",
    "lr_scheduler": "`lr_scheduler`",
    "weight_decay": "`weight_decay`",
    "schedule_states": "what `schedule` remembers",
    "target_modules": "`target_modules`",
    "num_parameters": "the number of trainable values",
}


def backbone_fingerprint(model: nn.Module, samples: int = 64) -> str:
    """Return a short key of a model's weights: names, shapes and some values of every tensor.

    Enough to tell another model, another precision or another pruning; no check of integrity.
    """
    digest = sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        with gathered([tensor]):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = tensor.detach().reshape(-1)
            # odd strides, or N:M groups would always be hit at the same place
            picked = flat[:: max(1, flat.numel() // samples) | 1][:samples]
            digest.update(picked.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def describe_backbone(model: nn.Module, pruned_key: str | None) -> dict[str, Any]:
    """Say which model adapters belong to, in plain values; before they are put in.

    Args:
        model: The model.
        pruned_key: Key of its pruning, if this process pruned or loaded it by key.
    """
    config: Any = getattr(model, "config", None)
    fingerprint = backbone_fingerprint(model)
    return {
        "backbone_key": pruned_key or fingerprint,
        "backbone_fingerprint": fingerprint,
        "base_model": str(getattr(config, "name_or_path", "")),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def require_same(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse saved adapters that do not fit.

    Raises:
        ValueError: Naming the first difference.
    """
    for name, value in here.items():
        if saved.get(name) != value:
            raise ValueError(
                f"Expected saved adapters that fit this run, but {_WHAT[name]} differs: "
                f"saved {_short(saved.get(name))}, here {_short(value)}; use the same settings, or start a new run"
            )


def save_adapter_files(directory: Path, bank: AdapterVector, description: dict[str, Any]) -> None:
    """Write adapters so that they can be loaded elsewhere.

    Tensor trains as one vector, LoRA factors as an adapter of peft; `adapters.json` says what they fit, `README.md`
    the same in words, and how to load them.

    Args:
        directory: Where to write; made if it is missing.
        bank: The adapters.
        description: The bank's, and what `describe_backbone` gave.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in bank.tensors().items()}
    save_file(tensors, directory / bank.file_name, {"format": "pt"})
    if isinstance(bank, LoRAVector):
        config = {**bank.peft_config(), "base_model_name_or_path": description["base_model"]}
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "adapters.json").write_text(json.dumps(description, indent=2) + "\n")
    (directory / "README.md").write_text(adapter_card(description))


@torch.no_grad()
def load_adapter_files(directory: Path, bank: AdapterVector, here: dict[str, Any]) -> None:
    """Fill a bank with saved adapters.

    Args:
        directory: What `save_adapter_files` wrote.
        bank: The adapters to fill.
        here: What they have to fit.

    Raises:
        ValueError: If a file is missing or the adapters do not fit.
    """
    require_same(_read_description(directory), here)
    file = directory / bank.file_name
    if not file.is_file():
        raise ValueError(f"Expected a directory with {bank.file_name} and adapters.json, but {file} is missing")
    saved = load_file(file)
    for name, tensor in bank.tensors().items():
        tensor.copy_(saved[name])


def load_adapters(model: nn.Module, directory: str | Path) -> AdapterVector:
    """Put saved adapters into a model; no Lightning is needed.

    They are registered as `model.adapters` and move with it.

    Args:
        model: The model that they were trained on, pruned as it was then and in the same precision.
        directory: What `ZerothOrderModule.save_adapters` wrote, or `FirstOrderModule.save_adapters` for tensor trains;
            its LoRA is peft's, which loads it by `PeftModel.from_pretrained`.

    Returns:
        The adapters, on the device of the model's first parameter.

    Raises:
        ValueError: If a file is missing, the model is another or it has adapters already, or there are answers among
            what was trained, which `ZerothOrderModule.load_adapters` alone has a place for.
    """
    saved = _read_description(Path(directory))
    if any(text.startswith("answers:") for text in saved["linears"]):
        raise ValueError("Expected adapters alone, but got answers too; load them by ZerothOrderModule.load_adapters")
    refuse_adapted(model)
    require_same(saved, {"backbone_fingerprint": backbone_fingerprint(model)})
    sites = [text.split(":") for text in saved["sites"]]
    bank: TensorTrainVector | LoRAVector
    if saved["kind"] == "lora":
        bank = LoRAVector([LoRASite(n, int(i), int(o)) for n, i, o in sites], saved["rank"], saved["alpha"])
        wrap_linears(model, bank)
    else:
        places = [Site(int(block), name, position, int(width)) for block, position, name, width in sites]
        bank = TensorTrainVector(places, saved["rank"], saved["bottleneck"])
        wrap_sites(find_blocks(model)[1], bank)
    train_linears(model, bank, [text.split(":")[0] for text in saved["linears"]])
    load_adapter_files(Path(directory), bank, bank.description())
    model.add_module("adapters", bank)
    return bank.to(next(model.parameters()).device)


def _read_description(directory: Path) -> dict[str, Any]:
    file = directory / "adapters.json"
    if not file.is_file():
        is_peft = (directory / "adapter_config.json").is_file()
        remedy = "; these are peft's alone, load them by `PeftModel.from_pretrained`" if is_peft else ""
        raise ValueError(f"Expected a directory with saved adapters, but {file} is missing{remedy}")
    description: dict[str, Any] = json.loads(file.read_text())
    return description


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
