"""Builds a causal language model whose blocks stay in their safetensors files."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wandazeta.models.blocks import find_blocks
from wandazeta.models.streaming import Stored, bring_in_when_called, store

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def build_streamed(
    directory: Path, dtype: torch.dtype, attn_implementation: str | None, trust_remote_code: bool
) -> nn.Module:
    """Builds a model with everything in memory but the parameters of its blocks, which are stored ones.

    Args:
        directory: Holds configuration and safetensors, whose tensors have the names of the model's parameters.
        dtype: Precision of the weights; they are converted as they are read.
        attn_implementation: Attention kernels.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If the files do not hold the model's tensors by their names.
        OSError: If there is no configuration.
    """
    places = _places(directory)
    model = _build(directory, dtype, attn_implementation, trust_remote_code)
    name, blocks = find_blocks(model)
    inside = {id(parameter) for parameter in blocks.parameters()}
    aliases: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(parameter_name)
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    for key, names in aliases.items():
        place = _place(names, places)
        if key not in inside:
            _replace(model, names, nn.Parameter(place.read(dtype)))
        elif all(alias.startswith(f"{name}.") for alias in names):
            store(parameters[key], place)
        else:
            raise ValueError(f"`{names[0]}`, of a block, is tied to `{names[-1]}`, which `stream_weights` cannot do")
    for buffer_name, buffer in _persistent_buffers(model):
        buffer.copy_(_place([buffer_name], places).read())
    for block in blocks:
        bring_in_when_called(block)
    return model.eval()


def _places(directory: Path) -> dict[str, Stored]:
    index = directory / _INDEX
    if not (directory / _FILE).is_file() and index.is_file():
        files = json.loads(index.read_text())["weight_map"]
        return {name: Stored(directory / file, name) for name, file in files.items()}
    try:
        with safe_open(directory / _FILE, framework="pt") as file:
            return {name: Stored(directory / _FILE, name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"no whole {_FILE} or {_INDEX} in it ({error})") from error


def _place(names: list[str], places: dict[str, Stored]) -> Stored:
    """The place of a tensor that goes by several names where it is tied."""
    found = [places[name] for name in names if name in places]
    if not found:
        raise ValueError(
            f"the files hold no `{names[0]}`; `stream_weights` wants the names that `save_pretrained` of this model "
            "writes: load it without and save it once"
        )
    if any(not torch.equal(found[0].read(), other.read()) for other in found[1:]):
        raise ValueError(f"the files hold different values of `{names[0]}` and `{names[1]}`, which are tied")
    return found[0]


def _build(directory: Path, dtype: torch.dtype, attn_implementation: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("it is quantized, and weights are pruned before that")
    chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **chosen)
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        raise ValueError(f"{type(model).__name__} keeps some weights in float32, which `stream_weights` does not know")
    if getattr(model, "generation_config", None) is not None and (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """New parameters take no memory; buffers are computed as ever, for they are in no file."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # one that is there already is tied: it stays itself
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _replace(model: nn.Module, names: list[str], parameter: nn.Parameter) -> None:
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, parameter)


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
