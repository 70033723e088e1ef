"""Host memory for tensors on their way to or from a GPU: pinned, and used again for one set of tensors after another.

Fresh host memory costs more time than the copy: its pages have to be made first, and copies from or to memory that is
not pinned make the host wait for the GPU. On the CPU the same code copies at once, to plain memory.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["HostBuffers", "HostCopies", "pack_mask", "unpack_mask", "work_so_far"]

K = TypeVar("K", bound=Hashable)


class HostBuffers:
    """Buffers in host memory, pinned if they serve a CUDA device.

    Args:
        device: Device that the tensors come from or go to.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_pinned = device.type == "cuda"
        self._buffers: dict[Any, Tensor] = {}

    def like(self, tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """Return buffers for tensors; they are those of the last call where names, shapes and types are equal.

        Args:
            tensors: The tensors by name.
        """
        buffers: dict[K, Tensor] = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self._is_pinned)
            buffers[name] = buffer
        self._buffers = buffers
        return buffers


class HostCopies:
    """Copies tensors to the host, on CUDA while both the host and the device go on.

    Args:
        device: Device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = HostBuffers(device)
        # None has no effect as a context
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, tensors: Mapping[K, Tensor]) -> tuple[dict[K, Tensor], Callable[[], None]]:
        """Start to copy; the copies that the last call returned are overwritten.

        Args:
            tensors: The tensors by name; they must not be changed in place before the copies are complete.

        Returns:
            The copies, and a function that waits until they are complete, in any thread.
        """
        copies = self._buffers.like(tensors)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                copies[name].copy_(tensor, non_blocking=self._stream is not None)
                if self._stream is not None:
                    # its memory is not given to others before that
                    tensor.record_stream(self._stream)
            return copies, work_so_far(self._device)


def work_so_far(device: torch.device) -> Callable[[], None]:
    """Return a function that waits, in any thread, for the work that is queued now on the current stream of a device.

    Args:
        device: The device.
    """
    if device.type != "cuda":
        return _wait_for_nothing
    # a thread that waits for a blocking event sleeps
    event = torch.cuda.Event(blocking=True)
    torch.cuda.current_stream(device).record_event(event)
    return event.synchronize


def _wait_for_nothing() -> None:
    pass


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask, eight values a byte, the first one in the lowest bit: an eighth of the memory and of the copy.

    Args:
        mask: Bool of any shape.

    Returns:
        Unsigned bytes, of shape (values / 8,), rounded up.
    """
    bits = mask.flatten().view(torch.uint8)
    bits = F.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the mask of this shape that `pack_mask` has packed, in new memory.

    Args:
        packed: The bytes, on the CPU.
        shape: Shape of the mask.
    """
    return _bits_of_bytes().index_select(0, packed.int()).flatten()[: prod(shape)].view(shape)


@functools.cache
def _bits_of_bytes() -> Tensor:
    """Return the bits of each byte, bool of shape (256, 8)."""
    values = torch.arange(256, device="cpu")
    return values[:, None].bitwise_right_shift(values[:8]).bitwise_and(1).bool()
