"""Checks of arguments, and the learning rate schedules that are made from them."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def check_range(name: str, value: Any, fits: bool, what: str) -> None:
    """Raise an error that names the argument unless its value fits.

    Args:
        name: Name of the argument.
        value: Its value.
        fits: Whether the value is allowed.
        what: What the argument has to be, to follow "Expected argument `name` to be".

    Raises:
        ValueError: If the value does not fit.

    Examples:
        >>> check_range("rank", 0, False, "at least 1")
        Traceback (most recent call last):
        ValueError: Expected argument `rank` to be at least 1, but got 0
    """
    if not fits:
        raise ValueError(f"Expected argument `{name}` to be {what}, but got {value!r}")


def check_positive(**arguments: int | None) -> None:
    """Raise an error unless every given argument is an integer larger than 0; None means not given.

    Args:
        **arguments: Values by the arguments' names.

    Raises:
        ValueError: If one is no integer or smaller than 1.
    """
    for name, value in arguments.items():
        if value is not None:
            check_at_least(name, value, 1)


def check_at_least(name: str, value: int, smallest: int) -> None:
    """Raise an error unless an argument is an integer that is not smaller than a bound.

    Args:
        name: Name of the argument.
        value: Its value.
        smallest: The smallest value that is allowed.

    Raises:
        ValueError: If it is no integer or smaller.
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    what = "an integer larger than 0" if smallest == 1 else f"an integer of at least {smallest}"
    check_range(name, value, is_integer and value >= smallest, what)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise an error unless an argument is one of the known choices.

    Args:
        name: Name of the argument.
        value: Its value.
        choices: The known choices.

    Raises:
        ValueError: If the value is not among them.
    """
    choices = list(choices)
    check_range(name, value, value in choices, f"one of {', '.join(choices)}")


def closest_names(name: str, candidates: Iterable[str]) -> str:
    """Suggest known names for an unknown one, as the last part of an error message.

    Args:
        name: The unknown name.
        candidates: The known names.

    Returns:
        A question with the most similar candidates, or with the first eight if none is similar.

    Examples:
        >>> closest_names("mlp.up", ["mlp.up_proj", "attn.q_proj"])
        'did you mean `mlp.up_proj`?'
    """
    candidates = list(candidates)
    close = difflib.get_close_matches(name, candidates, n=3, cutoff=0.4) or candidates[:8]
    return f"did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else "there is none"


def top_blocks(layers: str) -> int | None:
    """Parse the argument `layers` of adapters: N for `last:N`, the top N blocks, or None for `all`.

    Raises:
        ValueError: If it is neither.
    """
    if layers == "all":
        return None
    start, _, number = layers.partition(":")
    if start != "last" or not number.isdigit() or int(number) < 1:
        raise ValueError(f"Expected argument `layers` to be 'all' or like 'last:2', but got {layers!r}")
    return int(number)


def stepped(optimizer: Optimizer, lr_scheduler: Callable[[Optimizer], LRScheduler] | None) -> Any:
    """Combine an optimizer and a scheduler that is stepped after every training step, for `configure_optimizers`.

    Args:
        optimizer: The optimizer.
        lr_scheduler: Makes the scheduler from the optimizer; None keeps the learning rate constant.

    Returns:
        What Lightning expects from `configure_optimizers`.

    Raises:
        ValueError: If the scheduler follows a metric, as ReduceLROnPlateau does.
    """
    if lr_scheduler is None:
        return optimizer
    scheduler = lr_scheduler(optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("Expected argument `lr_scheduler` to follow the steps, but got ReduceLROnPlateau")
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def describe_rates(optimizer: Optimizer, lr_scheduler: Callable[[Optimizer], LRScheduler] | None) -> dict[str, Any]:
    """Describe the learning rate and its schedule in plain values, to compare a checkpoint with the arguments.

    A checkpoint restores both, so arguments that differ would have no effect.

    Args:
        optimizer: A new optimizer with the trained groups.
        lr_scheduler: Makes the scheduler from the optimizer, or None.
    """
    learning_rate = optimizer.param_groups[0]["lr"]
    if lr_scheduler is None:
        return {"learning_rate": learning_rate, "lr_scheduler": None}
    scheduler = lr_scheduler(optimizer)
    state = scheduler.state_dict()
    names = [name for name in inspect.signature(type(scheduler)).parameters if name in state and name != "last_epoch"]
    arguments = ", ".join(f"{name}={state[name]}" for name in names)
    return {"learning_rate": learning_rate, "lr_scheduler": f"{type(scheduler).__name__}({arguments})"}


def existing_device(device: str | torch.device) -> torch.device:
    """Return a device with its index, if this machine has it.

    Args:
        device: Name of the device, such as `cpu` or `cuda:0`.

    Raises:
        ValueError: If this machine has no such device.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises an AssertionError
        raise ValueError(
            f"Expected argument `device` to be one of this machine, but got {str(device)!r} "
            f"({str(error).splitlines()[0]})."
        ) from error
