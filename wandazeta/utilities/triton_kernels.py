"""Modules of Triton kernels, loaded where their kernels run; elsewhere their callers do the same work by torch."""

import functools
import logging
from importlib import import_module
from types import ModuleType

import torch

__all__ = ["load_kernels"]

_logger = logging.getLogger(__name__)


@functools.cache
def load_kernels(module: str, device: torch.device, otherwise: str) -> ModuleType | None:
    """Return a module of Triton kernels if they run on a device, else None; a warning says why not, once.

    Args:
        module: Name of the module. Its function `try_out(device)` runs the kernels on a few values.
        device: The device.
        otherwise: What happens without the kernels, a clause for the warning.
    """
    try:
        # takes seconds, and Triton is not installed everywhere
        kernels = import_module(module)
        kernels.try_out(device)
    except Exception as error:  # of many types: a missing package, compiler or driver, or an old card
        reason = next(iter(str(error).splitlines()), "")
        _logger.warning(
            "Triton cannot be used on %s, so that %s: %s: %s", device, otherwise, type(error).__name__, reason
        )
        return None
    return kernels
