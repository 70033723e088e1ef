"""Temporarily switch modules to evaluation mode, and parameters to no gradients."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluation_mode", "frozen"]


@contextmanager
def evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode; each returns to its own mode at the end of the context.

    The `training` flag is written directly: `nn.Module.train()` walks the module tree, which takes a millisecond in
    every training step.

    Args:
        modules: A flat list, such as `model.modules()`; children are not visited.
    """
    training = [module for module in modules if module.training]
    for module in training:
        module.__dict__["training"] = False
    try:
        yield
    finally:
        for module in training:
            module.__dict__["training"] = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off `requires_grad` of every parameter; those that required gradients do again after the context.

    Args:
        model: The model.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
