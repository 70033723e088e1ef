"""Put one block at a time on the compute device, while the weights of the next one are read."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from wandazeta.models.streaming import is_file_backed, materialize, parameters_loaded
from wandazeta.utilities.background import BackgroundThread
from wandazeta.utilities.host_memory import HostBuffers, work_so_far

__all__ = ["BlockPlacement"]


class BlockPlacement:
    """Puts one block at a time on the compute device, in order.

    If that is a GPU, the weights of blocks that are in CPU memory or in files go there through pinned memory, and those
    of the next block are read meanwhile.

    Args:
        blocks: The blocks.
        device: The compute device.
        reader: Reads the next block.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device, reader: BackgroundThread) -> None:
        self._blocks = list(blocks)
        self._device = device
        self._reader = reader
        self._buffers = HostBuffers(device)
        self._reads_ahead = device.type == "cuda"
        self._next: int | None = None

    @contextmanager
    def on_device(self, index: int) -> Iterator[dict[str, Tensor]]:
        """Context in which a block is on the device; changes to its weights there do not reach those at home.

        Args:
            index: Position of the block.

        Yields:
            Parameters and buffers at home by name, of those that are in memory elsewhere; none that are in files.
        """
        block = self._blocks[index]
        uploaded = {
            name: buffer.to(self._device, non_blocking=True, copy=True)
            for name, buffer in self._read_ahead(index).items()
        }
        self._start_reading(index + 1)
        parameters = dict(block.named_parameters())
        tensors: dict[str, Tensor] = {n: p for n, p in parameters.items() if not is_file_backed(p)}
        tensors |= dict(block.named_buffers())
        homes: dict[str, Tensor] = {}
        with parameters_loaded(block, {id(parameters[name]): tensor for name, tensor in uploaded.items()}):
            try:
                for name, tensor in tensors.items():
                    home = tensor.data
                    here = uploaded[name] if name in uploaded else home.to(self._device)
                    if here is not home:
                        homes[name], tensor.data = home, here
                # weights from files, if they were not read ahead
                block.to(self._device)
                yield homes
            finally:
                for name, home in homes.items():
                    tensors[name].data = home

    def _read_ahead(self, index: int) -> dict[str, Tensor]:
        """Return those weights of a block in pinned memory that are not on the device, by name."""
        if not self._reads_ahead:
            return {}
        if self._next != index:
            self._start_reading(index)
        pinned: dict[str, Tensor] = self._reader.wait()
        return pinned

    def _start_reading(self, index: int) -> None:
        if self._reads_ahead and index < len(self._blocks):
            self._reader.submit(partial(self._read, index, work_so_far(self._device)))
            self._next = index

    def _read(self, index: int, is_uploaded: Callable[[], None]) -> dict[str, Tensor]:
        # the block before has left the buffers
        is_uploaded()
        elsewhere = {name: p for name, p in self._blocks[index].named_parameters() if p.device.type != "cuda"}
        buffers = self._buffers.like(elsewhere)
        for name, buffer in buffers.items():
            buffer.copy_(materialize(elsewhere[name]).detach())
        return buffers
