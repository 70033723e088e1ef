"""Check the length of a data module's texts against the positions that the trained model has learned."""

from typing import Any

from wandazeta.models.positions import max_positions
from wandazeta.protocols import HasMaxPositions


def fitting_length(trainer: Any, argument: str, length: int | None, spare: int = 0) -> int | None:
    """Return the largest number of tokens that a text may have.

    Args:
        trainer: The trainer with the module, or None.
        argument: Name of the data module's argument that limits the length.
        length: Its value, or None for no limit of its own.
        spare: Tokens that the model runs in addition to those of the text.

    Returns:
        The length, or by default as many tokens as the model has positions for; None if nothing limits them.

    Raises:
        ValueError: If the length is larger than the number of learned positions.
    """
    module = getattr(trainer, "lightning_module", None)
    if module is None:
        return length
    limit = module.max_positions if isinstance(module, HasMaxPositions) else _limit_of(module)
    if limit is None:
        return length
    if length is not None and length + spare > limit:
        more = f" and {spare} more for the longest of `options`" if spare else ""
        raise ValueError(
            f"Expected argument `{argument}` to be at most {limit - spare}, because {type(module).__name__} has a "
            f"model with {limit} learned positions, but got {length}{more}"
        )
    return limit - spare if length is None else length


def _limit_of(module: Any) -> int | None:
    return max_positions(module) if hasattr(module, "named_modules") else None
