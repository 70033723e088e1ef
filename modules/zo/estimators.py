"""Gradient estimates from loss values alone.

Legend: P perturbed copies in one forward, d length of the trained vector, Q queries of the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from .directions import Direction, direction


@dataclass(frozen=True)
class QueryLosses:
    """Losses of one step at both sides of every query.

    Args:
        plus: Losses at `theta + epsilon z_q`, shape `(Q,)`, fp64.
        minus: Losses at `theta - epsilon z_q`, shape `(Q,)`, fp64.
        query_ids: The query of every entry.
        chunk_size: Queries per forward that fitted into memory.
    """

    plus: Tensor
    minus: Tensor
    query_ids: tuple[int, ...]
    chunk_size: int

    @property
    def mean(self) -> float:
        """Mean over the finite queries: an estimate of the loss at `theta` itself (`nan` without any)."""
        both = torch.stack([self.plus, self.minus])
        finite = both.isfinite().all(0)
        return float(both[:, finite].mean())


@dataclass(frozen=True)
class ProjectedGradients:
    """Slopes of the loss along the directions of the queries that stayed finite.

    Args:
        query_ids: Queries that count.
        values: Their projected gradients, as Python floats so that every rank computes with the same bits.
        num_dropped: Queries dropped because a loss was not finite.
    """

    query_ids: tuple[int, ...]
    values: tuple[float, ...]
    num_dropped: int

    @property
    def std(self) -> float:
        """Standard deviation over the queries (0 for fewer than two)."""
        return float(torch.tensor(self.values, dtype=torch.float64).std()) if len(self.values) > 1 else 0.0


@torch.no_grad()
def two_sided(
    loss_fn: Callable[[Tensor], Tensor],
    theta: Tensor,
    seed: int,
    step: int,
    query_ids: Sequence[int],
    epsilon: float,
    chunk_size: int,
    draw: Direction = direction,
) -> QueryLosses:
    """Evaluate the loss on both sides of every query (two-sided SPSA, arXiv 2406.18060).

    `theta` is never changed: perturbed copies go to `loss_fn`, the plus sides of a chunk first, then its minus sides.
    When a chunk does not fit into memory its size is halved, for the rest of the step too.

    Args:
        loss_fn: Maps copies of shape `(P, d)` to their losses, shape `(P,)`; P is at most `2 * chunk_size`.
        theta: The trained vector, shape `(d,)`.
        seed: Base seed of the run.
        step: Global step.
        query_ids: Queries to evaluate; a rank may have none.
        epsilon: Distance of the two sides from `theta` in units of the direction.
        chunk_size: Queries per call of `loss_fn`.
        draw: Distribution of the directions.

    Returns:
        The losses and the chunk size that worked.
    """
    if epsilon <= 0:
        raise ValueError(f"Expected argument `epsilon` to be above 0, but got {epsilon}.")
    if chunk_size < 1:
        raise ValueError(f"Expected argument `chunk_size` to be an integer of at least 1, but got {chunk_size}.")
    queries = tuple(query_ids)
    losses: list[Tensor] = []
    done = 0
    while done < len(queries):
        chunk = queries[done : done + chunk_size]
        result = _try(loss_fn, perturbed(theta, seed, step, chunk, epsilon, draw), may_fail=chunk_size > 1)
        if result is None:
            # outside the handler, whose traceback would keep the failed forward's activations alive
            chunk_size = max(1, min(chunk_size, len(chunk)) // 2)
            if theta.is_cuda:
                torch.cuda.empty_cache()
            continue
        losses.append(result.double().reshape(2, len(chunk)))
        done += len(chunk)
    plus, minus = torch.cat(losses, 1) if losses else torch.empty(2, 0, dtype=torch.float64, device=theta.device)
    return QueryLosses(plus, minus, queries, chunk_size)


def perturbed(
    theta: Tensor, seed: int, step: int, query_ids: Sequence[int], epsilon: float, draw: Direction = direction
) -> Tensor:
    """Copies `theta ± epsilon z_q` of shape `(2 · queries, d)`: all plus sides, then all minus sides."""
    copies = theta.new_empty(2, len(query_ids), theta.numel())
    for row, query in enumerate(query_ids):
        z = draw(seed, step, query, theta.numel(), theta.device).to(theta.dtype)
        torch.add(theta, z, alpha=epsilon, out=copies[0, row])
        torch.add(theta, z, alpha=-epsilon, out=copies[1, row])
    return copies.flatten(0, 1)


def projected_gradients(losses: QueryLosses, epsilon: float) -> ProjectedGradients:
    """Slopes `(plus - minus) / (2 epsilon)`; a query with a loss that is not finite is dropped and counted."""
    slopes = ((losses.plus - losses.minus) / (2 * epsilon)).tolist()
    kept = [(query, slope) for query, slope in zip(losses.query_ids, slopes, strict=True) if isfinite(slope)]
    return ProjectedGradients(
        tuple(query for query, _ in kept), tuple(slope for _, slope in kept), len(slopes) - len(kept)
    )


def _try(loss_fn: Callable[[Tensor], Tensor], copies: Tensor, may_fail: bool) -> Tensor | None:
    try:
        return loss_fn(copies)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        if not may_fail:
            error.add_note("One query at a time does not fit into memory: lower the batch size or sequence length.")
            raise
        return None


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
