"""Sampler whose only state is the number of completed training steps."""

from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from wandazeta.protocols import SupportsDataSharding


class BatchDataset(Dataset[dict[str, torch.Tensor]]):
    """Dataset of whole batches: indexing with a list of row numbers collates those rows.

    Args:
        rows: The rows.
        collate: Makes a batch from a list of rows.
    """

    def __init__(self, rows: list[Any], collate: Callable[[list[Any]], dict[str, torch.Tensor]]) -> None:
        self.rows = rows
        self.collate = collate

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return self.collate([self.rows[index] for index in indices])


class StepSampler(DistributedSampler[list[int]], SequentialSampler):
    """Sampler of whole batches of row numbers, each a pure function of (seed, step, data rank).

    Every epoch is a permutation of the rows, cut into global batches; rows that do not fill one are left out. Iteration
    starts at the trainer's step, so that a resumed run sees the same batches as a run that never stopped. With
    `overfit_batches` of the trainer, every epoch has the first batches of the first one. Use it as
    `DataLoader(BatchDataset(…), sampler=…, batch_size=None)`.

    The base classes keep Lightning from replacing it by a sampler of single rows: without DistributedSampler it would
    add one that divides the data among all processes, without SequentialSampler one that does not shuffle, for
    `overfit_batches`.

    Args:
        rows: The rows to sample from; only their number matters.
        batch_size: Rows per batch and data rank.
        seed: Seed of the permutations.
        trainer: Trainer with the number of completed steps. If its module has an attribute `data_sharding`
            (`wandazeta.protocols.SupportsDataSharding`), that decides how the data are divided; otherwise every
            process gets a part of its own.

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
        """Number of parts of the data, and the part of this process."""
        module = getattr(self.trainer, "lightning_module", None)
        if isinstance(module, SupportsDataSharding):
            return module.data_sharding
        return getattr(self.trainer, "world_size", 1), getattr(self.trainer, "global_rank", 0)

    @property
    def first_step(self) -> int:
        """Number of batches that are done, at which iteration starts."""
        if self.trainer is None:
            return 0
        # with accumulated gradients an optimizer step takes several batches
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
        """Return the row numbers of a batch.

        Args:
            step: Number of batches before it.
        """
        num_replicas, rank = self.sharding
        epoch, step_in_epoch = divmod(step, len(self))
        # one generator per epoch; with the large stride no two seeds have an epoch in common
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.num_rows, generator=generator, device="cpu")
        start = (step_in_epoch * num_replicas + rank) * self.batch_size
        return order[start : start + self.batch_size].tolist()

    @property
    def num_overfit_batches(self) -> int | None:
        """Number of batches that every epoch repeats, or None if each epoch has batches of its own."""
        limit: int | float = getattr(self.trainer, "overfit_batches", 0)
        if not limit:
            return None
        return min(limit, len(self)) if isinstance(limit, int) else max(1, int(limit * len(self)))

    def __iter__(self) -> Iterator[list[int]]:
        first, repeated = self.first_step, self.num_overfit_batches
        length = repeated or len(self)
        for step in range(first, (first // length + 1) * length):
            yield self.batch(step if repeated is None else step % repeated)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the step decides the epoch."""
