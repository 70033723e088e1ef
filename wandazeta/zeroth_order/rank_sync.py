"""Divide a step over ranks, and exchange its losses: one short vector per step, whatever the size of the model."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from wandazeta.zeroth_order.chunks import Evaluations

_NUM_PARTS = 3


class RankSync:
    """Divides the points or the data of a step over ranks, and sums losses over them.

    Every rank gets the same bits, and ranks whose trained vectors differ by as little as one bit are detected.

    Args:
        world_size: Number of ranks.
        rank: This rank.
        reduce: Sums a tensor over all ranks and returns the sum.
        parallel: What is divided: the points of a step (its `queries`, on the same batch) or the `data` of its batch.
        lockstep: Give every rank equally many points, repeating the last one if there are too few, for models whose
            forward pass communicates.
    """

    def __init__(
        self,
        world_size: int,
        rank: int,
        reduce: Callable[[Tensor], Tensor],
        parallel: Literal["queries", "data"] = "queries",
        lockstep: bool = False,
    ) -> None:
        self.world_size = world_size
        self.rank = rank
        self.parallel = parallel
        self.lockstep = lockstep
        self._reduce = reduce

    def local_points(self, num_points: int) -> list[int]:
        """Return the points that this rank evaluates."""
        if self.parallel == "data":
            return list(range(num_points))
        most = -(-num_points // self.world_size)
        points = [self.rank + turn * self.world_size for turn in range(most)]
        if self.lockstep:
            # repeated points are evaluated because the other ranks wait for it, and are left out of the sum
            return [point if point < num_points else num_points - 1 for point in points]
        return [point for point in points if point < num_points]

    def gather(self, evaluations: Evaluations, num_points: int, drift_probe: Tensor, input_ids: Tensor) -> Tensor:
        """Return the values of all points `(V, P)`, the same bits on every rank.

        Args:
            evaluations: Values of this rank's points.
            num_points: Points of the step, P.
            drift_probe: Tensor that is equal on all ranks as long as their trained values are.
            input_ids: Tokens of this rank's batch; with `parallel="queries"` they have to be equal on all ranks.

        Raises:
            ValueError: If ranks divide queries but have different batches.
            RuntimeError: If the trained values differ between ranks.
        """
        if self.world_size == 1:
            return evaluations.values_VP
        weight = float(len(input_ids)) if self.parallel == "data" else 1.0
        values_VP = evaluations.values_VP.new_zeros(len(evaluations.values_VP), num_points)
        for place, point in enumerate(evaluations.points):
            if self.parallel == "data" or point % self.world_size == self.rank:
                values_VP[:, point] = evaluations.values_VP[:, place] * weight
        checksums = torch.cat([checksum(drift_probe), checksum(input_ids)])
        vector = torch.cat([values_VP.flatten(), values_VP.new_tensor([weight]), checksums, checksums**2])
        vector = self._reduce(vector)
        values, total_weight, sums, squares = vector.split([values_VP.numel(), 1, len(checksums), len(checksums)])
        self._require_agreement(sums, squares)
        values_VP = values.view_as(values_VP)
        return values_VP / total_weight if self.parallel == "data" else values_VP

    def average_base(self, values: Tensor, known: bool, batch_size: int) -> Tensor:
        """Average values measured at the trained vector itself, the same bits on every rank.

        Args:
            values: Values of this rank, of any shape; zeros where the rank has not measured them.
            known: Whether it has: with divided queries one rank, with divided data all.
            batch_size: Examples of this rank's batch.
        """
        if self.world_size == 1:
            return values
        weight = float(known) * (batch_size if self.parallel == "data" else 1)
        vector = self._reduce(torch.cat([values.flatten() * weight, values.new_tensor([weight])]))
        return (vector[:-1] / vector[-1]).view_as(values)

    def _require_agreement(self, sums: Tensor, squares: Tensor) -> None:
        # by the Cauchy-Schwarz inequality these are equal only if all ranks agree; integers, so without rounding
        theta, batch = (self.world_size * squares == sums**2).view(2, _NUM_PARTS).all(1).tolist()
        if not theta:
            raise RuntimeError(
                "Expected equal adapter weights on every rank, but the adapters differ between ranks; something other "
                "than the training step has changed them on one rank"
            )
        if self.parallel == "queries" and not batch:
            raise ValueError(
                'Expected every rank to have the same batch with `parallel="queries"`, but the batches differ; use '
                "wandazeta's data modules, or a sampler that shards by `data_sharding` of the module"
            )


def checksum(values: Tensor) -> Tensor:
    """Return a checksum of the bits of a tensor that depends on their order.

    Args:
        values: Any tensor whose elements have 4 or 8 bytes.

    Returns:
        Three integers below 2**16 in fp64, shape `(3,)`: small enough for an exact sum of their squares over a thousand
        ranks.
    """
    bits = values.contiguous().view(torch.int64 if values.element_size() == 8 else torch.int32).flatten().long()
    # odd weights modulo 2**64: a change of any one element changes the sum
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    total = (bits * (places * -0x61C8864680B583EB)).sum()
    # the upper bits depend on all lower ones
    parts = torch.stack([total >> shift & 0xFFFF for shift in (16, 32, 48)])
    return parts.double()
