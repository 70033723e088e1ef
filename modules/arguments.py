"""Checks of what a user passes."""

from typing import Any


def check_range(name: str, value: Any, fits: bool, what: str) -> None:
    """Raise a ValueError that names the argument unless its value fits."""
    if not fits:
        raise ValueError(f"Expected argument `{name}` to be {what}, but got {value!r}")


def top_blocks(adapter_layers: str) -> int | None:
    """Return how many top blocks `last:N` names, none for `all`."""
    if adapter_layers == "all":
        return None
    start, _, number = adapter_layers.partition(":")
    if start != "last" or not number.isdigit() or int(number) < 1:
        raise ValueError(f"Expected argument `adapter_layers` to be 'all' or like 'last:2', but got {adapter_layers!r}")
    return int(number)
