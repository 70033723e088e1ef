"""The 2:4 packed form of a pruned model: one file with the kept values, from which the plain weights are restored.

In every group of 4 consecutive inputs of a row, the 2 kept values are stored in order, and their positions in 2 bits
each. The rows of fused experts follow one another. A group takes two values and half a byte: 9/16 (0.5625) of its dense
size in 16-bit precision, 17/32 (0.53125) in 32-bit. All other tensors are stored unchanged. The file is a safetensors
file: a weight NAME becomes `NAME.values` and `NAME.indices`, and the metadata entry `wandazeta` holds version, pattern
and the packed weights.

`python -m wandazeta.pruning.export.packed SRC DST` writes a plain Hugging Face directory from one that holds the
packed file, so that only the packed file has to be shipped.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wandazeta.models.safetensors_io import LazyTensor, open_safetensors, read_lazily, write_streamed
from wandazeta.pruning.export.masks import MASKS_FILE
from wandazeta.utilities.files import check_writable, replace_directory

__all__ = [
    "PACKED_FILE",
    "PackedWeight",
    "load_packed",
    "main",
    "pack_2of4",
    "read_packed",
    "restore_plain",
    "unpack_2of4",
    "write_packed",
]

# beside the masks, for the same reason: some loaders read every safetensors file beside config.json as weights
PACKED_FILE = "sparsity/model.2of4.safetensors"

_VERSION = 1
_PATTERN = "2:4"
_PLAIN_FILES = ("model.safetensors", "model-*-of-*.safetensors")
_PLAIN_INDEX = "model.safetensors.index.json"
_TOO_MANY = 0xFF
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _positions_of(code: int) -> int:
    """Positions of the kept values of a group, 2 bits each, the first in the lower bits.

    Where fewer than 2 are kept, the first removed positions fill up: sparse kernels expect 2 positions in order.

    Args:
        code: Mask of the group, bit i for input i.
    """
    kept = [i for i in range(4) if code >> i & 1]
    if len(kept) > 2:
        return _TOO_MANY
    removed = [i for i in range(4) if i not in kept]
    first, second = sorted(kept + removed[: 2 - len(kept)])
    return first | second << 2


# by the 16 masks that a group can have
_POSITIONS = torch.tensor([_positions_of(code) for code in range(16)], dtype=torch.uint8)


def pack_2of4(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a 2:4 pruned weight.

    Args:
        weight: Shape (out, in), in a multiple of 4; +0.0 wherever the mask is False.
        mask: Bool of shape (out, in), at most 2 True in every group of 4 inputs.

    Returns:
        The kept values, of shape (out, in / 2) and the weight's type, and their positions: uint8 of shape
        (ceil(out * in / 8),), four positions of 2 bits per byte, the first in the lowest bits.

    Raises:
        ValueError: If the shapes do not fit, a group keeps more than 2 values, or a pruned weight is not +0.0.

    Examples:
        >>> pack_2of4(torch.tensor([[0.0, 3.0, 0.0, 2.0]]), torch.tensor([[False, True, False, True]]))
        (tensor([[3., 2.]]), tensor([13], dtype=torch.uint8))
    """
    if weight.ndim != 2 or weight.shape[1] % 4 or mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            "Expected argument `weight` to be a matrix whose width is a multiple of 4 and `mask` to be bool of the "
            f"same shape, but got {tuple(weight.shape)} and {mask.dtype} of {tuple(mask.shape)}; only 2:4 weights can "
            "be packed."
        )
    pairs = _pairs(mask)
    # compared as integers: every bit counts, that of -0.0 and those of NaN too
    bits = _bits(weight.contiguous())
    kept = bits.view(-1, 4).gather(1, _halves(pairs, 2).long())
    if torch.count_nonzero(kept) != torch.count_nonzero(bits):
        raise ValueError("Expected argument `weight` to be +0.0 wherever `mask` is False, but it is not; prune it.")
    return kept.view(weight.shape[0], weight.shape[1] // 2).view(weight.dtype), _join(pairs)


def unpack_2of4(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """Restore a weight that `pack_2of4` packed.

    Args:
        values: The kept values, of shape (out, in / 2).
        indices: Their positions, uint8 of shape (ceil(out * in / 8),).
        shape: Shape of the weight, (out, in).

    Returns:
        The weight, of shape (out, in) and the values' type, bit for bit.

    Raises:
        ValueError: If values or indices do not fit the shape.

    Examples:
        >>> unpack_2of4(torch.tensor([[3.0, 2.0]]), torch.tensor([13], dtype=torch.uint8), (1, 4))
        tensor([[0., 3., 0., 2.]])
    """
    rows, width = shape
    if width % 4 or values.shape != (rows, width // 2) or indices.shape != (math.ceil(rows * width / 8),):
        raise ValueError(
            f"Expected argument `shape` to fit values and indices, but got {tuple(shape)} for {tuple(values.shape)} "
            f"and {tuple(indices.shape)}; take all three from the same weight."
        )
    pairs = _halves(indices, 4).view(-1)[: rows * width // 4]
    bits = _bits(values.contiguous())
    dense = torch.zeros((rows * width // 4, 4), dtype=bits.dtype, device=bits.device)
    return dense.scatter_(1, _halves(pairs, 2).long(), bits.view(-1, 2)).view(rows, width).view(values.dtype)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])


def _pairs(mask: Tensor) -> Tensor:
    """Positions of every group, 4 bits each, uint8 of shape (groups,)."""
    kept = mask.contiguous().view(torch.uint8).view(-1, 4)
    code = kept[:, 0] | kept[:, 1] << 1 | kept[:, 2] << 2 | kept[:, 3] << 3
    pairs = _POSITIONS.to(mask.device)[code.long()]
    if bool((pairs == _TOO_MANY).any()):
        raise ValueError("Expected argument `mask` to keep at most 2 of every 4 inputs, but it keeps more; prune 2:4.")
    return pairs


def _join(pairs: Tensor) -> Tensor:
    """Put the 4 bits of two groups into each byte, uint8 of shape (ceil(groups / 2),)."""
    padded = torch.nn.functional.pad(pairs, (0, pairs.numel() % 2))
    return padded[0::2] | padded[1::2] << 4


def _halves(joined: Tensor, num_bits: int) -> Tensor:
    """Split every element into its lowest and its next `num_bits` bits, uint8 of shape (elements, 2)."""
    return torch.stack((joined & ((1 << num_bits) - 1), joined >> num_bits), dim=1)


def write_packed(directory: str | os.PathLike[str]) -> Path:
    """Write the packed file of an exported model beside its plain files, one tensor in memory at a time.

    Args:
        directory: Holds `model*.safetensors`, in one file or in shards, and the masks `sparsity/masks.safetensors`.

    Returns:
        The path of the packed file.

    Raises:
        ValueError: If a file is missing, or a mask is not 2:4 or does not belong to a weight.
    """
    directory = Path(directory)
    paths = sorted(path for pattern in _PLAIN_FILES for path in directory.glob(pattern))
    if not paths:
        raise ValueError(f"Expected argument `directory` to hold `model.safetensors`, but '{directory}' does not.")
    entries = {name: entry for path in paths for name, entry in read_lazily(path).items()}
    packed: dict[str, dict[str, Any]] = {}
    for name, mask in sorted(read_lazily(directory / MASKS_FILE).items()):
        if name not in entries:
            raise ValueError(f"Expected a weight for every mask, but '{directory}' holds none for `{name}`.")
        weight = entries.pop(name)
        transposed = _is_transposed(name, mask.read())
        packed[name] = {"shape": weight.shape, "transposed": transposed}
        entries |= _pack_entries(name, weight, mask.read, transposed)
    note = {"version": _VERSION, "pattern": _PATTERN, "weights": packed}
    check_writable(directory, "directory", sum(entry.num_bytes for entry in entries.values()))
    (directory / PACKED_FILE).parent.mkdir(exist_ok=True)
    write_streamed(directory / PACKED_FILE, entries, {"format": "pt", "wandazeta": json.dumps(note)})
    return directory / PACKED_FILE


def _rows(tensor: Tensor, transposed: bool) -> Tensor:
    """Return a weight, of one layer or of fused experts, with shape (rows, in)."""
    tensor = tensor.transpose(-1, -2) if transposed else tensor
    return tensor.reshape(-1, tensor.shape[-1])


def _is_transposed(name: str, mask: Tensor) -> bool:
    """Whether the inputs are the last but one dimension of a mask, as in transformers' `Conv1D`, (in, out)."""
    for transposed in (False, True) if mask.ndim in (2, 3) else ():
        rows = _rows(mask, transposed)
        if rows.shape[1] % 4 == 0 and bool((rows.reshape(-1, 4).sum(1) == 2).all()):
            return transposed
    raise ValueError(
        f"Expected every mask to keep exactly 2 of every 4 inputs, but that of `{name}` does not; "
        "only models pruned with sparsity_pattern='2:4' can be packed."
    )


def _pack_entries(
    name: str, weight: LazyTensor, read_mask: Callable[[], Tensor], transposed: bool
) -> dict[str, LazyTensor]:
    def values() -> Tensor:
        return pack_2of4(_rows(weight.read(), transposed), _rows(read_mask(), transposed))[0]

    def indices() -> Tensor:
        return _join(_pairs(_rows(read_mask(), transposed)))

    width = weight.shape[-2 if transposed else -1]
    num_rows = math.prod(weight.shape) // width
    return {
        f"{name}.values": LazyTensor(weight.dtype, (num_rows, width // 2), values),
        f"{name}.indices": LazyTensor("U8", (math.ceil(num_rows * width / 8),), indices),
    }


def load_packed(directory_or_file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load the state dict of the plain files from the packed file, bit for bit.

    Args:
        directory_or_file: The packed file, or a directory that holds it.

    Returns:
        Tensors by name on disk; tied weights appear once.

    Raises:
        ValueError: If there is no packed file, or it is damaged or of another version.
    """
    return {name: entry.read() for name, entry in sorted(_plain_entries(directory_or_file).items())}


def restore_plain(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write a plain Hugging Face directory from one that holds the packed file.

    The new directory appears under its name only once it is complete.

    Args:
        source: Directory with the packed file, the configuration, the tokenizer and any other files to copy.
        target: A new or empty directory; it gets these files, and `model.safetensors` instead of the packed file.

    Raises:
        ValueError: If the source holds no readable packed file, or the target is not empty or cannot be written to.
        OSError: If a file cannot be written, for example on a full disk.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    if target.is_relative_to(source):
        raise ValueError(
            f"Expected argument `target` to be a folder outside the source, but got '{target}'; choose another folder."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"Expected argument `target` to be a new or empty folder, but got '{target}'; choose another folder."
        )
    if not source.is_dir():
        raise ValueError(
            f"Expected argument `source` to be a directory, but got '{source}'; give the directory to restore."
        )
    entries = _plain_entries(source)
    check_writable(target.parent, "target", sum(entry.num_bytes for entry in entries.values()))
    with replace_directory(target) as fresh:
        weights = shutil.ignore_patterns(Path(PACKED_FILE).name, *_PLAIN_FILES, _PLAIN_INDEX)
        shutil.copytree(source, fresh, ignore=weights, dirs_exist_ok=True)
        write_streamed(fresh / "model.safetensors", entries, {"format": "pt"})


def _packed_path(directory_or_file: str | os.PathLike[str]) -> Path:
    path = Path(directory_or_file)
    return path / PACKED_FILE if path.is_dir() else path


class PackedWeight(NamedTuple):
    """A weight of the packed file, of which nothing is loaded yet.

    Args:
        values: The kept values, as `pack_2of4` returns them.
        indices: Their positions.
        shape: Shape of the weight in the plain files.
        transposed: Whether the inputs are the last but one dimension of `shape`, as in transformers' `Conv1D`.
    """

    values: LazyTensor
    indices: LazyTensor
    shape: tuple[int, ...]
    transposed: bool

    def unpack(self, device: torch.device | str = "cpu") -> Tensor:
        """Load the weight.

        Args:
            device: Where it is unpacked.

        Returns:
            The weight in its plain shape.
        """
        *others, rows, width = (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape
        values, indices = self.values.read().to(device), self.indices.read().to(device)
        weight = unpack_2of4(values, indices, (math.prod(others) * rows, width)).view(*others, rows, width)
        return weight.transpose(-1, -2).contiguous() if self.transposed else weight


def read_packed(directory_or_file: str | os.PathLike[str]) -> tuple[dict[str, PackedWeight], dict[str, LazyTensor]]:
    """List the tensors of a packed file without loading them.

    Args:
        directory_or_file: The packed file, or a directory that holds it.

    Returns:
        The packed weights and all other tensors, by name on disk.

    Raises:
        ValueError: If there is no packed file, or it is damaged or of another version.
    """
    path = _packed_path(directory_or_file)
    with open_safetensors(path) as file:
        note = json.loads((file.metadata() or {}).get("wandazeta", "{}"))
    if note.get("version") != _VERSION or note.get("pattern") != _PATTERN:
        raise ValueError(
            f"Expected a {_PATTERN} packed file of version {_VERSION}, but got pattern {note.get('pattern')!r} and "
            f"version {note.get('version')!r}; write it with `wandazeta prune --pack true`."
        )
    others = read_lazily(path)
    packed = {}
    for name, layout in note["weights"].items():
        values, indices = others.pop(f"{name}.values"), others.pop(f"{name}.indices")
        packed[name] = PackedWeight(values, indices, tuple(layout["shape"]), layout["transposed"])
    return packed, others


def _plain_entries(directory_or_file: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of the plain files, each of which is unpacked when it is read."""
    packed, others = read_packed(directory_or_file)
    return others | {name: LazyTensor(each.values.dtype, each.shape, each.unpack) for name, each in packed.items()}


def main(args: list[str] | None = None) -> None:
    """Restore a plain directory from the command line.

    Args:
        args: The arguments; those of the process by default.
    """
    description = "Write a plain Hugging Face directory from one that holds the 2:4 packed file."
    parser = argparse.ArgumentParser(prog="python -m wandazeta.pruning.export.packed", description=description)
    parser.add_argument("source", metavar="SRC", help=f"directory with {PACKED_FILE}, configuration and tokenizer")
    parser.add_argument("target", metavar="DST", help="new or empty directory to write")
    chosen = parser.parse_args(args)
    try:
        restore_plain(chosen.source, chosen.target)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    sys.stdout.write(f"restored model: {Path(chosen.target).absolute()}\n")


if __name__ == "__main__":
    main()
