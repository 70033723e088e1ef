"""Factorise a width for a tensor train."""

from functools import lru_cache


def factorise(width: int, num_factors: int = 3) -> list[int]:
    """Split a width into at most `num_factors` integers that are as equal as its divisors allow.

    The product is exactly `width`. Among all splits the one with the smallest sum is taken (the fewest core values),
    then the one with the smallest largest factor. Factors of one are left out, so a prime width has one factor.

    Args:
        width: Number of features, at least 1.
        num_factors: Largest number of factors.

    Returns:
        The factors in ascending order.

    Raises:
        ValueError: If `width` or `num_factors` is below 1.

    Examples:
        >>> factorise(4096), factorise(64), factorise(1024), factorise(64, 2), factorise(576), factorise(17)
        ([16, 16, 16], [4, 4, 4], [8, 8, 16], [8, 8], [8, 8, 9], [17])
    """
    if width < 1:
        raise ValueError(f"Expected argument `width` to be an integer of at least 1, but got {width}.")
    if num_factors < 1:
        raise ValueError(f"Expected argument `num_factors` to be an integer of at least 1, but got {num_factors}.")
    best = min(_splits(width, num_factors, 2), key=lambda factors: (sum(factors), max(factors)), default=(width,))
    return list(best)


@lru_cache(maxsize=4096)
def _splits(width: int, num_factors: int, smallest: int) -> tuple[tuple[int, ...], ...]:
    """Return all ascending splits into 1 to `num_factors` factors of at least `smallest`."""
    found: list[tuple[int, ...]] = [(width,)] if width >= smallest else []
    if num_factors > 1:
        # factors ascend, so the first of several is at most the square root of their product
        divisors = (d for d in range(smallest, int(width**0.5) + 1) if width % d == 0)
        found += [(d, *rest) for d in divisors for rest in _splits(width // d, num_factors - 1, d)]
    return tuple(found)
