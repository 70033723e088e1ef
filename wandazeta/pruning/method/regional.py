"""Regional gradients and regional optimisation (Wanda++, sections 4.1 and 4.2), one block at a time, without labels.

Shapes: hidden states of a sample are (1, tokens, width); weights and gradients have the layout of the layer.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager

import torch
from torch import Tensor, nn

from wandazeta.pruning.method.graphs import Graphed, GraphedCall
from wandazeta.pruning.method.masks import zero_where_false
from wandazeta.pruning.method.statistics import InputStatistics
from wandazeta.pruning.method.tokens import select_rows
from wandazeta.pruning.methods import RegionalOptimisation
from wandazeta.utilities.ranks import Ranks

# (indices of the samples of a batch, their hidden states) -> output of the block
RunBlock = Callable[[Sequence[int], Tensor], Tensor]

# in float16 the gradient of a norm over millions of values would underflow to zero
_HALF_SCALE = 1024.0


def select_tokens(states: Tensor, mask: Tensor | None) -> Tensor:
    """Select the positions that are no padding, in float32, or in float64 if the states are.

    Args:
        states: Shape (1, tokens, width).
        mask: Bool of shape (1, tokens); None selects all.
    """
    states = states if mask is None else select_rows(states.flatten(0, -2), mask)
    return states if states.dtype == torch.float64 else states.float()


def regional_loss(output: Tensor, mask: Tensor | None = None) -> Tensor:
    """Regional loss L = ‖f(X)‖₂ of one sample, not squared (Wanda++, equation 2).

    Args:
        output: Output of the block, shape (1, tokens, width).
        mask: Positions that are no padding, bool of shape (1, tokens); None if all are.
    """
    return torch.linalg.vector_norm(select_tokens(output, mask))


def optimisation_loss(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error between the output of the pruned block and its target, on one sample.

    Args:
        output: Output of the pruned block, shape (1, tokens, width).
        target: Target of the same shape.
        mask: Positions that are no padding, bool of shape (1, tokens); None if all are.
    """
    return nn.functional.mse_loss(select_tokens(output, mask), select_tokens(target, mask))


def regional_gradients(
    run: RunBlock,
    layers: Mapping[str, nn.Linear],
    hidden: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    statistics: InputStatistics,
    on_output: Callable[[Tensor], None],
    ranks: Ranks,
    graphed: Graphed = GraphedCall,
) -> dict[str, Tensor]:
    """Regional gradients G = sqrt(mean over samples of (∂L_n/∂W)²) of every layer (Wanda++, section 4.1).

    The same forwards collect the input statistics and the dense outputs.

    Args:
        run: Runs the dense block.
        layers: The layers; their weights must require gradients.
        hidden: Input of the block for each sample of this rank.
        masks: For each sample, which positions are no padding; None if all are.
        statistics: Collects the input norms.
        on_output: Called with the dense output of each sample, in order.
        ranks: The ranks, among which the samples are distributed.
        graphed: Makes functions of a sample that are captured as graphs.

    Returns:
        Gradients in float32, in the layout of the weights.
    """
    squares = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}
    half = any(layer.weight.dtype == torch.float16 for layer in layers.values())
    scale = _HALF_SCALE if half else 1.0

    def add_square(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.float()
            squares[name].addcmul_(gradient, gradient)
            weight.grad = None  # gradients are squared sample by sample

        return hook

    def add_sample(index: int, states: Tensor) -> tuple[Tensor, list[tuple[str, int]]]:
        # what a capture has left that failed
        statistics.seen = []
        for layer in layers.values():
            layer.weight.grad = None
        with torch.enable_grad():
            output = run([index], states)
            (regional_loss(output, masks[index]) * scale).backward()
        return output.detach(), statistics.seen

    with ExitStack() as hooks, statistics.collect(), closing(graphed(add_sample)) as call:
        for name, layer in layers.items():
            hooks.callback(layer.weight.register_post_accumulate_grad_hook(add_square(name)).remove)
        for index, (states, mask) in enumerate(zip(hidden, masks, strict=True)):
            with statistics.sample(mask):
                output, statistics.seen = call(index, states)
            on_output(output)
    statistics.all_reduce(ranks)
    ranks.all_reduce_(list(squares.values()))
    gradients = {name: (square / statistics.num_samples).sqrt_().div_(scale) for name, square in squares.items()}
    squares.clear()  # whoever still refers to the hooks holds nothing large
    return gradients


class MasterWeights:
    """Float32 copies of 16-bit weights for the optimizer; weights of higher precision are optimised directly.

    RMSprop at the paper's learning rate changes a weight by less than half an ulp of bfloat16 in all 160 steps.

    Args:
        layers: The layers by name.
        keep_pruned: Keep the values of pruned weights in the masters, as the straight-through estimator needs them.
            The masters are copies then, whatever the precision, and only the weights of the block are set to zero.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], keep_pruned: bool = False) -> None:
        self._keep_pruned = keep_pruned
        self._masks: Mapping[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}
        self.masters: dict[str, Tensor] = {name: self._master(weight) for name, weight in self.weights.items()}

    def _master(self, weight: Tensor) -> Tensor:
        if weight.dtype in (torch.float16, torch.bfloat16):
            return nn.Parameter(weight.detach().float())
        return nn.Parameter(weight.detach().clone()) if self._keep_pruned else weight

    @torch.no_grad()
    def apply_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Set weights to zero where the mask is False, and so the masters, unless they keep pruned values.

        Args:
            masks: Bool masks in the layout of the weights, True where a weight is kept.
        """
        if self._keep_pruned:
            self._masks = masks
            self.publish()
            return
        for name, mask in masks.items():
            zero_where_false(self.masters[name], mask)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters to the weights, rounded to their precision, with zeros for pruned values."""
        for name, weight in self.weights.items():
            if self.masters[name] is not weight:
                weight.copy_(self.masters[name])
            if name in self._masks:
                zero_where_false(weight, self._masks[name])

    def set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Set the gradients of the weights.

        Args:
            gradients: A gradient for each weight, or None.
        """
        for weight, gradient in zip(self.weights.values(), gradients, strict=True):
            weight.grad = gradient

    @torch.no_grad()
    def take_gradients(self, scale: float) -> None:
        """Move the gradients of the weights to the masters.

        Args:
            scale: Factor of the loss, by which the gradients are divided.
        """
        for name, weight in self.weights.items():
            master = self.masters[name]
            if master is not weight and weight.grad is not None:
                master.grad = weight.grad.to(master.dtype).div_(scale)
                weight.grad = None

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
        self._masks = {}
        self.weights.clear()
        self.masters.clear()

    def clear_gradients(self) -> None:
        """Set all gradients to None."""
        for parameter in (*self.weights.values(), *self.masters.values()):
            parameter.grad = None


def optimise_block(
    run: RunBlock,
    master: MasterWeights,
    start_round: Callable[[int], dict[str, Tensor]],
    hidden: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    statistics: InputStatistics,
    optimisation: RegionalOptimisation,
    generator: torch.Generator,
    ranks: Ranks,
    graphed: Graphed = GraphedCall,
) -> None:
    """Regional optimisation: K rounds, each of a pruning and one step towards the target for each of M samples.

    Source: Wanda++, algorithm 1.

    Args:
        run: Runs the block.
        master: The weights of the block.
        start_round: Called with the index of the round; scores and prunes the block, and returns the masks.
        hidden: Input of the block for each sample of this rank.
        targets: Target output for each sample.
        masks: For each sample, which positions are no padding; None if all are.
        statistics: Input statistics; collected anew in the forwards of each round.
        optimisation: The options, with `samples_per_round` filled in.
        generator: Draws the samples of each round.
        ranks: The ranks, among which the samples are distributed; all take the same steps.
        graphed: Makes functions of a sample that are captured as graphs.

    Raises:
        ValueError: If the weights are no longer finite.
    """
    assert optimisation.samples_per_round is not None
    parameters = list(master.masters.values())
    half = any(weight.dtype == torch.float16 for weight in master.weights.values())
    num_samples = int(ranks.sum(len(hidden)))
    steps = itertools.count()

    def scale_of(index: int) -> float:
        return float(targets[index].numel()) if half else 1.0

    def gradients(index: int, states: Tensor, target: Tensor) -> tuple[list[Tensor | None], list[tuple[str, int]]]:
        # what a capture has left that failed
        statistics.seen = []
        master.clear_gradients()
        with torch.enable_grad():
            # in memory of its own: how a view of a batch is aligned may change the rounding of products
            output = run([index], states.clone())
            (optimisation_loss(output, target, masks[index]) * scale_of(index)).backward()
        return [weight.grad for weight in master.weights.values()], statistics.seen

    with _optimizer(parameters, optimisation) as optimizer, closing(graphed(gradients, copies=False)) as call:
        for number in range(optimisation.rounds):
            kept = start_round(number)
            statistics.reset()
            order = torch.randperm(num_samples, generator=generator, device="cpu")
            drawn = order[: optimisation.samples_per_round].tolist()
            with statistics.collect():
                for sample in drawn:
                    # on one rank only; the others add zeros
                    for index in ranks.local_indices([sample]):
                        with statistics.sample(masks[index]):
                            found, statistics.seen = call(index, hidden[index], targets[index])
                        master.set_gradients(found)
                        master.take_gradients(scale_of(index))
                    ranks.all_reduce_(master.gradients())
                    for group in optimizer.param_groups:
                        group["lr"] = _learning_rate(optimisation, next(steps))
                    optimizer.step()
                    master.clear_gradients()
                    if optimisation.mask_mode == "fixed":
                        master.apply_masks(kept)
                    else:
                        master.publish()
            statistics.all_reduce(ranks)
    # one read of the device for all
    if not bool(torch.stack([parameter.sum() for parameter in parameters]).isfinite().all()):
        raise ValueError(
            f"Expected argument `learning_rate` to keep the weights finite, but {optimisation.learning_rate:g} did "
            "not; lower it"
        )


def _learning_rate(optimisation: RegionalOptimisation, step: int) -> float:
    """Learning rate of a step, counted over all rounds."""
    if optimisation.lr_schedule == "constant":
        return optimisation.learning_rate
    assert optimisation.samples_per_round is not None
    return optimisation.learning_rate * (1 - step / (optimisation.rounds * optimisation.samples_per_round))


@contextmanager
def _optimizer(parameters: list[Tensor], optimisation: RegionalOptimisation) -> Iterator[torch.optim.Optimizer]:
    """Context of an optimizer, whose moments and references are dropped at the end, whoever still refers to it."""
    optimizer = _make_optimizer(parameters, optimisation)
    try:
        yield optimizer
    finally:
        optimizer.state.clear()
        optimizer.param_groups.clear()


def _make_optimizer(parameters: list[Tensor], optimisation: RegionalOptimisation) -> torch.optim.Optimizer:
    if optimisation.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=optimisation.learning_rate)
    # without decay, which would pull the weights away from the target
    fused = parameters[0].dtype == torch.float32
    return torch.optim.AdamW(parameters, lr=optimisation.learning_rate, weight_decay=0.0, fused=fused)
