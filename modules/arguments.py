"""Checks of what a user passes, and what becomes of it."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def check_range(name: str, value: Any, fits: bool, what: str) -> None:
    """Raise a ValueError that names the argument unless its value fits."""
    if not fits:
        raise ValueError(f"Expected argument `{name}` to be {what}, but got {value!r}")


def top_blocks(layers: str) -> int | None:
    """Return how many top blocks `last:N` names, none for `all`."""
    if layers == "all":
        return None
    start, _, number = layers.partition(":")
    if start != "last" or not number.isdigit() or int(number) < 1:
        raise ValueError(f"Expected argument `layers` to be 'all' or like 'last:2', but got {layers!r}")
    return int(number)


def stepped(optimizer: Optimizer, lr_scheduler: Callable[[Optimizer], LRScheduler] | None) -> Any:
    """Make what `configure_optimizers` returns for a scheduler that is stepped after every training step.

    Raises:
        ValueError: If the scheduler follows a metric.
    """
    if lr_scheduler is None:
        return optimizer
    scheduler = lr_scheduler(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("Expected argument `lr_scheduler` to follow the steps, but got ReduceLROnPlateau")
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
