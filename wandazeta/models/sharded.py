"""Models whose parameters FSDP2 shards over the ranks as DTensors: shard them, and read shards and whole weights.

Parameters that DeepSpeed ZeRO stage 3 shards are in `wandazeta.models.zero3`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from wandazeta.models.blocks import block_lists
from wandazeta.models.zero3 import is_zero3_sharded

__all__ = [
    "average_gradients",
    "has_plain_shards",
    "is_shard",
    "is_sharded",
    "local_shard",
    "shard_like",
    "shard_model",
    "sum_over_shards",
    "unshard_like",
    "whole",
]


def shard_model(
    model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None, heads: Iterable[nn.Module] = ()
) -> None:
    """Shard the parameters of a model by FSDP2: every block is gathered by itself, and the rest with the model.

    The model is whole on every rank before. Its parameters are moved to the device of the mesh one block at a time.

    Args:
        model: The model, changed in place; a model that is sharded already is not changed.
        mesh: The ranks, in one dimension.
        compute_dtype: Precision that weights are gathered in, for mixed precision; gradients are reduced in float32.
            By default both have the precision of the weights.
        heads: Modules of the model that are gathered by themselves and keep their precision.

    Raises:
        ValueError: If trained weights that are gathered together differ in precision.
    """
    if isinstance(model, FSDPModule):
        return
    reduce_dtype = None if compute_dtype is None else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype)
    blocks = [block for blocks in block_lists(model).values() for block in blocks]
    for module in (*heads, *blocks, model):
        # a block may be in the list several times
        if not isinstance(module, FSDPModule):
            _check_precision(module)
            own = MixedPrecisionPolicy() if module in heads else policy
            # the root, too, is gathered again in the backward pass: outside of a forward pass all weights are shards
            fully_shard(module, mesh=mesh, mp_policy=own, reshard_after_forward=True)


def _check_precision(module: nn.Module) -> None:
    """Refuse trained weights of several precisions, whose gradients FSDP2 cannot reduce together."""
    dtypes = {p.dtype for p in module.parameters() if p.requires_grad and not is_shard(p)}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"Expected trained weights of one precision for FSDP2, but {type(module).__name__} has {names}; set "
            "`loading.dtype: float32`, and `precision: bf16-mixed` for speed"
        )


def average_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Average the gradients of whole parameters over the ranks in every backward pass from now on.

    Args:
        parameters: Trained parameters that are not sharded, equal on all ranks.
        mesh: The ranks, in one dimension.
    """

    def average(grad: Tensor) -> Tensor:
        return whole(DTensor.from_local(grad, mesh, [Partial("avg")], run_check=False))

    for parameter in parameters:
        parameter.register_hook(average)


def is_shard(weight: Tensor) -> bool:
    """Whether a tensor is distributed, as parameters under FSDP2 are: this process holds a shard of it."""
    return isinstance(weight, DTensor)


def is_sharded(weight: Tensor) -> bool:
    """Whether a parameter is sharded over the ranks, by FSDP2 or by DeepSpeed ZeRO stage 3."""
    return is_shard(weight) or is_zero3_sharded(weight)


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, without a copy; that is all of it if it is not sharded."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def shard_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return the part of a tensor that belongs to the shard of a weight that this process holds.

    Args:
        tensor: Tensor in the shape of the weight: whole, and equal on all ranks, or sharded as the weight is.
        weight: The weight, sharded or not.

    Returns:
        Tensor in the shape of `local_shard(weight)`, on its device.
    """
    if isinstance(weight, DTensor) and not isinstance(tensor, DTensor):
        # every rank takes its part, without communication
        tensor = distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)
    return local_shard(tensor).to(weight.device)


def unshard_like(shard: Tensor, weight: Tensor) -> Tensor:
    """Return the whole tensor whose parts `shard_like` returned, on every rank.

    All ranks have to call this.

    Args:
        shard: The part of this process.
        weight: The weight that the tensor has the shape of.
    """
    if not isinstance(weight, DTensor):
        return shard
    mesh, placements = weight.device_mesh, weight.placements
    part = DTensor.from_local(shard, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())
    return whole(part)


def whole(tensor: Tensor) -> Tensor:
    """Return a whole tensor on every rank, gathered if FSDP2 shards it; all ranks have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_over_shards(number: Tensor, weight: Tensor) -> int:
    """Sum a number over the shards of a weight; all ranks have to call this.

    Args:
        number: The integer of this process, of shape `()`, on the device of the weight.
        weight: The weight; if it is not sharded, the number itself is returned.
    """
    if isinstance(weight, DTensor):
        placements = [Replicate() if place.is_replicate() else Partial() for place in weight.placements]
        number = whole(DTensor.from_local(number, weight.device_mesh, placements, run_check=False))
    return int(number)


def has_plain_shards(weight: Tensor) -> bool:
    """Whether a tensor is whole, or sharded by FSDP2 into parts of whole rows, as `shard_like` can divide others."""
    return not isinstance(weight, DTensor) or all(type(place) in (Shard, Replicate) for place in weight.placements)
