"""Linears of a 2:4 pruned model on the sparse kernels of a GPU that has them."""

from collections import Counter

import torch
from torch import Tensor, nn

# multiples that both of torch's backends take, cuSPARSELt and CUTLASS, in 16 bit
_ROWS, _COLUMNS = 32, 64
_FIRST_CAPABILITY = (8, 0)


def to_semi_structured(model: nn.Module) -> list[str]:
    """Hands the 2:4 Linears of a model to torch's semi-structured sparse kernels.

    The weights become `torch.sparse.SparseSemiStructuredTensor`s, in place, about half as large and for inference
    only: they can be neither trained nor saved. Whether it is faster depends on shapes and batch; measure. Linears that
    do not fit stay as they are. `Conv1D` (GPT-2) is no Linear and stays, too.

    Args:
        model: Any model, on a GPU and in 16 bit.

    Returns:
        Dotted names of the layers that were changed.

    Raises:
        ValueError: If no layer can gain; the message counts why.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    obstacles = {name: _obstacle(linear.weight.detach()) for name, linear in linears.items()}
    chosen = [name for name, obstacle in obstacles.items() if obstacle is None]
    if not chosen:
        reasons = Counter(filter(None, obstacles.values())).most_common()
        raise ValueError(
            "Expected argument `model` to hold Linear layers that sparse kernels can run, but got none: "
            f"{'; '.join(f'{count} {reason}' for reason, count in reasons) or 'there are no Linear layers'}. "
            "Prune with sparsity_pattern='2:4', cast to bfloat16 or float16 and move the model to an NVIDIA GPU from "
            "Ampere on; elsewhere the zeros make nothing faster."
        )
    for name in chosen:
        sparse = torch.sparse.to_sparse_semi_structured(linears[name].weight.detach().contiguous())
        linears[name].weight = nn.Parameter(sparse, requires_grad=False)
    return chosen


def _obstacle(weight: Tensor) -> str | None:
    """Why sparse kernels cannot run a weight of shape (out, in), or None."""
    if weight.shape[1] % 4 or bool(((weight.reshape(-1, 4) != 0).sum(1) > 2).any()):
        return "not 2:4"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"in {str(weight.dtype).removeprefix('torch.')}, not in 16 bit"
    if weight.shape[0] % _ROWS or weight.shape[1] % _COLUMNS:
        return f"of a shape that is no multiple of {_ROWS} by {_COLUMNS}"
    return _device_obstacle(weight.device)


def _device_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"on the {device.type.upper()}, which has no such kernels"
    if torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        return "on a GPU older than NVIDIA Ampere, which has no such kernels"
    return None
