"""Random directions that are drawn again from (seed, step, query) whenever they are needed, and never stored."""

from collections.abc import Callable
from hashlib import blake2b
from struct import pack
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "DISTRIBUTIONS",
    "MAX_QUERIES",
    "Direction",
    "Directions",
    "direction",
    "directions_of_step",
    "drawn_by",
    "rademacher",
    "stream",
]

Directions = Callable[[int], Tensor]
"""The directions of one step: maps a query to its direction `(d,)`, with the dtype and device of the trained vector."""

MAX_QUERIES = 1 << 10
"""Upper bound of the queries of a step. With it, no direction repeats within 2**22 steps."""


class Direction(Protocol):
    """Draws the direction of one query: the same arguments give the same bits, on every rank with the same device."""

    def __call__(self, seed: int, step: int, query: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
        """Return a direction of shape `(numel,)` in fp32."""


def direction(seed: int, step: int, query: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw the Gaussian direction of one query.

    A generator of its own draws it, so the global RNG is neither read nor advanced; nor do the bits depend on the
    default dtype and device of torch, which Lightning sets around a step in half precision. For a GPU of CUDA it is a
    generator on this GPU, where no copy waits for the host; its bits are those of one model of GPU, because torch
    divides a long vector by the number of multiprocessors. For all other devices it is one on the CPU, whose bits
    depend on nothing else. The CPU generator uses only the low 32 bits of a seed, and 32-bit hashes would collide after
    some ten thousand directions. So (step, query) is mapped by a permutation of the 32-bit integers that depends on
    `seed`, and all directions of the first 2**22 steps are different.

    Args:
        seed: Base seed of the run.
        step: Global step, from 0.
        query: Index of the query within the step, from 0, over all ranks.
        numel: Length of the direction.
        device: Device of the result.

    Returns:
        A vector of `numel` standard normal values in fp32.

    Raises:
        ValueError: If `query` is not below 1024 or `step` is negative.
    """
    generator = _generator(seed, step, query, device)
    return torch.randn(numel, generator=generator, dtype=torch.float32, device=generator.device).to(device)


def rademacher(seed: int, step: int, query: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw the direction of one query with entries of -1 and 1 (as FZOO does, arXiv 2506.09034).

    Its length is exactly the square root of `numel`; that of a Gaussian direction varies. Arguments and errors are
    those of `direction`; the result holds `numel` signs in fp32.
    """
    generator = _generator(seed, step, query, device)
    signs = torch.randint(2, (numel,), generator=generator, dtype=torch.float32, device=generator.device)
    return signs.mul_(2).sub_(1).to(device)


DISTRIBUTIONS: dict[str, Direction] = {"gaussian": direction, "rademacher": rademacher}


def directions_of_step(theta: Tensor, seed: int, step: int, draw: Direction = direction) -> Directions:
    """Return a function that draws the directions of one step, anew at every call.

    Args:
        theta: The trained vector, shape `(d,)`.
        seed: Base seed of the run.
        step: Global step, from 0.
        draw: Distribution of the directions.
    """

    def of_query(query: int) -> Tensor:
        return draw(seed, step, query, theta.numel(), theta.device).to(theta.dtype)

    return of_query


def drawn_by(device: torch.device | str) -> str:
    """Return the name of what draws the directions of vectors on a device: `cpu`, or the model of the GPU."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _generator(seed: int, step: int, query: int, device: torch.device | str) -> torch.Generator:
    """Return the generator of one query's direction."""
    device = torch.device(device)
    generator = torch.Generator(device if device.type == "cuda" else "cpu")
    return generator.manual_seed(stream(seed, step, query))


def stream(seed: int, step: int, query: int) -> int:
    """Return a 32-bit seed for one (step, query), unique for `step < 2**22`.

    Raises:
        ValueError: If `query` is not below 1024 or `step` is negative.
    """
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
