"""Regional gradients and regional optimisation (Wanda++, sections 4.1 and 4.2), one block at a time, without labels.

Shapes: hidden states of a sample are (1, tokens, width); weights and gradients have the layout of the layer.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing

import torch
from torch import Tensor, nn

from wandazeta.pruning.method.optimizer import MasterWeights, load_kernels, make_optimizer
from wandazeta.pruning.method.statistics import InputStatistics
from wandazeta.pruning.method.tokens import select_rows
from wandazeta.pruning.methods import RegionalOptimisation
from wandazeta.utilities.graphs import Graphed, GraphedCall
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
    kernels = load_kernels(layer.weight for layer in layers.values())

    def add_square(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            if kernels is not None:
                kernels.add_square_(squares[name], weight.grad)
            else:
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


def optimise_block(
    run: RunBlock,
    master: MasterWeights,
    prune: Callable[[], object],
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
        prune: Scores and prunes the block; called at the start of each round.
        hidden: Input of the block for each sample of this rank.
        targets: Dense output for each sample.
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
    num_samples = int(ranks.sum(len(hidden)))

    def take_step(index: int, states: Tensor, target: Tensor) -> tuple[list[Tensor | None], list[tuple[str, int]]]:
        """Return the gradients, unless the step can be taken here, where a graph contains it."""
        # what a capture has left that failed
        statistics.seen = []
        master.clear_gradients()
        with torch.enable_grad():
            # in memory of its own: how a view of a batch is aligned may change the rounding of products
            output = run([index], states.clone())
            (optimisation_loss(output, target, masks[index]) * master.loss_scale(target.numel())).backward()
        found = [weight.grad for weight in master.weights.values()]
        if not optimizer.is_capturable:
            return found, statistics.seen
        optimizer.take_gradients(found, target.numel())
        optimizer.step()
        return [], statistics.seen

    optimizer = make_optimizer(
        master,
        "rmsprop",
        [optimisation.learning_rate] * len(parameters),
        [1.0] * (optimisation.rounds * optimisation.samples_per_round),
        ranks,
    )
    with closing(optimizer), closing(graphed(take_step, copies=False)) as call:
        for _ in range(optimisation.rounds):
            prune()
            statistics.reset()
            order = torch.randperm(num_samples, generator=generator, device="cpu")
            drawn = order[: optimisation.samples_per_round].tolist()
            with statistics.collect():
                for sample in drawn:
                    # on one rank only; the others add zeros
                    for index in ranks.local_indices([sample]):
                        with statistics.sample(masks[index]):
                            found, statistics.seen = call(index, hidden[index], targets[index])
                        if not optimizer.is_capturable:
                            optimizer.take_gradients(found, targets[index].numel())
                    if not optimizer.is_capturable:
                        optimizer.step()
            statistics.all_reduce(ranks)
    # one read of the device for all
    if not bool(torch.stack([parameter.sum() for parameter in parameters]).isfinite().all()):
        raise ValueError(
            f"Expected argument `learning_rate` to keep the weights finite, but {optimisation.learning_rate:g} did "
            "not; lower it"
        )
