"""Keep pruned weights at zero while they are trained: mask gradients, weights and optimizer state."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from wandazeta.models.blocks import block_lists
from wandazeta.models.sharded import (
    has_plain_shards,
    is_shard,
    local_shard,
    shard_like,
    sum_over_shards,
    unshard_like,
)
from wandazeta.models.zero3 import full_shape, gathered
from wandazeta.pruning.method.layers import prunable_weights

__all__ = ["HeldMasks", "masks_from_zeros", "pack_mask", "unpack_mask"]


def masks_from_zeros(module: nn.Module, block_name: str | None = None) -> dict[str, Tensor]:
    """Derive masks from the zeros of the Linears and experts inside the blocks, whichever method pruned them.

    The zeros tell which blocks were pruned, so of several lists (encoder and decoder) none has to be chosen.

    Weights without zeros are dense and get no mask. Weights of zeros alone are newly initialised, as the second factor
    of a low-rank adapter is, and get none either.

    Args:
        module: A model, or a module that holds one.
        block_name: Dotted name of the `ModuleList` of blocks in `module`; by default all that are found.

    Returns:
        Bool masks in the shape of the weights, True where a weight is kept, by parameter name; sharded if the weight
        is sharded by FSDP2.

    Raises:
        ValueError: If there are no blocks, none of them was pruned, or their weights are incomplete or quantized.
    """
    lists = block_lists(module, block_name)
    parameters = {
        f"{name}.{index}.{weight_name}": weight.parameter
        for name, blocks in lists.items()
        for index, block in enumerate(blocks)
        for weight_name, weight in prunable_weights(block).items()
    }
    masks: dict[str, Tensor] = {}
    seen: set[Tensor] = set()
    for weight_name, parameter in parameters.items():
        # blocks may share a layer, which has one mask
        if parameter in seen:
            continue
        seen.add(parameter)
        with gathered([parameter]):
            weight = parameter.detach()
            _check_plain(weight_name, weight)
            kept = weight != 0
        num_kept = sum_over_shards(local_shard(kept).count_nonzero(), parameter)
        if 0 < num_kept < kept.numel():
            masks[weight_name] = kept
    if not masks:
        where = ", ".join(f"`{name}`" for name in lists)
        raise ValueError(
            f"Expected weights that were pruned in {where}, but none of {len(parameters)} holds both zeros and other "
            "values; prune first, load a pruned model, or pass a mask file"
        )
    return masks


def _check_plain(name: str, weight: Tensor) -> None:
    """Refuse a weight that is neither a complete floating-point tensor nor sharded by FSDP2."""
    if weight.numel() == 0 or weight.is_meta or not has_plain_shards(weight) or not weight.is_floating_point():
        raise ValueError(
            f"Expected complete floating-point weights on every rank, but `{name}` is {type(weight).__name__} of shape "
            f"{tuple(weight.shape)} and {weight.dtype} on {weight.device}; weights that are quantized, or sharded by "
            "anything but FSDP2, cannot be masked: use one device or DDP"
        )


class HeldMasks:
    """Pruning masks that are applied again whenever the weights are trained, so that sparsity is kept exactly.

    Pruned weights are +0.0, bit for bit, after every optimizer step. Gradients are masked by hooks as autograd
    computes them, before they are accumulated, reduced over ranks, clipped or logged; weights and optimizer state are
    masked after each step of an optimizer. Optimizer state is masked where it is floating-point and has the shape of
    its weight (momenta); step counters and factored moments are not.

    DeepSpeed trains flat copies of the weights, sharded over the ranks, which masks cannot reach. There only gradients
    are masked (`hold_gradients`): with SGD, Adam and any other optimizer that updates each value from its own gradient
    and moves values without a gradient only towards zero (weight decay), pruned values stay zero. `check` detects
    optimizers for which this does not hold.

    FSDP2 shards every weight, its gradient and its optimizer state alike; each rank holds the part of the mask that
    belongs to its shard. Gradients are masked after they are reduced, and before they are clipped. All ranks have to
    make the same calls.

    Args:
        weights: Weights by name.
        masks: Bool masks of the same names and shapes, True where a weight is kept; each is whole, or sharded as its
            weight is.

    Raises:
        ValueError: If a mask has another shape than its weight, a weight is incomplete or quantized, or a pruned
            weight is not zero.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self._weights = {name: weights[name] for name in masks}
        # keyed by the parameters, by which optimizers identify their state; True where a weight is pruned, for the
        # shard of this rank
        self._pruned: dict[nn.Parameter, Tensor] = {}
        self._handles: list[Any] = []
        for name, mask in masks.items():
            weight = self._weights[name]
            with gathered([weight]):
                _check_plain(name, weight)
                if mask.dtype != torch.bool or mask.shape != weight.shape:
                    raise ValueError(
                        f"Expected a bool mask of shape {tuple(weight.shape)} for `{name}`, but got {mask.dtype} of "
                        f"shape {tuple(mask.shape)}; use the masks that were written with this model"
                    )
                pruned = ~shard_like(mask, weight)
                found = torch.count_nonzero(local_shard(weight)[pruned])
            if num_dense := sum_over_shards(found, weight):
                raise ValueError(
                    f"Expected weights that are zero where their masks prune, but {num_dense} of `{name}` are not; "
                    "load the pruned weights that the masks belong to"
                )
            self._pruned[weight] = pruned

    @property
    def masks(self) -> dict[str, Tensor]:
        """The whole masks by name, True where a weight is kept."""
        return {name: unshard_like(~self._pruned[weight], weight) for name, weight in self._weights.items()}

    @property
    def num_layers(self) -> int:
        """Number of masked weights."""
        return len(self._weights)

    @property
    def num_weights(self) -> int:
        """Number of values in the masked weights."""
        return sum(full_shape(weight).numel() for weight in self._pruned)

    @property
    def num_pruned(self) -> int:
        """Number of values that are kept at zero."""
        return sum(sum_over_shards(pruned.sum(), weight) for weight, pruned in self._pruned.items())

    def hold(self, optimizers: Iterable[Optimizer]) -> None:
        """Apply the masks now and after every step of the optimizers, until `release`.

        Args:
            optimizers: All optimizers that update the weights; their present state is masked too.

        Raises:
            ValueError: If one of them is not a `torch.optim.Optimizer`.
        """
        optimizers = list(optimizers)
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise ValueError(
                    f"Expected optimizers of torch, but got {type(optimizer).__name__}, whose state cannot be masked"
                )
        self.hold_gradients()
        for weight, pruned in self._pruned.items():
            # `data`: this changes at most the sign of a zero, which a graph that was built before may use
            for tensor in (weight.data, weight.grad):
                if tensor is not None:
                    local_shard(tensor).masked_fill_(pruned, 0.0)
        for optimizer in optimizers:
            self._mask_state(optimizer)
            self._handles.append(
                optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self._mask_after_step(optimizer))
            )

    def hold_gradients(self) -> None:
        """Mask gradients only, until `release`; for strategies that train copies of the weights."""
        for weight, pruned in self._pruned.items():
            # torch accepts hooks only on tensors that require gradients; a frozen weight may be unfrozen later
            frozen = not weight.requires_grad
            weight.requires_grad_(True)
            # FSDP2 gives a shard its gradient outside of autograd, and runs hooks of this kind only
            self._handles.append(
                weight.register_post_accumulate_grad_hook(self._mask_gradient)
                if is_shard(weight)
                else weight.register_hook(lambda grad, pruned=pruned: grad.masked_fill(pruned, 0.0))
            )
            weight.requires_grad_(not frozen)

    def release(self) -> None:
        """Stop applying the masks; the weights are left unchanged."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def check(self, signs: bool = True) -> None:
        """Check that every pruned weight is zero.

        Args:
            signs: Whether it has to be +0.0, bit for bit. Where only gradients are masked, a -0.0 from before the
                training stays -0.0.

        Raises:
            ValueError: If one is not; the message names the weights.
        """
        broken = {}
        for name, weight in self._weights.items():
            with gathered([weight]):
                values = local_shard(weight)[self._pruned[weight].to(weight.device)]
            found = ((values != 0) | (values.signbit() & signs)).sum()
            if count := sum_over_shards(found, weight):
                broken[name] = count
        if broken:
            name = next(iter(broken))
            raise ValueError(
                f"Expected pruned weights to be zero, but {sum(broken.values())} are not, in {len(broken)} weights, "
                f"first {broken[name]} of `{name}`; something other than the optimizers writes to them: check "
                "callbacks that average, swap or load weights, and under DeepSpeed the optimizer, which must not move "
                "weights without a gradient"
            )

    def _mask_gradient(self, weight: Tensor) -> None:
        assert weight.grad is not None
        local_shard(weight.grad).masked_fill_(self._pruned[weight], 0.0)  # type: ignore[index]

    @torch.no_grad()
    def _mask_after_step(self, optimizer: Optimizer) -> None:
        for weight, pruned in self._masked_weights(optimizer):
            local_shard(weight).masked_fill_(pruned, 0.0)
        self._mask_state(optimizer)

    def _mask_state(self, optimizer: Optimizer) -> None:
        for weight, pruned in self._masked_weights(optimizer):
            for state in optimizer.state.get(weight, {}).values():
                if isinstance(state, Tensor) and state.is_floating_point() and state.shape == weight.shape:
                    local_shard(state).masked_fill_(pruned.to(state.device), 0.0)

    def _masked_weights(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the weights of an optimizer that have a mask, with their pruned places."""
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if (pruned := self._pruned.get(weight)) is not None:
                    yield weight, pruned


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask into one bit per value.

    Args:
        mask: Bool mask of any shape.

    Returns:
        uint8 of shape (⌈values / 8⌉,) on the CPU, the first value in the lowest bit.

    Examples:
        >>> pack_mask(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    bits = mask.detach().cpu().flatten().to(torch.uint8)
    bits = F.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """Restore a mask that `pack_mask` packed.

    Args:
        packed: The packed mask.
        shape: Shape of the mask.

    Returns:
        Bool mask of that shape.
    """
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[: shape.numel()].bool().view(shape)
