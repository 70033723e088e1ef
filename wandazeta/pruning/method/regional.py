"""Regional gradients and regional optimisation (Wanda++, sections 4.1 and 4.2): one block at a time, no labels.

Shapes: a sample's hidden states are (1, tokens, width); weights and gradients (out, in) or the layer's own layout.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from wandazeta.pruning.method.masks import zero_where_false
from wandazeta.pruning.method.statistics import InputStatistics
from wandazeta.pruning.options import PruneOptions
from wandazeta.pruning.samples import Batches
from wandazeta.utilities.ranks import Ranks

# (the samples of a batch, their hidden states) -> the block's output
RunBlock = Callable[[Sequence[int], Tensor], Tensor]

# half precision would flush the gradient of a norm over millions of values to zero
_HALF_SCALE = 1024.0


def select(states: Tensor, mask: Tensor | None) -> Tensor:
    """The positions that count, in float32 (float64 stays).

    Args:
        states: Shape (1, tokens, width).
        mask: Bool of shape (1, tokens), None for all.
    """
    states = states if mask is None else states[mask]
    return states if states.dtype == torch.float64 else states.float()


def regional_loss(output: Tensor, mask: Tensor | None = None) -> Tensor:
    """L = ‖f(X)‖₂ of one sample, not squared (Wanda++, equation 2).

    Args:
        output: The block's output, shape (1, tokens, width).
        mask: Positions that count.
    """
    return torch.linalg.vector_norm(select(output, mask))


def optimisation_loss(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean squared error between the pruned block and its target on one sample.

    Args:
        output: The pruned block's output, shape (1, tokens, width).
        target: What it should be.
        mask: Positions that count.
    """
    return nn.functional.mse_loss(select(output, mask), select(target, mask))


def regional_gradients(
    run: RunBlock,
    layers: Mapping[str, nn.Linear],
    hidden: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    norms: InputStatistics,
    on_output: Callable[[Tensor], None],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """G = sqrt(mean over samples of (∂L_n/∂W)²) of every layer, in float32 and in the layout of its weight.

    The same forward yields the input norms and the dense outputs.

    Args:
        run: The dense block.
        layers: The layers; their weights must require gradients.
        hidden: The block's input for each sample.
        masks: Positions that count, for each sample.
        norms: Collects the input norms.
        on_output: Gets each sample's dense output, in order.
        ranks: Those that the samples are shared out to; each passes its own.
    """
    squares = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}
    half = any(layer.weight.dtype == torch.float16 for layer in layers.values())
    scale = _HALF_SCALE if half else 1.0

    def add_square(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.float()
            squares[name].addcmul_(gradient, gradient)
            weight.grad = None  # each sample is squared on its own

        return hook

    with ExitStack() as hooks, norms.collect():
        for name, layer in layers.items():
            hooks.callback(layer.weight.register_post_accumulate_grad_hook(add_square(name)).remove)
        for index, (states, mask) in enumerate(zip(hidden, masks, strict=True)):
            with norms.sample(mask), torch.enable_grad():
                output = run([index], states)
                (regional_loss(output, mask) * scale).backward()
            on_output(output.detach())
    norms.share(ranks)
    ranks.all_reduce_(list(squares.values()))
    return {name: (square / norms.num_samples).sqrt_().div_(scale) for name, square in squares.items()}


class MasterWeights:
    """Float32 copies of 16-bit weights, which the optimiser moves; wider weights are their own masters.

    RMSprop at the paper's learning rate moves a weight by less than half an ulp of bfloat16 in all 160 steps.

    Args:
        layers: The layers, by name.
        keep_pruned: Keep what is pruned in the masters, which are copies then whatever the precision; only the weights
            get zeros, and the masters their gradients.
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
        """Set weights, and masters unless they keep what is pruned, to zero where the mask is False.

        Args:
            masks: In the weights' layout.
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
        """Round the masters to the weights; what is pruned stays zero where the masters keep it."""
        for name, weight in self.weights.items():
            if self.masters[name] is not weight:
                weight.copy_(self.masters[name])
            if name in self._masks:
                zero_where_false(weight, self._masks[name])

    @torch.no_grad()
    def take_gradients(self, scale: float) -> None:
        """Add the weights' gradients, divided by `scale`, to the masters'."""
        for name, weight in self.weights.items():
            master = self.masters[name]
            if master is not weight and weight.grad is not None:
                gradient = weight.grad.to(master.dtype).div_(scale)
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                weight.grad = None

    def gradients(self, complete: bool) -> list[Tensor]:
        """The masters' gradients.

        Args:
            complete: Make zeros of those that are missing, for a rank without a sample in this step.
        """
        for master in self.masters.values():
            if complete and master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def clear_gradients(self) -> None:
        """Free all gradients."""
        for parameter in (*self.weights.values(), *self.masters.values()):
            parameter.grad = None


def optimise_block(
    run: RunBlock,
    master: MasterWeights,
    prune: Callable[[int], dict[str, Tensor]],
    hidden: Sequence[Tensor],
    targets: Sequence[Tensor],
    samples: Batches,
    norms: InputStatistics,
    options: PruneOptions,
    generator: torch.Generator,
    ranks: Ranks,
) -> None:
    """K rounds: prune by the current score, then steps towards the target on M samples (Wanda++, algorithm 1).

    Args:
        run: The block.
        master: Its weights.
        prune: Given the number of the round, scores and prunes the block as it is, and returns the masks.
        hidden: The block's input for each sample.
        targets: The wanted output for each sample.
        samples: Which of them can go through the block together.
        norms: Input norms of the block as it is; collected anew in each round's own forwards.
        options: The options.
        generator: Draws the samples of each round.
        ranks: Those that the samples are shared out to; each passes its own, and all take the same steps.

    Raises:
        ValueError: If the weights are no longer finite.
    """
    parameters = list(master.masters.values())
    optimizer = _make_optimizer(parameters, options)
    num_steps = options.rounds * (options.samples_per_round // options.samples_per_step)
    decay = (lambda step: 1 - step / num_steps) if options.lr_schedule == "linear" else (lambda step: 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    half = any(weight.dtype == torch.float16 for weight in master.weights.values())
    num_samples = int(ranks.sum(len(hidden)))

    for number in range(options.rounds):
        kept = prune(number)
        norms.reset()
        drawn = torch.randperm(num_samples, generator=generator)[: options.samples_per_round].tolist()
        with norms.collect():
            for start in range(0, len(drawn), options.samples_per_step):
                step = drawn[start : start + options.samples_per_step]
                for batch in samples.split(ranks.local_indices(step)):
                    share = len(batch) / len(step)
                    target = torch.cat([targets[index] for index in batch])
                    scale = float(target.numel()) if half else 1.0
                    with norms.sample(samples.mask(batch), len(batch)), torch.enable_grad():
                        output = run(batch, torch.cat([hidden[index] for index in batch]))
                        loss = optimisation_loss(output, target, samples.mask(batch))
                        (loss * (scale * share)).backward()
                    master.take_gradients(scale)
                ranks.all_reduce_(master.gradients(complete=ranks.size > 1))
                optimizer.step()
                scheduler.step()
                master.clear_gradients()
                if options.mask_mode == "fixed":
                    master.apply_masks(kept)
                else:
                    master.publish()
        norms.share(ranks)
    if not all(bool(torch.isfinite(parameter.sum())) for parameter in parameters):
        raise ValueError(
            f"Expected argument `learning_rate` to keep the weights finite, but {options.learning_rate:g} did not; "
            "lower it"
        )


def _make_optimizer(parameters: list[Tensor], options: PruneOptions) -> torch.optim.Optimizer:
    if options.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=options.learning_rate)
    # decay would pull the weights away from the target
    fused = parameters[0].dtype == torch.float32
    return torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0, fused=fused)
