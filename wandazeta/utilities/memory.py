"""Peak memory."""

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on a CUDA device, else the resident set of this process.

    Args:
        device: The device that the model is on.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
