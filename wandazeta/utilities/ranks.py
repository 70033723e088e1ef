"""Several processes that prune one model together: each has its share of the samples, all have the same weights."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """This process among those that prune together; by default it is alone.

    Sample i belongs to rank i modulo their number. Sums have the same bits on every rank.

    Args:
        rank: The number of this process.
        size: How many there are.
        device: Where they exchange tensors; those that are elsewhere are copied there and back.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self.size = size
        self._device = torch.device(device)

    @classmethod
    def of_process_group(cls, device: torch.device | str) -> "Ranks":
        """All processes of the default process group, or this one alone where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls()

    def own(self, samples: Iterable[int]) -> list[int]:
        """The samples of this rank, by their place among its own.

        Args:
            samples: Numbers over all ranks.

        Returns:
            Numbers among this rank's samples, in the same order.
        """
        return [sample // self.size for sample in samples if sample % self.size == self.rank]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their sums over the ranks, which must all pass the same shapes."""
        self._exchange(tensors, dist.all_reduce)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by those of rank 0."""
        self._exchange(tensors, lambda tensor: dist.broadcast(tensor, src=0))

    def total(self, number: float) -> float:
        """The sum of a number over the ranks."""
        if self.size == 1:
            return number
        summed = torch.tensor([number], dtype=torch.float64)
        self.sum_([summed])
        return summed.item()

    def first(self, value: T) -> T:
        """What rank 0 passes."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self._device)
        return values[0]

    def together(self, work: Callable[[], T]) -> T:
        """Does what may fail on some ranks alone, so that all of them fail.

        Args:
            work: Exchanges nothing with other ranks.

        Raises:
            ValueError: If it raised on another rank; the message names that and says why.
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
                raise ValueError(f"Pruning failed on rank {rank}: {failure}")
        return result

    def _exchange(self, tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
        if self.size == 1:
            return
        for tensor in tensors:
            there = tensor.detach().to(self._device).contiguous()
            exchange(there)
            if there.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(there)
