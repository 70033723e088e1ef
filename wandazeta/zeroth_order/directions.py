"""Random directions that can be drawn again at any time from (seed, step, query)."""

from collections.abc import Callable
from hashlib import blake2b
from struct import pack
from typing import Protocol

import torch
from torch import Tensor

Directions = Callable[[int], Tensor]
"""The directions of one step: maps a query to its `(d,)`, in the type and on the device of the trained vector."""

MAX_QUERIES = 1 << 10
"""Queries a step may have; with it, 2**22 steps pass before a direction comes round again."""


class Direction(Protocol):
    """Draws the direction of one query: the same arguments give the same bits, on every rank and device."""

    def __call__(self, seed: int, step: int, query: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
        """Direction of shape `(numel,)` in fp32."""


def direction(seed: int, step: int, query: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw the Gaussian direction of one query.

    Drawn by a CPU generator of its own, so the bits do not depend on the device and the global RNG is neither read nor
    moved. The CPU generator uses only the low 32 bits of a seed, and hashes of 32 bits would collide after some ten
    thousand directions: so (step, query) is mapped by a permutation of the 32-bit integers that `seed` chooses, and no
    two directions of the first 2**22 steps are the same.

    Args:
        seed: Base seed of the run.
        step: Global step, from 0.
        query: Index of the query within the step, from 0, over all ranks.
        numel: Length of the direction.
        device: Where to put it.

    Returns:
        A vector of `numel` standard normal values in fp32.

    Raises:
        ValueError: If `query` is not below 1024 or `step` is negative.
    """
    generator = torch.Generator().manual_seed(stream(seed, step, query))
    return torch.randn(numel, generator=generator).to(device)


def rademacher(seed: int, step: int, query: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw the direction of one query with entries of -1 and 1 (as FZOO does, arXiv 2506.09034).

    Its length is the square root of `numel` exactly, where a Gaussian direction's varies. Arguments and errors are
    those of `direction`; what comes back are `numel` signs in fp32.
    """
    generator = torch.Generator().manual_seed(stream(seed, step, query))
    return torch.randint(2, (numel,), generator=generator, dtype=torch.float32).mul_(2).sub_(1).to(device)


DISTRIBUTIONS: dict[str, Direction] = {"gaussian": direction, "rademacher": rademacher}


def directions_of_step(theta: Tensor, seed: int, step: int, draw: Direction = direction) -> Directions:
    """Return what draws the directions of one step, again at every call.

    Args:
        theta: The trained vector, shape `(d,)`.
        seed: Base seed of the run.
        step: Global step, from 0.
        draw: Their distribution.
    """

    def of_query(query: int) -> Tensor:
        return draw(seed, step, query, theta.numel(), theta.device).to(theta.dtype)

    return of_query


def stream(seed: int, step: int, query: int) -> int:
    """32-bit seed of one (step, query): unique for `step < 2**22`."""
    if not 0 <= query < MAX_QUERIES:
        raise ValueError(f"Expected argument `query` to be in [0, {MAX_QUERIES}), but got {query}.")
    if step < 0:
        raise ValueError(f"Expected argument `step` to be at least 0, but got {step}.")
    key = int.from_bytes(blake2b(pack("<q", seed), digest_size=8).digest(), "little")
    before, after = key & 0xFFFFFFFF, key >> 32
    # the finaliser of MurmurHash3, every step of which is invertible
    value = (step * MAX_QUERIES + query & 0xFFFFFFFF) ^ before
    value = (value ^ value >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    value = (value ^ value >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ value >> 16 ^ after
