"""What ranks tell each other in a step: the losses of its queries, and whether they still agree."""

from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from .zo import QueryLosses


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
    """Shares out the queries or the data of a step and sums one short vector over the ranks.

    Args:
        trainer: Trainer that knows the ranks.
        parallel: What is shared out, the `queries` of a step or its `data`.
        lockstep: Let every rank run equally many queries, repeating one where there are too few.
    """

    def __init__(self, trainer: Any, parallel: Literal["queries", "data"], lockstep: bool = False) -> None:
        self.strategy = trainer.strategy
        self.world_size: int = trainer.world_size
        self.rank: int = trainer.global_rank
        self.parallel = parallel
        self.lockstep = lockstep

    def share(self, num_queries: int) -> list[int]:
        """Return the queries that this rank evaluates."""
        if self.parallel == "data":
            return list(range(num_queries))
        most = -(-num_queries // self.world_size)
        queries = [self.rank + turn * self.world_size for turn in range(most)]
        if self.lockstep:
            # past the end: run for the others' sake, and left out of the sum
            return [query if query < num_queries else num_queries - 1 for query in queries]
        return [query for query in queries if query < num_queries]

    def gather(self, losses: QueryLosses, num_queries: int, theta: Tensor, input_ids: Tensor) -> QueryLosses:
        """Return the losses of all queries, the same bits on every rank.

        Args:
            losses: This rank's.
            num_queries: Queries of the step, Q.
            theta: The trained vector, to notice ranks that drifted apart.
            input_ids: The batch, to notice ranks that see another one where they must not.

        Raises:
            ValueError: If ranks share queries but not the batch.
            RuntimeError: If the trained vector differs between ranks.
        """
        if self.world_size == 1:
            return losses
        vector = torch.zeros(2 * num_queries + 5, dtype=torch.float64, device=theta.device)
        both = vector[: 2 * num_queries].view(2, num_queries)
        weight = float(len(input_ids)) if self.parallel == "data" else 1.0
        for place, query in enumerate(losses.query_ids):
            if self.parallel == "data" or query % self.world_size == self.rank:
                both[0, query] = losses.plus[place] * weight
                both[1, query] = losses.minus[place] * weight
        seen = torch.arange(1, input_ids.numel() + 1, device=input_ids.device, dtype=torch.float64)
        marks = torch.stack([theta.double().sum(), (input_ids.flatten() * seen).sum()])
        vector[-5] = weight
        vector[-4:-2], vector[-2:] = marks, marks**2
        vector = self.strategy.reduce(vector, reduce_op="sum")
        self._require_agreement(vector)
        both = vector[: 2 * num_queries].view(2, num_queries)
        if self.parallel == "data":
            both = both / vector[-5]
        return QueryLosses(both[0], both[1], tuple(range(num_queries)), losses.chunk_size)

    def _require_agreement(self, vector: Tensor) -> None:
        # by Cauchy-Schwarz the mean of squares equals the square of the mean only where all ranks agree
        theta_sum, batch_sum, theta_squares, batch_squares = (vector[-4:] / self.world_size).tolist()
        if abs(theta_squares - theta_sum**2) > 1e-12 * abs(theta_squares):
            raise RuntimeError(
                "The adapters differ between ranks: a rank's memory was changed behind the others' backs"
            )
        if self.parallel == "queries" and abs(batch_squares - batch_sum**2) > 1e-12 * abs(batch_squares):
            raise ValueError(
                'Expected every rank to see the same batch with `parallel="queries"`, but the batches differ; use '
                "wandazeta's data modules, or a sampler that shards by `data_sharding` of the module"
            )
