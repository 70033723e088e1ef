"""Regional optimisation that tunes itself: steps in units of the weights, rate and rounds chosen on held-out samples.

Shapes: hidden states of a sample are (1, tokens, width); weights have the layout of the layer.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wandazeta.pruning.method.optimizer import BlockOptimizer, MasterWeights, make_optimizer
from wandazeta.pruning.method.regional import RunBlock
from wandazeta.pruning.records import TuningRecord
from wandazeta.utilities.graphs import Graphed
from wandazeta.utilities.ranks import Ranks

# one sample in this many is held out
_HELD_OUT = 8
# added to the size of each token in the error, as a fraction of the sample's median size
_FLOOR = 0.1
# rate that the search of the first block starts from, and how many factors of two every search moves at most
_FIRST_RATE = 0.01
_MAX_DOUBLINGS = 4
# the first blocks search the rate; the others take the median of theirs
_NUM_SEARCHES = 3


def split_held_out(num_samples: int) -> tuple[list[int], list[int]]:
    """Split sample indices into those to train on and those held out, which are the same if there is one sample only.

    Args:
        num_samples: Number of samples.

    Examples:
        >>> split_held_out(4)
        ([0, 1, 2], [3])
    """
    everything = list(range(num_samples))
    held_out = everything[_HELD_OUT - 1 :: _HELD_OUT] or everything[-1:]
    return [index for index in everything if index not in held_out] or held_out, held_out


def token_weights(target: Tensor, mask: Tensor | None) -> Tensor:
    """Weights of a sample's tokens in its error, which make the error of a token relative to the token's size.

    A few positions of many models have massive activations, and the plain mean squared error is the error of these.

    Args:
        target: Target output of the block, shape (1, tokens, width).
        mask: Positions that are no padding, bool of shape (1, tokens); None if all are.

    Returns:
        Float32 of shape (1, tokens): 1 / (mean square of the token + a tenth of the sample's median mean square),
        divided by the number of tokens; zero for padding.
    """
    size = target.detach().float().square().mean(-1)
    kept = torch.ones_like(size, dtype=torch.bool) if mask is None else mask
    typical = size.masked_fill(~kept, torch.nan).nanmedian()
    # an output that is zero at every token has no size to compare with
    smallest = torch.finfo(torch.float32).tiny
    return kept / (size + _FLOOR * typical).clamp(min=smallest) / kept.sum()


def relative_error(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean over a sample's tokens of the squared error relative to the size of the token.

    Args:
        output: Output of the pruned block, shape (1, tokens, width).
        target: Target of the same shape.
        weights: `token_weights` of the target.
    """
    return ((output.float() - target.float()).square().mean(-1) * weights).sum()


@dataclass
class _Trial:
    """A run of the optimisation at one rate, after some rounds.

    Args:
        rate: The rate.
        optimizer: Its optimizer.
        error: Held-out error.
        weights: Values of the masters.
    """

    rate: float
    optimizer: BlockOptimizer
    error: float = float("inf")
    weights: list[Tensor] = field(default_factory=list)

    def close(self) -> None:
        """Drop the moments and the weights, whoever still refers to this object."""
        self.optimizer.close()
        self.weights = []


class BlockTuner:
    """Trains the kept weights of one pruned block to reproduce its target.

    Args:
        run: Runs the block.
        constant_weights: Context for several runs without a change of the weights, which may then be cast once.
        master: The weights of the block, pruned; they hold the result.
        kept: Masks in the layout of the weights, True where a weight is kept.
        hidden: Input of the block for each sample of this rank.
        targets: Target output for each sample.
        masks: For each sample, which positions are no padding; None if all are.
        generator: Draws the order of the samples in each round.
        ranks: The ranks, among which the samples are distributed; all take the same steps.
        graphed: Makes functions of a sample that are captured as graphs.
    """

    def __init__(
        self,
        run: RunBlock,
        constant_weights: Callable[[], AbstractContextManager[None]],
        master: MasterWeights,
        kept: Mapping[str, Tensor],
        hidden: Sequence[Tensor],
        targets: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        generator: torch.Generator,
        ranks: Ranks,
        graphed: Graphed,
    ) -> None:
        self._run = run
        self._constant_weights = constant_weights
        self._master = master
        self._kept = kept
        self._hidden = hidden
        self._targets = targets
        self._weights = [token_weights(target, mask) for target, mask in zip(targets, masks, strict=True)]
        self._generator = generator
        self._ranks = ranks
        self._parameters = list(master.masters.values())
        # one read of the device for all
        sizes = [parameter.detach().square().mean().sqrt() for parameter in self._parameters]
        self._sizes: list[float] = torch.stack(sizes).tolist()
        self._train, self._held_out = split_held_out(int(ranks.sum(len(hidden))))
        self._gradients, self._error = graphed(self._gradients_of, copies=False), graphed(self._error_of)

    def close(self) -> None:
        """Drop the graphs, whoever still refers to this object."""
        self._gradients.close()
        self._error.close()

    def tune(self, rounds: int, rates: Sequence[float]) -> TuningRecord:
        """Optimise the block and keep the round with the smallest held-out error.

        The first three blocks search the rate from that of the block before: the first round is run at rates a factor
        of two apart, as long as the held-out error falls. The others take the median of these three, and search only if
        their first round ends above its start.

        Args:
            rounds: Number of rounds.
            rates: Rates of the earlier blocks that the optimisation improved.

        Raises:
            ValueError: If the error is not finite before the first step.
        """
        start, before = self._copy(), self._held_out_error()
        if not before < float("inf"):
            raise ValueError(
                "Expected the pruned block to have a finite error on the held-out calibration samples, but got "
                f"{before}; calibrate on other samples, or use another method"
            )
        order = self._draw()

        def first_round(rate: float) -> _Trial:
            self._restore(start)
            trial = self._start(rate, rounds * len(self._train))
            self._round(trial, order)
            return trial

        searches = len(rates) < _NUM_SEARCHES
        rate = (rates[-1] if rates else _FIRST_RATE) if searches else statistics.median(rates[:_NUM_SEARCHES])
        trial = first_round(rate)
        if searches or not trial.error < before:
            trial = _search(first_round, trial, before)
        best, best_round, weights = before, 0, start
        for number in range(1, rounds + 1):
            if number == 1:
                self._restore(trial.weights)
            else:
                self._round(trial, self._draw())
            if trial.error < best:
                best, best_round, weights = trial.error, number, trial.weights
        self._restore(weights)
        trial.close()
        return TuningRecord(trial.rate, best_round, len(self._held_out), before, best)

    def _start(self, rate: float, num_steps: int) -> _Trial:
        rates = [rate * size for size in self._sizes]
        factors = [1 - number / num_steps for number in range(num_steps)]
        return _Trial(rate, make_optimizer(self._master, "adamw", rates, factors, self._ranks, self._kept))

    def _draw(self) -> list[int]:
        order = torch.randperm(len(self._train), generator=self._generator, device="cpu")
        return [self._train[index] for index in order.tolist()]

    def _round(self, trial: _Trial, order: Sequence[int]) -> None:
        """Take one step per sample, and measure the held-out error."""
        for sample in order:
            # on one rank only; the others add zeros
            for index in self._ranks.local_indices([sample]):
                trial.optimizer.take_gradients(
                    self._gradients(index, *self._sample(index)), self._targets[index].numel()
                )
            trial.optimizer.step()
        trial.error, trial.weights = self._held_out_error(), self._copy()

    def _sample(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self._hidden[index], self._targets[index], self._weights[index]

    def _gradients_of(self, index: int, states: Tensor, target: Tensor, weights: Tensor) -> list[Tensor | None]:
        # what a capture has left that failed
        self._master.clear_gradients()
        with torch.enable_grad():
            # in memory of its own: how a view of a batch is aligned may change the rounding of products
            output = self._run([index], states.clone())
            (relative_error(output, target, weights) * self._master.loss_scale(target.numel())).backward()
        return [weight.grad for weight in self._master.weights.values()]

    def _error_of(self, index: int, states: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        return relative_error(self._run([index], states), target, weights)

    def _held_out_error(self) -> float:
        """Mean error of the held-out samples over all ranks; infinity if it is not a number."""
        errors = []
        with self._constant_weights():
            for index in self._ranks.local_indices(self._held_out):
                errors.append(self._error(index, *self._sample(index)))
        total = self._ranks.sum(float(torch.stack(errors).double().sum()) if errors else 0.0)
        error = total / len(self._held_out)
        return error if error == error else float("inf")

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def _restore(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.detach().copy_(value)
        self._master.publish()


def _search(first_round: Callable[[float], _Trial], best: _Trial, before: float) -> _Trial:
    """Run the first round at twice the best rate or at half of it, as long as the error falls.

    Args:
        first_round: Runs the first round at a rate.
        best: The first trial.
        before: Error before the optimisation. A trial that ends above it says nothing but that its rate is too large.
    """
    start = best.rate
    for factor in (2.0, 0.5) if best.error < before else (0.5,):
        for _ in range(_MAX_DOUBLINGS):
            trial = first_round(best.rate * factor)
            if best.error < before and not trial.error < best.error:
                trial.close()
                break
            best.close()
            best = trial
        if best.rate > start:
            break
    return best
