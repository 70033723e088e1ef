"""Optimizers of one block: the weights in float32, and steps that end with masked weights in the model's precision."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wandazeta.pruning.method.masks import zero_where_false
from wandazeta.utilities import triton_kernels
from wandazeta.utilities.ranks import Ranks

Algorithm = Literal["rmsprop", "adamw"]

_KERNELS = "wandazeta.pruning.method.kernels"
# precisions of weights that the kernels read and write
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# torch's defaults: decay of the average of the gradient and of its square, and what is added to the root of the square
_BETAS: dict[Algorithm, tuple[float, float]] = {"rmsprop": (0.0, 0.99), "adamw": (0.9, 0.999)}
_EPSILON = 1e-8


def load_kernels(weights: Iterable[Tensor]) -> ModuleType | None:
    """Return the module of Triton kernels if they can be used for these weights, else None.

    Args:
        weights: Weights of a block.
    """
    weights = list(weights)
    fits = all(weight.is_cuda and weight.dtype in _KERNEL_DTYPES and weight.is_contiguous() for weight in weights)
    if not weights or not fits:
        return None
    otherwise = "steps of the optimisation take several times as long"
    return triton_kernels.load_kernels(_KERNELS, weights[0].device, otherwise)


class MasterWeights:
    """Float32 copies of 16-bit weights for the optimizer; weights of higher precision are optimised directly.

    RMSprop at the paper's learning rate changes a weight by less than half an ulp of bfloat16 in all 160 steps.

    Args:
        layers: The layers by name.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self.weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}
        self.masters: dict[str, Tensor] = {name: self._master(weight) for name, weight in self.weights.items()}
        self._half = any(weight.dtype == torch.float16 for weight in self.weights.values())

    def loss_scale(self, num_values: int) -> float:
        """Return the factor of a loss, without which gradients in float16 underflow to zero.

        Args:
            num_values: Number of values that the loss is a mean over.
        """
        return float(num_values) if self._half else 1.0

    def _master(self, weight: Tensor) -> Tensor:
        if weight.dtype in (torch.float16, torch.bfloat16):
            return nn.Parameter(weight.detach().float())
        return weight

    @torch.no_grad()
    def apply_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Set weights and masters to zero where the mask is False.

        Args:
            masks: Bool masks in the layout of the weights, True where a weight is kept.
        """
        for name, mask in masks.items():
            zero_where_false(self.masters[name], mask)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters to the weights, rounded to their precision."""
        for name, weight in self.weights.items():
            if self.masters[name] is not weight:
                weight.copy_(self.masters[name])

    @torch.no_grad()
    def take_gradients(self, scale: float) -> None:
        """Move the gradients of the weights to the masters.

        Args:
            scale: Factor of the loss, by which the gradients are divided.
        """
        for name, weight in self.weights.items():
            master = self.masters[name]
            if weight.grad is None:
                continue
            gradient = weight.grad.to(master.dtype)
            weight.grad = None
            master.grad = gradient if scale == 1.0 else gradient.div_(scale)

    def gradients(self) -> list[Tensor]:
        """Gradients of all masters.

        They are zeros where there are none: on a rank without a sample in this step, and for experts that the sample
        does not reach, so that optimizers treat these alike on any number of ranks.
        """
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def close(self) -> None:
        """Drop all tensors, whoever still refers to this object."""
        self.clear_gradients()
        self.weights.clear()
        self.masters.clear()

    def clear_gradients(self) -> None:
        """Set all gradients to None."""
        for parameter in (*self.weights.values(), *self.masters.values()):
            parameter.grad = None


class BlockOptimizer(ABC):
    """Base class of optimizers of one block: RMSprop, or AdamW without weight decay; see `make_optimizer`.

    For each step, the rank that has the sample calls `take_gradients`, and then all ranks call `step`.

    Args:
        master: The weights of the block.
        ranks: The ranks, whose gradients are summed.
        masks: Bool masks in the layout of the weights, True where a weight is kept; all weights move if there are none.
    """

    is_capturable = False
    """Whether `take_gradients` and `step` can be part of a CUDA graph, which is the same for all steps of one scale."""

    def __init__(self, master: MasterWeights, ranks: Ranks, masks: Mapping[str, Tensor]) -> None:
        self._master = master
        self._ranks = ranks
        self._masks = masks

    def take_gradients(self, gradients: Sequence[Tensor | None], num_values: int) -> None:
        """Take the gradients of a loss times `MasterWeights.loss_scale`.

        Args:
            gradients: A gradient for each weight, in its precision, or None.
            num_values: Number of values that the loss is a mean over.
        """
        for weight, gradient in zip(self._master.weights.values(), gradients, strict=True):
            weight.grad = gradient
        self._prepare(self._master.loss_scale(num_values))

    @abstractmethod
    def _prepare(self, scale: float) -> None:
        """Prepare gradients of the loss times `scale` for the step."""

    @abstractmethod
    def step(self) -> None:
        """Sum the gradients over the ranks, update masters and weights, apply the masks, and drop the gradients."""

    def close(self) -> None:
        """Drop all tensors, whoever still refers to this object."""
        self._masks = {}


class TorchBlockOptimizer(BlockOptimizer):
    """An optimizer of a block by torch's optimizers, in several passes over the weights.

    Args:
        master: The weights of the block.
        algorithm: `rmsprop` or `adamw`.
        rates: Learning rate of each weight.
        factors: Factor of the rates in each step.
        ranks: The ranks, whose gradients are summed.
        masks: Masks that are applied after each step; none lets all weights move.
    """

    def __init__(
        self,
        master: MasterWeights,
        algorithm: Algorithm,
        rates: Sequence[float],
        factors: Sequence[float],
        ranks: Ranks,
        masks: Mapping[str, Tensor],
    ) -> None:
        super().__init__(master, ranks, masks)
        self._factors = iter(factors)
        parameters = list(master.masters.values())
        by_rate: dict[float, list[Tensor]] = {}
        for rate, parameter in zip(rates, parameters, strict=True):
            by_rate.setdefault(rate, []).append(parameter)
        groups = [{"params": group, "lr": rate, "initial_lr": rate} for rate, group in by_rate.items()]
        self._optimizer: torch.optim.Optimizer
        if algorithm == "rmsprop":
            self._optimizer = torch.optim.RMSprop(groups)
        else:
            # without decay, which would pull the weights away from the target
            fused = parameters[0].dtype == torch.float32
            self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=fused)

    def _prepare(self, scale: float) -> None:
        self._master.take_gradients(scale)

    def step(self) -> None:
        """Take a step; see `BlockOptimizer.step`."""
        self._ranks.all_reduce_(self._master.gradients())
        factor = next(self._factors)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self._optimizer.step()
        self._master.clear_gradients()
        self._master.apply_masks(self._masks)

    def close(self) -> None:
        """Drop all tensors, whoever still refers to this object or to torch's optimizer."""
        super().close()
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()


class FusedBlockOptimizer(BlockOptimizer):
    """An optimizer of a block by one Triton kernel for each layer, which reads gradients in the model's precision.

    The step number, rates, bias corrections, the factor of the loss, masks and moments are on the device at fixed
    addresses. On a single rank, a step allocates nothing and never waits for the device; a graph can contain it.

    Args:
        kernels: The module of kernels, from `load_kernels`.
        master: The weights of the block.
        algorithm: `rmsprop` or `adamw`.
        rates: Learning rate of each weight.
        factors: Factor of the rates in each step.
        ranks: The ranks, whose gradients are summed.
        masks: Masks that are applied after each step; none lets all weights move.
    """

    def __init__(
        self,
        kernels: ModuleType,
        master: MasterWeights,
        algorithm: Algorithm,
        rates: Sequence[float],
        factors: Sequence[float],
        ranks: Ranks,
        masks: Mapping[str, Tensor],
    ) -> None:
        as_bytes = {name: mask.to(torch.uint8, memory_format=torch.contiguous_format) for name, mask in masks.items()}
        super().__init__(master, ranks, as_bytes)
        self.is_capturable = ranks.size == 1
        self._kernels = kernels
        self._betas = _BETAS[algorithm]
        device = next(iter(master.masters.values())).device
        self._layers: dict[str, Any] = {}
        for (name, parameter), rate in zip(master.masters.items(), rates, strict=True):
            weight, values = master.weights[name], parameter.detach()
            self._layers[name] = kernels.LayerState(
                weight=None if weight is parameter else weight.detach(),
                master=values,
                square=torch.zeros_like(values),
                average=torch.zeros_like(values) if algorithm == "adamw" else None,
                rate=torch.full((), rate, dtype=torch.float32, device=device),
            )
        rows = []
        for number, factor in enumerate(factors, 1):
            # RMSprop corrects no bias
            first, second = (1 - beta**number if algorithm == "adamw" else 1.0 for beta in self._betas)
            rows.append((factor / first, second**-0.5))
        self._schedule = torch.tensor(rows, dtype=torch.float32, device=device)
        self._number = torch.zeros((), dtype=torch.int32, device=device)
        self._scale = torch.ones((), dtype=torch.float32, device=device)

    def _prepare(self, scale: float) -> None:
        if self._ranks.size > 1:
            self._master.take_gradients(scale)
        elif scale != 1.0:
            self._scale.fill_(scale)

    @torch.no_grad()
    def step(self) -> None:
        """Take a step; see `BlockOptimizer.step`. There are no more steps than `factors`."""
        parameters = self._master.weights
        if self._ranks.size > 1:
            # sums of 16-bit gradients would round
            self._ranks.all_reduce_(self._master.gradients())
            parameters = self._master.masters
        for name, layer in self._layers.items():
            self._kernels.step(
                layer,
                parameters[name].grad,
                self._masks.get(name),
                self._schedule,
                self._number,
                self._scale,
                self._betas,
                _EPSILON,
            )
        self._number.add_(1)
        self._master.clear_gradients()

    def close(self) -> None:
        """Drop all tensors, whoever still refers to this object."""
        super().close()
        self._layers.clear()


def make_optimizer(
    master: MasterWeights,
    algorithm: Algorithm,
    rates: Sequence[float],
    factors: Sequence[float],
    ranks: Ranks,
    masks: Mapping[str, Tensor] | None = None,
) -> BlockOptimizer:
    """Make the optimizer of a block: fused where its kernels can be used, else torch's.

    Args:
        master: The weights of the block.
        algorithm: `rmsprop`, or `adamw` without weight decay.
        rates: Learning rate of each weight.
        factors: Factor of the rates in each step.
        ranks: The ranks, whose gradients are summed.
        masks: Bool masks in the layout of the weights, True where a weight is kept, applied after each step; None lets
            all weights move.
    """
    masks = masks or {}
    kernels = load_kernels(master.weights.values())
    if kernels is None:
        return TorchBlockOptimizer(master, algorithm, rates, factors, ranks, masks)
    return FusedBlockOptimizer(kernels, master, algorithm, rates, factors, ranks, masks)
