"""What ranks tell each other in a step: the losses of its queries, and whether they still agree."""

from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from wandazeta.zeroth_order import Evaluations

_NUM_PARTS = 3


def adjust_strategy(strategy: Any, save_frozen: bool = False) -> None:
    """Tell DeepSpeed to leave frozen weights out of checkpoints, and what it would ask the loader for.

    Args:
        strategy: The strategy; any but DeepSpeed's is left as it is.
        save_frozen: Leave DeepSpeed's checkpoints as they are, frozen weights included.
    """
    if hasattr(strategy, "exclude_frozen_parameters"):
        strategy.exclude_frozen_parameters |= not save_frozen
        # only logged; Lightning would ask the loader's batch sampler, and loaders of whole batches have none
        (strategy.config or {}).setdefault("train_micro_batch_size_per_gpu", 1)


def require_whole_weights(strategy: Any) -> None:
    """Refuse strategies that keep the model's weights elsewhere than in its parameters.

    Raises:
        ValueError: If the strategy shards weights, or has copies of them.
    """
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
        raise ValueError(
            f"Expected a strategy that leaves the weights whole for `Weights`, but got {type(strategy).__name__}; use "
            "one device or DDP, or train adapters"
        )


class Exchange:
    """Shares out the points or the data of a step and sums one short vector over the ranks.

    Args:
        trainer: Trainer that knows the ranks.
        parallel: What is shared out, the points of a step (its `queries`) or its `data`.
        lockstep: Let every rank run equally many points, repeating one where there are too few.
    """

    def __init__(self, trainer: Any, parallel: Literal["queries", "data"], lockstep: bool = False) -> None:
        self.strategy = trainer.strategy
        self.world_size: int = trainer.world_size
        self.rank: int = trainer.global_rank
        self.parallel = parallel
        self.lockstep = lockstep

    def share(self, num_points: int) -> list[int]:
        """Return the points that this rank evaluates."""
        if self.parallel == "data":
            return list(range(num_points))
        most = -(-num_points // self.world_size)
        points = [self.rank + turn * self.world_size for turn in range(most)]
        if self.lockstep:
            # past the end: run for the others' sake, and left out of the sum
            return [point if point < num_points else num_points - 1 for point in points]
        return [point for point in points if point < num_points]

    def gather(self, evaluations: Evaluations, num_points: int, theta: Tensor, input_ids: Tensor) -> Tensor:
        """Return the values of all points `(V, P)`, the same bits on every rank.

        Args:
            evaluations: This rank's.
            num_points: Points of the step, P.
            theta: The trained vector, to notice ranks that drifted apart by as little as a bit.
            input_ids: The batch, to notice ranks that see another one where they must not.

        Raises:
            ValueError: If ranks share queries but not the batch.
            RuntimeError: If the trained vector differs between ranks.
        """
        if self.world_size == 1:
            return evaluations.values_VP
        weight = float(len(input_ids)) if self.parallel == "data" else 1.0
        values_VP = evaluations.values_VP.new_zeros(len(evaluations.values_VP), num_points)
        for place, point in enumerate(evaluations.points):
            if self.parallel == "data" or point % self.world_size == self.rank:
                values_VP[:, point] = evaluations.values_VP[:, place] * weight
        marks = torch.cat([checksum(theta), checksum(input_ids)])
        vector = torch.cat([values_VP.flatten(), values_VP.new_tensor([weight]), marks, marks**2])
        vector = self.strategy.reduce(vector, reduce_op="sum")
        values, total_weight, sums, squares = vector.split([values_VP.numel(), 1, len(marks), len(marks)])
        self._require_agreement(sums, squares)
        values_VP = values.view_as(values_VP)
        return values_VP / total_weight if self.parallel == "data" else values_VP

    def of_base(self, values: Tensor, known: bool, batch_size: int) -> Tensor:
        """Return what is measured at the trained vector itself, the same bits on every rank.

        Args:
            values: This rank's, of any shape; zeros where it does not know.
            known: Whether it does: with shared queries one rank, with shared data all.
            batch_size: Examples of this rank's batch.
        """
        if self.world_size == 1:
            return values
        weight = float(known) * (batch_size if self.parallel == "data" else 1)
        vector = torch.cat([values.flatten() * weight, values.new_tensor([weight])])
        vector = self.strategy.reduce(vector, reduce_op="sum")
        return (vector[:-1] / vector[-1]).view_as(values)

    def _require_agreement(self, sums: Tensor, squares: Tensor) -> None:
        # by Cauchy-Schwarz these are equal only where all ranks agree; whole numbers, so without rounding
        theta, batch = (self.world_size * squares == sums**2).view(2, _NUM_PARTS).all(1).tolist()
        if not theta:
            raise RuntimeError(
                "The adapters differ between ranks: a rank's memory was changed behind the others' backs"
            )
        if self.parallel == "queries" and not batch:
            raise ValueError(
                'Expected every rank to see the same batch with `parallel="queries"`, but the batches differ; use '
                "wandazeta's data modules, or a sampler that shards by `data_sharding` of the module"
            )


def checksum(values: Tensor) -> Tensor:
    """Sum the bits of a tensor, weighted by their places.

    Args:
        values: Any tensor whose elements have 4 or 8 bytes.

    Returns:
        Three whole numbers below 2**16 in fp64, shape `(3,)`: small enough that the sum of their squares over a
        thousand ranks is exact.
    """
    bits = values.contiguous().view(torch.int64 if values.element_size() == 8 else torch.int32).flatten().long()
    # odd weights modulo 2**64: a change of any one element changes the sum
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    total = (bits * (places * -0x61C8864680B583EB)).sum()
    # the upper bits depend on all lower ones
    parts = torch.stack([total >> shift & 0xFFFF for shift in (16, 32, 48)])
    return parts.double()
