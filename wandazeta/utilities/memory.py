"""How much memory has been used at most."""

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a CUDA device, or resident in this process for any other."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
