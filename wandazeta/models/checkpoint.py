"""Check that the files of a model hold its weights: all of them, no other, in the right shapes, and not quantized."""

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PLAIN_DTYPES = {"F64", "F32", "F16", "BF16"}
# causal masks, which older versions of transformers saved as buffers of GPT-2, GPT-Neo and others
_SAVED_MASK = re.compile(r"\.(attn|attention)\.(masked_)?bias$")
_NUM_NAMED = 5


class Header(NamedTuple):
    """What the header of a safetensors file says about a tensor.

    Args:
        path: The file.
        dtype: Type of the elements in safetensors' spelling, such as `BF16`.
        shape: Shape of the tensor.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]


def read_headers(directory: Path) -> dict[str, Header]:
    """Return what the safetensors files of a model hold, by name, without reading a tensor.

    Args:
        directory: The model's directory.

    Raises:
        ValueError: If a file is missing or not complete.
    """
    index = directory / _INDEX
    headers = {}
    try:
        if not (directory / _FILE).is_file() and index.is_file():
            by_name = json.loads(index.read_text())["weight_map"]
        else:
            by_name = None
        for file in [_FILE] if by_name is None else sorted(set(by_name.values())):
            with safe_open(directory / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    piece = tensors.get_slice(name)
                    headers[name] = Header(directory / file, piece.get_dtype(), tuple(piece.get_shape()))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"it has no complete {_FILE} or {_INDEX} ({error})") from error
    lacking = set(by_name or ()) - headers.keys()
    if lacking:
        raise ValueError(f"its files lack {_names(lacking)}, which {_INDEX} lists")
    return headers


def load_config(model_name_or_path: str | Path, trust_remote_code: bool) -> Any:
    """Load the configuration of a model, without a `quantization_config` that its weights do not have.

    The package compressed-tensors leaves such an entry over weights that are sparse and otherwise plain; it makes
    transformers ask for the package, which the weights do not need.

    Args:
        model_name_or_path: Hugging Face name or local directory.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        OSError: If there is no configuration.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    entry = getattr(config, "quantization_config", None)
    if entry is not None and _is_plain(Path(model_name_or_path), entry):
        del config.quantization_config
    return config


def drop_stale_quantization(directory: Path) -> None:
    """Remove the `quantization_config` of a written model whose weights are all plain.

    Args:
        directory: The model's directory, with config.json and safetensors files.
    """
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    stale = {"quantization_config", "compression_config"} & config.keys()
    if stale and _has_plain_weights(directory):
        kept = {name: value for name, value in config.items() if name not in stale}
        file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _is_plain(directory: Path, entry: Any) -> bool:
    entry = entry if isinstance(entry, dict) else entry.to_dict()
    # entries of other methods may ask transformers to quantize plain weights
    if entry.get("quant_method") != "compressed-tensors":
        return False
    if not directory.is_dir():
        # the files of the hub are not here yet, so the entry itself has to say it
        return entry.get("format") == "dense"
    try:
        return _has_plain_weights(directory)
    except ValueError:
        return False


def _has_plain_weights(directory: Path) -> bool:
    return all(header.dtype in _PLAIN_DTYPES for header in read_headers(directory).values())


def require_loaded(model: nn.Module, info: dict[str, Any], optional: Collection[nn.Module] = ()) -> None:
    """Check that loading has filled every weight of a model from a tensor of its shape, and that none was left over.

    transformers initialises missing weights at random, and leaves out what it does not know.

    Args:
        model: The model of transformers.
        info: What `from_pretrained` returned for `output_loading_info`: buffers that may be missing and tied weights
            are not in it.
        optional: Modules whose weights may be missing, such as a pooler that is not used. They are set to zero.

    Raises:
        ValueError: If a weight is missing, unexpected or of another shape, naming it.
    """
    unused = {id(parameter) for module in optional for parameter in module.parameters()}
    missing = set()
    for name in info["missing_keys"]:
        tensor = _find(model, name)
        if id(tensor) in unused:
            tensor.data.zero_()
        else:
            missing.add(name)
    kind = type(model).__name__
    require_same_names(kind, missing, info["unexpected_keys"])
    for name, found, expected in sorted(info["mismatched_keys"]):
        require_same_shape(name, found, expected)


def require_same_names(kind: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Refuse files that lack weights of a model or have others.

    Args:
        kind: Class of the model.
        missing: Names of weights that are in no file.
        unexpected: Names of tensors in the files that the model does not have.

    Raises:
        ValueError: If there are any.
    """
    unexpected = {name for name in unexpected if not _SAVED_MASK.search(name)}
    if missing or unexpected:
        parts = [f"lack {_names(missing)}"] if missing else []
        parts += [f"have {_names(unexpected)} in addition"] if unexpected else []
        raise ValueError(f"its files do not fit {kind}: they {' and '.join(parts)}; are the weights renamed?")


def require_same_shape(name: str, found: Iterable[int], expected: Iterable[int]) -> None:
    """Refuse a tensor of another shape than the weight has.

    Args:
        name: Name of the weight.
        found: Shape in the files.
        expected: Shape in the model.

    Raises:
        ValueError: If the shapes differ.
    """
    if tuple(found) != tuple(expected):
        raise ValueError(
            f"its files have `{name}` in shape {tuple(found)}, but by its configuration the model has {tuple(expected)}"
        )


def unexpected_names(model: Any, names: Iterable[str]) -> set[str]:
    """Return those of some names that transformers does not ignore for a model.

    Args:
        model: The model of transformers.
        names: Names of tensors in the files that the model does not have.
    """
    from transformers.utils.loading_report import LoadStateDictInfo

    info = LoadStateDictInfo(set(), set(names), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    return info.unexpected_keys


def is_of_a_head(base: Any, name: str) -> bool:
    """Whether an unexpected tensor belongs to a head on a base model, whose weights were saved with it.

    Args:
        base: The base model, such as an encoder.
        name: Name of the tensor in the files.
    """
    if (base.config.architectures or [type(base).__name__])[0] == type(base).__name__:
        return False
    first = name.partition(".")[0]
    return first != base.base_model_prefix and first not in dict(base.named_children())


def _find(model: nn.Module, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


def _names(names: Collection[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in sorted(names)[:_NUM_NAMED])
    return shown if len(names) <= _NUM_NAMED else f"{shown} and {len(names) - _NUM_NAMED} more"
