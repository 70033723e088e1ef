"""Run a 2:4 pruned model on the sparse kernels of an NVIDIA GPU."""

from collections import Counter

import torch
from torch import Tensor, nn

__all__ = ["to_semi_structured"]

# multiples that both backends of torch, cuSPARSELt and CUTLASS, support for 16-bit weights
_ROWS, _COLUMNS = 32, 64
# NVIDIA Ampere
_FIRST_CAPABILITY = (8, 0)


def to_semi_structured(model: nn.Module) -> list[str]:
    """Convert the 2:4 pruned Linears of a model to torch's semi-structured sparse tensors, in place.

    The weights become `torch.sparse.SparseSemiStructuredTensor`s of about half the size, for inference only: they can
    be neither trained nor saved. Whether they are faster depends on shapes and batch size; measure. Linears that do
    not qualify are left dense, and so are the `Conv1D` layers of GPT-2.

    Args:
        model: A model on a GPU with 16-bit weights.

    Returns:
        Dotted names of the converted layers.

    Raises:
        ValueError: If no layer qualifies; the message counts the reasons.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    obstacles = {name: _obstacle(linear.weight.detach()) for name, linear in linears.items()}
    chosen = [name for name, obstacle in obstacles.items() if obstacle is None]
    if not chosen:
        reasons = Counter(filter(None, obstacles.values())).most_common()
        raise ValueError(
            "Expected argument `model` to hold Linear layers that sparse kernels support, but got none: "
            f"{'; '.join(f'{count} {reason}' for reason, count in reasons) or 'there are no Linear layers'}. "
            "Prune with sparsity_pattern='2:4', cast the model to bfloat16 or float16 and move it to an NVIDIA GPU "
            "(Ampere or newer); on other hardware zeros make nothing faster."
        )
    for name in chosen:
        sparse = torch.sparse.to_sparse_semi_structured(linears[name].weight.detach().contiguous())
        linears[name].weight = nn.Parameter(sparse, requires_grad=False)
    return chosen


def _obstacle(weight: Tensor) -> str | None:
    """Why sparse kernels do not support a weight of shape (out, in), or None if they do."""
    if weight.shape[1] % 4 or bool(((weight.reshape(-1, 4) != 0).sum(1) > 2).any()):
        return "not 2:4"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"in {str(weight.dtype).removeprefix('torch.')}, not in 16-bit precision"
    if weight.shape[0] % _ROWS or weight.shape[1] % _COLUMNS:
        return f"of a shape that is not a multiple of {_ROWS} by {_COLUMNS}"
    return _device_obstacle(weight.device)


def _device_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"on the {device.type.upper()}, which has no such kernels"
    if torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        return "on a GPU older than NVIDIA Ampere, which has no such kernels"
    return None
