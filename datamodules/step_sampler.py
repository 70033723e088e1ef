"""A sampler whose whole state is the number of completed steps."""

from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler


class BatchDataset(Dataset[dict[str, torch.Tensor]]):
    """Rows that are asked for in whole batches: indexing with a list of places collates those rows."""

    def __init__(self, rows: list[Any], collate: Callable[[list[Any]], dict[str, torch.Tensor]]) -> None:
        self.rows = rows
        self.collate = collate

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return self.collate([self.rows[index] for index in indices])


class StepSampler(DistributedSampler[list[int]]):
    """Yield whole batches of row numbers, each a pure function of (seed, step, data rank).

    Every epoch is a permutation of the rows, cut into global batches; rows that fill none are left out. Iteration
    starts at the trainer's step, so a resumed run sees the batches that an undisturbed one would have seen. Use it
    with `DataLoader(BatchDataset(…), sampler=…, batch_size=None)`. It is a DistributedSampler so that Lightning, which
    would cut other samplers into one share per process, leaves it alone.

    Args:
        rows: The rows to sample from; only their number matters.
        batch_size: Rows per batch and data rank.
        seed: Seed of the permutations.
        trainer: Trainer that knows the completed steps and, through `trainer.lightning_module.data_sharding`
            (num_replicas, rank), how the data is shared; without that attribute every process has its own share.

    Raises:
        ValueError: If the rows do not fill one batch.
    """

    def __init__(self, rows: Sized, batch_size: int, seed: int = 0, trainer: Any = None) -> None:
        super().__init__(rows, num_replicas=1, rank=0, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.num_rows = len(rows)
        self.batch_size = batch_size
        self.trainer = trainer
        if self.num_rows < batch_size:
            raise ValueError(
                f"Expected argument `batch_size` to be at most the number of training examples ({self.num_rows}), "
                f"but got {batch_size}"
            )

    @property
    def sharding(self) -> tuple[int, int]:
        """The number of data replicas and this process' place among them."""
        module = getattr(self.trainer, "lightning_module", None)
        sharding = getattr(module, "data_sharding", None)
        if sharding is None:
            return getattr(self.trainer, "world_size", 1), getattr(self.trainer, "global_rank", 0)
        return sharding

    @property
    def first_step(self) -> int:
        """The step (in batches) at which iteration starts: the trainer's."""
        if self.trainer is None:
            return 0
        # optimizer steps; where gradients are accumulated each took several batches
        return self.trainer.global_step * self.trainer.accumulate_grad_batches

    def __len__(self) -> int:
        num_replicas, _ = self.sharding
        steps = self.num_rows // (self.batch_size * num_replicas)
        if steps == 0:
            raise ValueError(
                f"Expected {num_replicas} x `batch_size` to be at most the number of training examples "
                f"({self.num_rows}), but got batches of {self.batch_size}"
            )
        return steps

    def batch(self, step: int) -> list[int]:
        """Return the row numbers of the batch of a global step."""
        num_replicas, rank = self.sharding
        epoch, step_in_epoch = divmod(step, len(self))
        # one generator per epoch; a large odd stride keeps neighbouring seeds' epochs apart
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.num_rows, generator=generator)
        start = (step_in_epoch * num_replicas + rank) * self.batch_size
        return order[start : start + self.batch_size].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first_step
        for step in range(first, (first // len(self) + 1) * len(self)):
            yield self.batch(step)

    def set_epoch(self, epoch: int) -> None:
        """Ignore the epoch: the step says all."""
