"""Adapters on disk: what they fit, and files of their own."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_WHAT = {
    "train": "`train`",
    "backbone_key": "the backbone that the adapters were trained on (model and pruning)",
    "kind": "the kind of `trainable`",
    "rank": "`rank`",
    "bottleneck": "`bottleneck`",
    "alpha": "`alpha`",
    "sites": "what carries adapters (`sites`, `target_modules`, `layers`)",
    "update": "`update`",
    "lora_rank": "`lora_rank`",
    "lora_alpha": "`lora_alpha`",
    "target_modules": "`target_modules`",
    "num_parameters": "the number of trainable values",
}


def backbone_fingerprint(model: nn.Module, samples: int = 64) -> str:
    """Return a short key of a model's weights: names, shapes and some values of every tensor.

    Enough to tell another model, another precision or another pruning; no check of integrity.
    """
    digest = sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        # odd strides, or N:M groups would always be hit at the same place
        picked = flat[:: max(1, flat.numel() // samples) | 1][:samples]
        digest.update(picked.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


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


def save_adapter_files(directory: Path, theta: Tensor, description: dict[str, Any]) -> None:
    """Write `adapters.safetensors` and `adapters.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"theta": theta.detach().cpu().contiguous()}, directory / "adapters.safetensors")
    (directory / "adapters.json").write_text(json.dumps(description, indent=2) + "\n")


def load_adapter_files(directory: Path, here: dict[str, Any]) -> Tensor:
    """Return the saved vector.

    Raises:
        ValueError: If a file is missing or the adapters do not fit.
    """
    files = [directory / "adapters.safetensors", directory / "adapters.json"]
    for file in files:
        if not file.is_file():
            raise ValueError(f"Expected a directory with {files[0].name} and {files[1].name}, but {file} is missing")
    require_same(json.loads(files[1].read_text()), here)
    return load_file(files[0])["theta"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
