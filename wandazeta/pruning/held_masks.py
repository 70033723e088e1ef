"""Holds pruned weights at zero while something trains them: their gradients, themselves and their optimizer state."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from wandazeta.models.blocks import find_blocks
from wandazeta.models.zero3 import gathered
from wandazeta.pruning.method.layers import prunable_layers


def zero_masks(module: nn.Module, block_name: str | None = None) -> dict[str, Tensor]:
    """Reads masks off the zeros of the Linears inside the blocks.

    A weight without zeros is dense and has no mask; one of nothing but zeros is new (the second factor of a low-rank
    adapter starts so), not pruned, and has none either.

    Args:
        module: The model, or a module that holds it.
        block_name: Dotted name of the list of blocks in `module`; found where it is not given.

    Returns:
        Bool masks in the layout of the weights, True where a weight is kept, by parameter name.

    Raises:
        ValueError: If there are no blocks, their weights are not whole, or none of them was pruned.
    """
    name, blocks = find_blocks(module, name=block_name)
    layers = {
        f"{name}.{index}.{layer_name}": layer
        for index, block in enumerate(blocks)
        for layer_name, layer in prunable_layers(block).items()
    }
    masks = {}
    for weight_name, layer in layers.items():
        with gathered([layer.weight]):
            weight = layer.weight.detach()
            check_whole(weight_name, weight)
            kept = weight != 0
        if not bool(kept.all()) and bool(kept.any()):
            masks[weight_name] = kept
    if not masks:
        raise ValueError(
            f"Expected weights that were pruned in `{name}`, but none of {len(layers)} holds both zeros and others; "
            "prune first, load a pruned model, or give the masks as a file"
        )
    return masks


def check_whole(name: str, weight: Tensor) -> None:
    """Refuses a weight that this process does not hold whole, as a plain floating-point tensor.

    Args:
        name: What the weight is called in the message.
        weight: The weight.

    Raises:
        ValueError: If it is sharded, on the meta device or quantized.
    """
    if weight.numel() == 0 or weight.is_meta or hasattr(weight, "device_mesh") or not weight.is_floating_point():
        raise ValueError(
            f"Expected whole floating-point weights on every rank, but `{name}` is {type(weight).__name__} of shape "
            f"{tuple(weight.shape)} and {weight.dtype} on {weight.device}; masks of sharded or quantized weights "
            "cannot be held: use one device or DDP"
        )


class HeldSparsity:
    """Weights with their masks, held exactly: pruned places are +0.0, bit for bit, after every step.

    Gradients are masked as autograd hands them over, before they are accumulated, exchanged, clipped or looked at;
    weights and optimizer state once an optimizer has stepped. State is masked where it is of floating point and has
    the shape of its weight: momenta are, step counters and factored moments are not.

    DeepSpeed trains flat copies of the weights, shared out over the ranks, which masks cannot reach; there gradients
    alone are masked (`hold_gradients`). Copies and momenta that start at zero stay so under every rule that works value
    by value and moves nothing without a gradient but towards zero, as weight decay does; `check` tells any other.

    Args:
        weights: The weights by name.
        masks: Bool masks of the same names and shapes, True where a weight is kept.

    Raises:
        ValueError: If a mask has no weight or another shape, a weight is not whole, or a weight that its mask prunes
            is not zero.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self._weights = {name: weights[name] for name in masks}
        # by the parameter itself, as optimizers know it
        self._pruned: dict[nn.Parameter, Tensor] = {}
        self._handles: list[Any] = []
        for name, mask in masks.items():
            weight = self._weights[name]
            with gathered([weight]):
                check_whole(name, weight)
                if mask.dtype != torch.bool or mask.shape != weight.shape:
                    raise ValueError(
                        f"Expected a bool mask of shape {tuple(weight.shape)} for `{name}`, but got {mask.dtype} of "
                        f"shape {tuple(mask.shape)}; take the masks that were written with this model"
                    )
                pruned = ~mask.to(weight.device)
                num_dense = int(torch.count_nonzero(weight.detach()[pruned]))
            if num_dense:
                raise ValueError(
                    f"Expected weights that are zero where their masks prune, but {num_dense} of `{name}` are not; "
                    "load the pruned weights that the masks belong to"
                )
            self._pruned[weight] = pruned

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by name, True where a weight is kept."""
        return {name: ~self._pruned[weight] for name, weight in self._weights.items()}

    @property
    def num_weights(self) -> int:
        """Values in the weights that are held."""
        return sum(pruned.numel() for pruned in self._pruned.values())

    @property
    def num_pruned(self) -> int:
        """Values that are held at zero."""
        return sum(int(pruned.sum()) for pruned in self._pruned.values())

    def hold(self, optimizers: Iterable[Optimizer]) -> None:
        """Begins to hold, now and after every step of the optimizers, until `release`.

        Args:
            optimizers: Everything that steps on the weights; what state they have is masked now.

        Raises:
            ValueError: If one is no optimizer of torch.
        """
        optimizers = list(optimizers)
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise ValueError(
                    f"Expected optimizers of torch, but got {type(optimizer).__name__}, whose state cannot be held"
                )
        self.hold_gradients()
        for weight, pruned in self._pruned.items():
            for tensor in (weight.detach(), weight.grad):
                if tensor is not None:
                    tensor.masked_fill_(pruned, 0.0)
        for optimizer in optimizers:
            self._mask_after_step(optimizer)
            self._handles.append(
                optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self._mask_after_step(optimizer))
            )

    def hold_gradients(self) -> None:
        """Begins to mask gradients alone, until `release`; for weights that are trained in copies of them."""
        for weight, pruned in self._pruned.items():
            # torch hooks only what requires a gradient; a weight that is frozen now may be thawed later
            frozen = not weight.requires_grad
            weight.requires_grad_(True)
            self._handles.append(weight.register_hook(lambda grad, pruned=pruned: grad.masked_fill(pruned, 0.0)))
            weight.requires_grad_(not frozen)

    def release(self) -> None:
        """Ceases to hold; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def check(self, signs: bool = True) -> None:
        """Checks that every pruned place is zero.

        Args:
            signs: Whether it has to be +0.0, bit for bit: a -0.0 of before stays one where gradients alone are held.

        Raises:
            ValueError: If one is not; the message names the weights.
        """
        broken = {}
        for name, weight in self._weights.items():
            with gathered([weight]):
                values = weight.detach()[self._pruned[weight].to(weight.device)]
            count = int(((values != 0) | (values.signbit() & signs)).sum())
            if count:
                broken[name] = count
        if broken:
            name = next(iter(broken))
            raise ValueError(
                f"Expected pruned weights to be zero, but {sum(broken.values())} are not, in {len(broken)} weights, "
                f"first {broken[name]} of `{name}`; something beside the optimizers writes to them: check callbacks "
                "that average, swap or load weights, and under DeepSpeed the optimizer, which must not move what has "
                "no gradient"
            )

    @torch.no_grad()
    def _mask_after_step(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                pruned = self._pruned.get(weight)
                if pruned is None:
                    continue
                weight.masked_fill_(pruned, 0.0)
                for state in optimizer.state.get(weight, {}).values():
                    if isinstance(state, Tensor) and state.is_floating_point() and state.shape == weight.shape:
                        state.masked_fill_(pruned.to(state.device), 0.0)


def pack_mask(mask: Tensor) -> Tensor:
    """Packs a mask to one bit a value.

    Args:
        mask: Bool of any shape.

    Returns:
        uint8 of shape (⌈values / 8⌉,) on the CPU, the first value in the lowest bit.

    Example:
        >>> pack_mask(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    bits = mask.detach().cpu().flatten().to(torch.uint8)
    bits = F.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """Undoes `pack_mask`.

    Args:
        packed: What it gave.
        shape: Shape of the mask.

    Returns:
        Bool of that shape.
    """
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[: shape.numel()].bool().view(shape)
