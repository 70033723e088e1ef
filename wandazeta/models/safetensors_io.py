"""Safetensors files read and written one tensor at a time; safetensors' own `save_file` wants all of them in memory."""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wandazeta.models.streaming import StoredTensor, materialize

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


class LazyTensor(NamedTuple):
    """A tensor that is not in memory yet.

    Args:
        dtype: Its type as safetensors calls it, `BF16`.
        shape: Its shape.
        read: Makes or reads it.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        bits = re.search(r"\d+", self.dtype)
        # BOOL is the one without a number
        return int(bits[0]) // 8 if bits else 1

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.itemsize * math.prod(self.shape)


def open_safetensors(path: Path) -> Any:
    """Opens a file.

    Args:
        path: The file.

    Returns:
        What `safetensors.safe_open` gives, for a `with` statement.

    Raises:
        ValueError: If it cannot be read or is no whole safetensors file.
    """
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        raise ValueError(f"Expected '{path}' to be a file that can be read, but got: {error}.") from error
    except SafetensorError as error:
        raise ValueError(
            f"Expected '{path}' to be a whole safetensors file, but got: {error}; copy it anew."
        ) from error


def stored(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file; it is opened again for each that is read, so that no mapped page stays in memory.

    Args:
        path: The file.

    Returns:
        Tensors by name.

    Raises:
        ValueError: As `open_safetensors` does.
    """
    tensors = {}
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            piece = file.get_slice(name)
            tensors[name] = LazyTensor(piece.get_dtype(), tuple(piece.get_shape()), StoredTensor(path, name).read)
    return tensors


def lazy(tensor: Tensor) -> LazyTensor:
    """A tensor in memory, or a stored one, which is read when it is written.

    Args:
        tensor: Any dense tensor.
    """
    return LazyTensor(_NAMES[tensor.dtype], tuple(tensor.shape), partial(materialize, tensor))


def write_streamed(path: Path, tensors: Mapping[str, LazyTensor], metadata: dict[str, str]) -> None:
    """Writes a file that exists whole or not at all.

    Args:
        path: Where it goes.
        tensors: Read one after the other, each when it is written.
        metadata: What the file says of itself.
    """
    # readers view the bytes as the type: wide types first, so that each begins at a multiple of its size
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].num_bytes
        header[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(tensors[name].read().detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
