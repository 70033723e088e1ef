"""Checks of what a user passes, and what becomes of it."""

import inspect
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


def describe_rates(optimizer: Optimizer, lr_scheduler: Callable[[Optimizer], LRScheduler] | None) -> dict[str, Any]:
    """Say what a checkpoint brings back of the learning rate, in plain values: what is given then has no effect.

    Args:
        optimizer: A new one with the groups that are trained.
        lr_scheduler: As for `stepped`.
    """
    learning_rate = optimizer.param_groups[0]["lr"]
    if lr_scheduler is None:
        return {"learning_rate": learning_rate, "lr_scheduler": None}
    scheduler = lr_scheduler(optimizer)
    state = scheduler.state_dict()
    names = [name for name in inspect.signature(type(scheduler)).parameters if name in state and name != "last_epoch"]
    arguments = ", ".join(f"{name}={state[name]}" for name in names)
    return {"learning_rate": learning_rate, "lr_scheduler": f"{type(scheduler).__name__}({arguments})"}
