"""Choice of the attention kernel where gradients are taken."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.torch_version import TorchVersion

__all__ = ["differentiable_attention", "is_faulty"]

# the first release that prefers cuDNN's attention on Hopper; none without the fault is known
_FIRST_FAULTY = "2.11"
_TILE, _FAULTY_REST = 128, 64


def is_faulty(version: str, num_tokens: int | None = None) -> bool:
    """Whether cuDNN's attention may return NaN as gradients of the queries (pytorch issue 196678).

    It does on Hopper where the number of tokens leaves a rest of 64 when divided by 128, a mask is given and the scores
    of a row are all very low, as those of padding can be.

    Args:
        version: Version of torch.
        num_tokens: Tokens of a sequence; None if they are not known.
    """
    return TorchVersion(version) >= _FIRST_FAULTY and (num_tokens is None or num_tokens % _TILE == _FAULTY_REST)


@contextmanager
def differentiable_attention(device: torch.device, num_tokens: int | None = None) -> Iterator[None]:
    """Context of a forward pass that gradients may be taken through: another kernel runs where cuDNN's is faulty.

    The forward pass chooses the kernel of the backward pass, so only it has to run inside. Without gradients, nothing
    changes.

    Args:
        device: Device of the model.
        num_tokens: Tokens of a sequence; None if they are not known.
    """
    is_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    avoids = device.type == "cuda" and torch.is_grad_enabled() and is_faulty(torch.__version__, num_tokens)
    torch.backends.cuda.enable_cudnn_sdp(is_enabled and not avoids)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(is_enabled)
