"""Counts what processes exchange through `torch.distributed`."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor


class CountBytes:
    """Counts the bytes of tensors that this process gives to collectives, while `counting` is set.

    The reducer of DDP is not seen; what it adds to a step without gradients is that of the anchor, one value.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.counting = False
        for name in ("all_reduce", "broadcast"):
            self._wrap(name, lambda tensor: [tensor])
        self._wrap("_broadcast_coalesced", lambda group, tensors: tensors)

    def _wrap(self, name: str, tensors_of: Callable[..., list[Tensor]]) -> None:
        original = getattr(dist, name)
        take = tensors_of.__code__.co_argcount

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.counting:
                self.bytes += sum(t.numel() * t.element_size() for t in tensors_of(*args[:take]))
            return original(*args, **kwargs)

        setattr(dist, name, counted)
