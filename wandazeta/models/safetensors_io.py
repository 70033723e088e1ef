"""Read and write safetensors files one tensor at a time, for models larger than memory.

`safetensors.torch.save_file` needs all tensors of a file in memory at once.
"""

import json
import math
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
from wandazeta.utilities.files import open_atomically

__all__ = ["LazyTensor", "open_safetensors", "read_lazily", "write_streamed"]

_DTYPE_NAMES = {
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
    """Type and shape of a tensor, and a function that loads or computes its values.

    Args:
        dtype: Type of the elements in safetensors' spelling, such as `BF16`.
        shape: Shape of the tensor.
        read: Returns the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """Wrap a dense tensor, or one that is stored in a file (`wandazeta.models.streaming`) and read when needed.

        Args:
            tensor: The tensor.
        """
        return cls(_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), partial(materialize, tensor))

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        bits = re.search(r"\d+", self.dtype)
        # BOOL is the only name without a number
        return int(bits[0]) // 8 if bits else 1

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.itemsize * math.prod(self.shape)


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file, with errors that name it.

    Args:
        path: The file.

    Returns:
        The context manager that `safetensors.safe_open` returns.

    Raises:
        ValueError: If the file cannot be read or is not a complete safetensors file.
    """
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        raise ValueError(f"Expected '{path}' to be a file that can be read, but got: {error}.") from error
    except SafetensorError as error:
        raise ValueError(
            f"Expected '{path}' to be a complete safetensors file, but got: {error}; copy it again."
        ) from error


def read_lazily(path: Path) -> dict[str, LazyTensor]:
    """List the tensors of a safetensors file without loading them.

    The file is opened again for each tensor that is read, so that no memory-mapped page of it stays in memory.

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


def write_streamed(path: Path, tensors: Mapping[str, LazyTensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically, with one tensor in memory at a time.

    Args:
        path: Where the file goes.
        tensors: Tensors by name; each is read when its turn comes.
        metadata: Metadata of the file.

    Raises:
        OSError: If the file cannot be written, for example on a full disk; the error names `path`.
    """
    # readers map the bytes as arrays: wide types first, so that each tensor begins at a multiple of its element size
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].num_bytes
        header[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open_atomically(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(tensors[name].read().detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
