"""Models larger than memory: meta tensors backed by safetensors files, and weights that are loaded one at a time.

A file-backed parameter is on the meta device and has an attribute that says where its values are. `parameters_loaded`
loads those of a block while it is pruned; the forward of a block loads them by itself wherever else it is called.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from wandazeta.models.blocks import block_lists
from wandazeta.models.checkpoint import (
    load_config,
    read_headers,
    require_same_names,
    require_same_shape,
    unexpected_names,
)

__all__ = [
    "StoredTensor",
    "back_by_file",
    "is_file_backed",
    "load_during_forward",
    "load_one_by_one",
    "load_streamed_model",
    "materialize",
    "parameters_loaded",
    "require_in_memory",
]

# the width of a vector register and of a cache line, in bytes
_ALIGNMENT = 64


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Args:
        path: The file.
        name: Name of the tensor in the file.
    """

    path: Path
    name: str

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read the tensor into memory of its own, without keeping the file open.

        The rounding of a matrix product depends on the alignment of its operands. So the copy has the same address
        modulo 64 as a tensor in the memory-mapped file would have, and the results are the same bits.

        Args:
            dtype: Type to convert to; by default the type in the file.

        Raises:
            ValueError: If the file cannot be read or does not contain the tensor.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                mapped = file.get_tensor(self.name)
                return _copy_with_alignment(mapped) if dtype in (None, mapped.dtype) else mapped.to(dtype)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"Expected '{self.path}' to be a complete safetensors file that contains `{self.name}`, but got: "
                f"{error}; restore the file"
            ) from error


def _copy_with_alignment(mapped: Tensor) -> Tensor:
    """Copy a tensor to an address that is the same modulo 64."""
    num_bytes = mapped.numel() * mapped.element_size()
    buffer = torch.empty(num_bytes + _ALIGNMENT, dtype=torch.uint8)
    start = (mapped.data_ptr() - buffer.data_ptr()) % _ALIGNMENT
    # files by other writers may hold it at an address that no tensor of its type can have
    start -= start % mapped.element_size()
    copy = buffer[start : start + num_bytes].view(mapped.dtype).view(mapped.shape)
    return copy.copy_(mapped)


def back_by_file(tensor: Tensor, stored: StoredTensor) -> Tensor:
    """Make a meta tensor file-backed.

    Args:
        tensor: A tensor on the meta device; its type is the one that is read.
        stored: Where its values are.

    Returns:
        The same tensor.
    """
    assert tensor.is_meta
    tensor.stored = stored  # type: ignore[attr-defined]
    return tensor


def is_file_backed(tensor: Tensor) -> bool:
    """Whether the values of a tensor are in a file and not in memory."""
    return tensor.is_meta and hasattr(tensor, "stored")


def materialize(tensor: Tensor) -> Tensor:
    """Return a tensor with its values: read from the file if it is file-backed, else the tensor itself."""
    if not is_file_backed(tensor):
        return tensor
    stored: StoredTensor = tensor.stored  # type: ignore[attr-defined]
    return stored.read(tensor.dtype)


@contextmanager
def parameters_loaded(block: nn.Module, read: Mapping[int, Tensor] | None = None) -> Iterator[None]:
    """Temporarily load the file-backed parameters of a block; changes to them are lost when the context ends.

    Parameters that are in memory, or loaded already, are left alone.

    Args:
        block: The block.
        read: Values that have been read already, by the id of their parameter.
    """
    read = read or {}
    file_backed = [
        (module, name, parameter)
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_file_backed(parameter)
    ]
    loaded: dict[int, nn.Parameter] = {}
    try:
        for module, name, parameter in file_backed:
            if id(parameter) not in loaded:
                values = read[id(parameter)] if id(parameter) in read else materialize(parameter)
                loaded[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[name] = loaded[id(parameter)]
        yield
    finally:
        for module, name, parameter in file_backed:
            module._parameters[name] = parameter


def load_during_forward(block: nn.Module) -> None:
    """Let a block load its file-backed parameters for the duration of each forward.

    The forward is replaced on the instance, as `override_forward` does: where that skips a block, nothing is read.

    Args:
        block: The block.
    """
    forward = block.forward

    @functools.wraps(forward)
    def streamed(*args: Any, **kwargs: Any) -> Any:
        with parameters_loaded(block):
            return forward(*args, **kwargs)

    block.__dict__["forward"] = streamed


def require_in_memory(module: nn.Module) -> None:
    """Check that no parameter of a module is file-backed.

    Args:
        module: The module.

    Raises:
        ValueError: If one is.
    """
    name = next((name for name, parameter in module.named_parameters() if is_file_backed(parameter)), None)
    if name is not None:
        raise ValueError(
            f"Expected a model whose weights are in memory, but `{name}` and others are streamed from their files; "
            "leave out `stream_weights`, which is for `prune` alone"
        )


def load_streamed_model(
    directory: Path, dtype: torch.dtype, attn_implementation: str | None, trust_remote_code: bool
) -> nn.Module:
    """Load a causal language model whose blocks have file-backed parameters; everything else is in memory.

    Args:
        directory: Contains the configuration and safetensors files, whose tensors have the names of the parameters.
        dtype: Precision of the weights; they are converted when they are read.
        attn_implementation: Attention kernels; by default those that transformers chooses.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If the files do not contain the tensors of the model by their names and in their shapes, or contain
            others.
        OSError: If there is no configuration.
    """
    headers = read_headers(directory)
    files = {name: StoredTensor(header.path, name) for name, header in headers.items()}
    model = _model_without_weights(directory, dtype, attn_implementation, trust_remote_code)
    # all lists, as the one that is pruned may be chosen later
    lists = block_lists(model)
    inside = {id(parameter) for blocks in lists.values() for parameter in blocks.parameters()}
    aliases = _names_of_parameters(model)
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    tensors = {alias: parameters[key] for key, names in aliases.items() for alias in names}
    tensors |= dict(_persistent_buffers(model))
    for tensor_name in files.keys() & tensors.keys():
        require_same_shape(tensor_name, headers[tensor_name].shape, tensors[tensor_name].shape)
    for key, names in aliases.items():
        stored = _find_stored(names, files)
        if key not in inside:
            _replace_parameter(model, names, nn.Parameter(stored.read(dtype)))
        elif all(alias.startswith(tuple(f"{name}." for name in lists)) for alias in names):
            back_by_file(parameters[key], stored)
        else:
            raise ValueError(
                f"`{names[0]}`, a weight of a block, is tied to `{names[-1]}` outside of it, which `stream_weights` "
                "does not support"
            )
    for buffer_name, buffer in _persistent_buffers(model):
        buffer.copy_(_find_stored([buffer_name], files).read())
    # after the missing ones, for which there is a remedy
    require_same_names(type(model).__name__, (), unexpected_names(model, files.keys() - tensors.keys()))
    for blocks in lists.values():
        for block in blocks:
            load_during_forward(block)
    return model.eval()


def load_one_by_one(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str, nn.Module, torch.dtype], nn.Parameter],
) -> nn.Module:
    """Build a causal language model and set its parameters one after the other, each of which is read when it is set.

    Args:
        directory: Contains the configuration.
        dtype: Precision of the weights.
        device: Device of the model.
        shapes: Shapes of the tensors that can be read, by parameter name.
        read: Returns a parameter on the device, from its name, the module that holds it and its precision.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If the names or shapes are not those of the model.
        OSError: If there is no configuration.
    """
    model = _model_without_weights(directory, dtype, None, trust_remote_code=False)
    groups = list(_names_of_parameters(model).values())
    buffers = dict(_persistent_buffers(model))
    expected = {name: tensor.shape for name, tensor in model.named_parameters(remove_duplicate=False)}
    expected |= {name: buffer.shape for name, buffer in buffers.items()}
    missing = {names[0] for names in [*groups, *([name] for name in buffers)] if not shapes.keys() & set(names)}
    require_same_names(type(model).__name__, missing, unexpected_names(model, shapes.keys() - expected.keys()))
    for name in shapes.keys() & expected.keys():
        require_same_shape(name, shapes[name], expected[name])
    for names in groups:
        stored = next(name for name in names if name in shapes)
        owner, precision = model.get_submodule(stored.rpartition(".")[0]), model.get_parameter(stored).dtype
        _replace_parameter(model, names, read(stored, owner, precision))
    for name, buffer in buffers.items():
        buffer.copy_(read(name, model.get_submodule(name.rpartition(".")[0]), buffer.dtype))
    for module in model.modules():
        module._buffers.update(
            {name: buffer.to(device) for name, buffer in module._buffers.items() if buffer is not None}
        )
    return model.eval()


def _names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Return all names of every parameter, by its id; one that is tied has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _find_stored(names: list[str], files: dict[str, StoredTensor]) -> StoredTensor:
    """Return the stored tensor of a parameter, which has several names if it is tied."""
    found = [files[name] for name in names if name in files]
    if not found:
        raise ValueError(
            f"the files have no `{names[0]}`; `stream_weights` needs the names that `save_pretrained` of this model "
            "writes: load it without `stream_weights` and save it once"
        )
    if any(not torch.equal(found[0].read(), other.read()) for other in found[1:]):
        raise ValueError(f"the files have different values of `{names[0]}` and `{names[1]}`, which are tied")
    return found[0]


def _model_without_weights(
    directory: Path, dtype: torch.dtype, attn_implementation: str | None, trust_remote_code: bool
) -> Any:
    """Build the model of a configuration with its parameters on the meta device and its buffers in memory."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = load_config(directory, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("it is quantized; prune a model before it is quantized")
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        raise ValueError(
            f"{type(model).__name__} keeps some weights in float32, which is not supported where weights are loaded "
            "one at a time"
        )
    if getattr(model, "generation_config", None) is not None and (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Temporarily put every new parameter on the meta device, while buffers are computed in memory as usual.

    A model that is built under `torch.device("meta")` would lose its non-persistent buffers, such as the frequencies of
    rotary embeddings, which are in no file. So this uses torch's hook for the registration of parameters, of modules
    that this thread builds.
    """
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        # a parameter that is on the meta device already is being tied, and has to remain the same object
        if parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _replace_parameter(model: nn.Module, names: list[str], parameter: nn.Parameter) -> None:
    """Set a parameter at all of its names."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, parameter)


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return the buffers that are saved with the model."""
    saved = model.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
