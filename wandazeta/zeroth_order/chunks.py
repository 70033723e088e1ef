"""Evaluate the points of a step in chunks that fit into memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evaluations:
    """Values of points of a step, from forward passes.

    Args:
        values_VP: V numbers of each of the P points, fp64; the estimator defines their meaning.
        points: The points, in the order of the columns.
        chunk_size: Points per forward that fitted into memory.
    """

    values_VP: Tensor
    points: tuple[int, ...]
    chunk_size: int


def in_chunks(
    evaluate: Callable[[Sequence[int]], Tensor],
    points: Sequence[int],
    chunk_size: int,
    num_values: int,
    device: torch.device,
) -> Evaluations:
    """Evaluate points chunk by chunk.

    If a chunk does not fit into memory, the chunk size is halved for this chunk and all later ones of the step.

    Args:
        evaluate: Maps up to `chunk_size` points to their values, `num_values` rows with a column for each point.
        points: Points to evaluate; a rank may have none.
        chunk_size: Points per call.
        num_values: Rows of the result, V.
        device: Device of the result.

    Raises:
        ValueError: If `chunk_size` is below 1.
        RuntimeError: If a single point does not fit into memory.
    """
    if chunk_size < 1:
        raise ValueError(f"Expected argument `chunk_size` to be an integer of at least 1, but got {chunk_size}.")
    points = tuple(points)
    values = [torch.empty(num_values, 0, dtype=torch.float64, device=device)]
    done = 0
    while done < len(points):
        chunk = points[done : done + chunk_size]
        result = _try(evaluate, chunk, may_fail=chunk_size > 1)
        if result is None:
            # outside the handler, whose traceback would keep the failed forward's activations alive
            chunk_size = max(1, min(chunk_size, len(chunk)) // 2)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        values.append(result.double().reshape(num_values, len(chunk)))
        done += len(chunk)
    return Evaluations(torch.cat(values, 1), points, chunk_size)


def _try(evaluate: Callable[[Sequence[int]], Tensor], chunk: Sequence[int], may_fail: bool) -> Tensor | None:
    """Evaluate a chunk; return None if it does not fit into memory and `may_fail` is set."""
    try:
        return evaluate(chunk)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        if not may_fail:
            error.add_note("One copy at a time does not fit into memory: lower the batch size or sequence length.")
            raise
        return None


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
