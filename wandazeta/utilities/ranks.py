"""Collective operations between the processes (ranks) of a run."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """This process and its peers; by default there is one rank.

    Sample i is processed by rank i modulo `size`. Sums have the same bits on every rank.

    Args:
        rank: Index of this process.
        size: Number of processes.
        device: Device of the collectives, as the backend requires it; tensors elsewhere are copied there and back.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self.size = size
        self._device = torch.device(device)

    @classmethod
    def of_process_group(cls, device: torch.device | str) -> "Ranks":
        """Return the ranks of the default process group, or a single rank if there is no process group.

        Args:
            device: Device of the collectives.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls()

    def local_indices(self, samples: Iterable[int]) -> list[int]:
        """Select the samples of this rank and convert their global indices to local ones.

        Args:
            samples: Global indices.

        Returns:
            Indices into the list of this rank's samples, in the same order.

        Examples:
            >>> Ranks(rank=1, size=2).local_indices([0, 1, 2, 3])
            [0, 1]
        """
        return [sample // self.size for sample in samples if sample % self.size == self.rank]

    def all_reduce_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all ranks, in place.

        Args:
            tensors: As many tensors on every rank, of the same shapes.
        """
        self._exchange(tensors, dist.all_reduce)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of rank 0, in place.

        Args:
            tensors: As many tensors on every rank, of the same shapes.
        """
        self._exchange(tensors, lambda tensor: dist.broadcast(tensor, src=0))

    def sum(self, number: float) -> float:
        """Sum a number over all ranks, in float64.

        Args:
            number: The term of this rank.
        """
        if self.size == 1:
            return number
        summed = torch.tensor([number], dtype=torch.float64)
        self.all_reduce_([summed])
        return summed.item()

    def broadcast_object(self, value: T) -> T:
        """Broadcast an object from rank 0.

        Args:
            value: Anything that can be pickled; ignored on other ranks.
        """
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self._device)
        return values[0]

    def gather_objects(self, value: T) -> list[T]:
        """Collect an object from every rank, on every rank.

        Args:
            value: Anything that can be pickled.

        Returns:
            The objects in the order of the ranks.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Run `work`; raise on every rank if it fails on any.

        Args:
            work: A function without collective operations.

        Returns:
            The result of `work` on this rank.

        Raises:
            ValueError: If it failed on another rank; the message names that rank and its error.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        failures: list[Any] = [None] * self.size
        if self.size > 1:
            dist.all_gather_object(failures, None if error is None else str(error))
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise ValueError(f"Failed on rank {rank}: {failure}")
        return result

    def _exchange(self, tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
        if self.size == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().to(self._device).contiguous()
            exchange(sent)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(sent)


def prepare_to_join() -> None:
    """Import what would keep a process group alive; to be called before the group is created.

    Modules of torch and DeepSpeed have the default group of the moment of their import as default of an argument. It
    then outlives `destroy_process_group` with gloo's threads, and these abort the process when the interpreter ends
    under them. transformers imports DeepSpeed when it saves a model.
    """
    for module in ("torch.distributed.nn", "deepspeed.comm"):
        # what is missing, or fails as DeepSpeed does without a CUDA toolkit, keeps nothing
        with suppress(Exception):
            import_module(module)
