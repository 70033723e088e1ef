"""Save and load adapters, and check that they fit the model."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from wandazeta.adapters import (
    AdapterVector,
    LoRASite,
    LoRAVector,
    Site,
    TensorTrainVector,
    TrainedVector,
    train_linears,
)
from wandazeta.adapters.card import adapter_card
from wandazeta.adapters.inject import refuse_adapted, wrap_sites
from wandazeta.adapters.lora import wrap_linears
from wandazeta.models.blocks import find_blocks
from wandazeta.models.sharded import whole
from wandazeta.models.zero3 import gathered

# how error messages name the entries of a description
_ENTRIES = {
    "trainable": "`trainable`",
    "backbone_key": "the backbone that was trained on (model and pruning)",
    "backbone_fingerprint": "the model that the adapters were trained on (weights, pruning and precision)",
    "kind": "the kind of `trainable`",
    "rank": "`rank`",
    "bottleneck": "`bottleneck`",
    "alpha": "`alpha`",
    "sites": "the modules with adapters (`sites`, `target_modules`, `layers`)",
    "linears": "the new head that is trained in full (`num_classes` or `num_answers`)",
    "update": "`update`",
    "learning_rate": "`learning_rate`",
    "lr_scheduler": "`lr_scheduler`",
    "weight_decay": "`weight_decay`",
    "teacher": "`teacher`",
    "schedule_states": "the state of `schedule`",
    "target_modules": "`target_modules`",
    "num_parameters": "the number of trained values",
}


def backbone_fingerprint(model: nn.Module, samples: int = 64) -> str:
    """Return a short digest of a model's weights: names, shapes and some values of every tensor.

    It differs for another model, precision or pruning. It is not a check of integrity.
    """
    digest = sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        with gathered([tensor]):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = whole(tensor.detach()).reshape(-1)
            # an even stride would always read the same position of N:M groups
            picked = flat[:: max(1, flat.numel() // samples) | 1][:samples]
            digest.update(picked.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def describe_backbone(model: nn.Module, pruned_key: str | None) -> dict[str, Any]:
    """Describe the model that adapters belong to, in plain values, before they are inserted.

    Args:
        model: The model.
        pruned_key: Key of its pruning, if a callback pruned it.
    """
    config: Any = getattr(model, "config", None)
    fingerprint = backbone_fingerprint(model)
    return {
        "backbone_key": pruned_key or fingerprint,
        "backbone_fingerprint": fingerprint,
        "base_model": str(getattr(config, "name_or_path", "")),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def written_backbone(description: dict[str, Any], directory: str | None) -> dict[str, Any]:
    """Return the description of a backbone that was written beside the adapters, where it is a model like any other.

    Args:
        description: What `describe_backbone` returned.
        directory: Its directory, relative to that of the adapters; None if it was not written.
    """
    if directory is None:
        return description
    return {**description, "backbone": directory, "backbone_key": description["backbone_fingerprint"]}


def require_same(saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Compare the description of saved adapters with that of this run.

    Args:
        saved: Saved description.
        here: Description of this run; entries that only the saved one has are not compared.

    Raises:
        ValueError: Naming the first difference.
    """
    for name, value in here.items():
        if saved.get(name) != value:
            raise ValueError(
                f"Expected saved adapters that fit this run, but {_ENTRIES[name]} differs: "
                f"saved {_short(saved.get(name))}, here {_short(value)}; use the same settings, or start a new run"
            )


def save_adapter_files(directory: Path, vector: TrainedVector, description: dict[str, Any]) -> None:
    """Save adapters for use outside of the run that trained them.

    Tensor trains are saved as one vector, LoRA factors in the format of peft. `adapters.json` describes the adapters
    and their model, and `README.md` is a model card that shows how to load them.

    Args:
        directory: Directory to write to; it is made if it is missing.
        vector: The adapters.
        description: Description of the vector, and of the backbone by `describe_backbone`.

    Raises:
        ValueError: If there are no adapters, because the model's own weights are trained.
    """
    if not isinstance(vector, AdapterVector):
        raise ValueError("Expected adapters to save, but got none; `backbone.save_pretrained` saves the weights")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in vector.tensors().items()}
    save_file(tensors, directory / vector.file_name, {"format": "pt"})
    if (peft_config := vector.peft_config()) is not None:
        config = {**peft_config, "base_model_name_or_path": description["base_model"]}
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "adapters.json").write_text(json.dumps(description, indent=2) + "\n")
    (directory / "README.md").write_text(adapter_card(description))


@torch.no_grad()
def load_adapter_files(directory: Path, vector: TrainedVector, here: dict[str, Any]) -> None:
    """Load saved adapters into a vector.

    Args:
        directory: Directory that `save_adapter_files` has written.
        vector: The vector, changed in place.
        here: Description that the saved one has to match.

    Raises:
        ValueError: If a file is missing, the adapters do not fit, or the vector has no adapters.
    """
    if not isinstance(vector, AdapterVector):
        raise ValueError("Expected adapters to load into, but got none; train from the directory of the weights")
    require_same(_read_description(directory), here)
    file = directory / vector.file_name
    if not file.is_file():
        raise ValueError(f"Expected a directory with {vector.file_name} and adapters.json, but {file} is missing")
    saved, tensors = load_file(file), vector.tensors()
    difference = saved.keys() ^ tensors.keys()
    if difference:
        raise ValueError(
            f"Expected '{file}' to hold exactly the tensors of the adapters, but {len(difference)} differ, first "
            f"`{min(difference)}`; save them again"
        )
    for name, tensor in tensors.items():
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"Expected `{name}` in '{file}' to have shape {tuple(tensor.shape)}, but got {tuple(saved[name].shape)}"
            )
        tensor.copy_(saved[name])


def load_adapters(model: nn.Module, directory: str | Path) -> AdapterVector:
    """Insert saved adapters into a model, without Lightning.

    They are registered as `model.adapters` and move with the model.

    Args:
        model: The model that they were trained on, with the same pruning and precision.
        directory: Directory that `ZerothOrderModule.save_adapters` has written, or `FirstOrderModule.save_adapters` for
            tensor trains. LoRA adapters of `FirstOrderModule` are peft's: load them by `PeftModel.from_pretrained`.

    Returns:
        The adapters, on the device of the model's first parameter.

    Raises:
        ValueError: If a file is missing, the model is another one or has adapters already, or a head over answer
            options was trained, which only `ZerothOrderModule.load_adapters` can load.
    """
    saved = _read_description(Path(directory))
    if any(text.startswith("answers:") for text in saved["linears"]):
        raise ValueError(
            "Expected adapters without a head over answer options, but got one with `num_answers`; load it by "
            "ZerothOrderModule.load_adapters"
        )
    refuse_adapted(model)
    require_same(saved, {"backbone_fingerprint": backbone_fingerprint(model)})
    sites = [text.split(":") for text in saved["sites"]]
    vector: TensorTrainVector | LoRAVector
    if saved["kind"] == "lora":
        vector = LoRAVector([LoRASite(n, int(i), int(o)) for n, i, o in sites], saved["rank"], saved["alpha"])
        wrap_linears(model, vector)
    else:
        places = [Site(int(block), name, position, int(width)) for block, position, name, width in sites]
        vector = TensorTrainVector(places, saved["rank"], saved["bottleneck"])
        wrap_sites(find_blocks(model)[1], vector)
    train_linears(model, vector, [text.split(":")[0] for text in saved["linears"]])
    load_adapter_files(Path(directory), vector, vector.description())
    model.add_module("adapters", vector)
    return vector.to(next(model.parameters()).device)


def _read_description(directory: Path) -> dict[str, Any]:
    file = directory / "adapters.json"
    if not file.is_file():
        is_peft = (directory / "adapter_config.json").is_file()
        remedy = "; it has the files of peft, load them by `PeftModel.from_pretrained`" if is_peft else ""
        raise ValueError(f"Expected a directory with saved adapters, but {file} is missing{remedy}")
    description: dict[str, Any] = json.loads(file.read_text())
    return description


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
