"""Tensors that are in a file and not in memory: on the meta device, and they know where they are stored.

So a model larger than memory is a model like any other, whose blocks are brought in one at a time: `resident` does it
for as long as a block is worked on, and a block's own forward does it when it is called from anywhere else.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

__all__ = ["Stored", "bring_in_when_called", "is_stored", "require_whole", "resident", "store", "whole"]

# as wide as a vector register or a cache line
_ALIGNMENT = 64


@dataclass(frozen=True)
class Stored:
    """Where a tensor is.

    Args:
        path: The safetensors file.
        name: The tensor's name in it.
    """

    path: Path
    name: str

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Reads it into fresh memory; the file is closed afterwards.

        Kernels round by where a weight lies, so it lies as it does in a mapped file: the address is the same modulo
        64, and so are the results.

        Args:
            dtype: The type that is wanted; the file's own by default.

        Raises:
            ValueError: If the file cannot be read or does not hold it.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                mapped = file.get_tensor(self.name)
                return _placed_alike(mapped) if dtype in (None, mapped.dtype) else mapped.to(dtype)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"Expected '{self.path}' to be a whole safetensors file that holds `{self.name}`, but got: {error}; "
                "restore it."
            ) from error


def _placed_alike(mapped: Tensor) -> Tensor:
    num_bytes = mapped.numel() * mapped.element_size()
    room = torch.empty(num_bytes + _ALIGNMENT, dtype=torch.uint8)
    start = (mapped.data_ptr() - room.data_ptr()) % _ALIGNMENT
    # files that others wrote may have it where no tensor of its type can be
    start -= start % mapped.element_size()
    copy = room[start : start + num_bytes].view(mapped.dtype).view(mapped.shape)
    return copy.copy_(mapped)


def store(tensor: Tensor, stored: Stored) -> Tensor:
    """Says where a tensor is read from, from now on.

    Args:
        tensor: A tensor on the meta device; its type is the one that is read.
        stored: The place.

    Returns:
        The same tensor.
    """
    assert tensor.is_meta
    tensor.stored = stored  # type: ignore[attr-defined]
    return tensor


def is_stored(tensor: Tensor) -> bool:
    """Whether a tensor is in a file and not in memory."""
    return tensor.is_meta and hasattr(tensor, "stored")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with its values: read if it is stored, else itself."""
    if not is_stored(tensor):
        return tensor
    stored: Stored = tensor.stored  # type: ignore[attr-defined]
    return stored.read(tensor.dtype)


@contextmanager
def resident(block: nn.Module) -> Iterator[None]:
    """Within this context the stored parameters of a block are in memory, and changes to them are lost at its end.

    A block without any is left alone, and so is one that is in memory already.

    Args:
        block: The block.
    """
    taken = [
        (module, name, parameter)
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_stored(parameter)
    ]
    read: dict[int, nn.Parameter] = {}
    try:
        for module, name, parameter in taken:
            if id(parameter) not in read:
                read[id(parameter)] = nn.Parameter(whole(parameter), requires_grad=parameter.requires_grad)
            module._parameters[name] = read[id(parameter)]
        yield
    finally:
        for module, name, parameter in taken:
            module._parameters[name] = parameter


def bring_in_when_called(block: nn.Module) -> None:
    """Lets a block bring its stored parameters in whenever its forward runs.

    Set on the instance, as `override_forward` does: where that skips a block, nothing is read.

    Args:
        block: The block.
    """
    forward = block.forward

    @functools.wraps(forward)
    def streamed(*args: Any, **kwargs: Any) -> Any:
        with resident(block):
            return forward(*args, **kwargs)

    block.__dict__["forward"] = streamed


def require_whole(module: nn.Module) -> None:
    """Refuses a module with stored parameters.

    Args:
        module: The module.

    Raises:
        ValueError: If it has any.
    """
    name = next((name for name, parameter in module.named_parameters() if is_stored(parameter)), None)
    if name is not None:
        raise ValueError(
            f"Expected a model whose weights are in memory, but `{name}` and others are streamed from their files; "
            "leave out `stream_weights`, which is for `prune` alone."
        )
