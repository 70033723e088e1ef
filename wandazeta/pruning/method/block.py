"""Prune one block: statistics, regional gradients, rounds of optimisation, and the final masks."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager

import torch
from torch import Tensor, nn

from wandazeta.models.experts import ExpertLayer
from wandazeta.pruning.method.layers import require_all_finite, weight_view
from wandazeta.pruning.method.masks import make_mask
from wandazeta.pruning.method.optimizer import MasterWeights
from wandazeta.pruning.method.regional import (
    RunBlock,
    optimisation_loss,
    optimise_block,
    regional_gradients,
)
from wandazeta.pruning.method.scores import magnitude_score
from wandazeta.pruning.method.sparsegpt import sparsegpt
from wandazeta.pruning.method.statistics import InputStatistics
from wandazeta.pruning.method.tuning import BlockTuner
from wandazeta.pruning.options import PruneOptions
from wandazeta.pruning.records import LayerRecord, TuningRecord
from wandazeta.pruning.samples import Batches
from wandazeta.utilities.graphs import Graphed
from wandazeta.utilities.ranks import Ranks

# samples whose mean loss is reported: enough to see the gain, at little cost
NUM_PROBES = 8


class BlockPruner:
    """Prunes the layers of one block in place.

    Args:
        index: Position of the block. It seeds the draws of samples, so that a resumed run draws the same.
        layers: The layers to prune, by the name of their weight.
        options: The options, with the pattern of this block.
        run: Runs the block on a batch of samples.
        constant_weights: Context for several runs without a change of the weights, which may then be cast once.
        batches: Groups samples that can run through the block together.
        masks: For each sample, which positions are no padding; None if all are.
        ranks: The ranks, among which the samples are distributed; all samples here belong to this rank.
        graphed: Makes functions of a sample that are captured as graphs.
        rates: Rates of the earlier blocks that the tuned optimisation improved.
    """

    def __init__(
        self,
        index: int,
        layers: Mapping[str, nn.Linear],
        options: PruneOptions,
        run: RunBlock,
        constant_weights: Callable[[], AbstractContextManager[None]],
        batches: Batches,
        masks: Sequence[Tensor | None],
        ranks: Ranks,
        graphed: Graphed,
        rates: Sequence[float] = (),
    ) -> None:
        self.index = index
        self.layers = dict(layers)
        self.method = options.method
        self.optimisation = options.method.active_optimisation
        self.pattern = options.pattern
        self.run = run
        self.constant_weights = constant_weights
        self.batches = batches
        self.masks = masks
        self.ranks = ranks
        self.graphed = graphed
        self.rates = rates
        self.num_probes = len(ranks.local_indices(range(NUM_PROBES)))
        self.statistics = InputStatistics(layers, with_gram=self.method.uses_gram)
        self.master = MasterWeights(layers)
        self.gradients: dict[str, Tensor] = {}
        # of the layers of experts, in the dense block
        self.expert_tokens: dict[str, int] = {}
        seed = hashlib.sha256(f"{options.seed}:{index}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(seed[:4], "big"))
        self.score_moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.loss_before: float | None = None
        self.tuning: TuningRecord | None = None

    def close(self) -> None:
        """Drop all tensors of the block, whoever still refers to this object."""
        self.statistics.close()
        self.master.close()
        for tensors in (self.layers, self.gradients, self.score_moments):
            tensors.clear()

    def measure(self, hidden: Sequence[Tensor], keep_outputs: bool) -> list[Tensor]:
        """Run the dense block to collect input statistics and, if the score uses them, regional gradients.

        Args:
            hidden: Input of the block for each sample.
            keep_outputs: Return the dense outputs of all samples, not only of those whose loss is reported.

        Returns:
            Dense outputs, from the first sample on.

        Raises:
            ValueError: If input norms or gradients are not finite.
        """
        if self.method.uses_gradients:
            outputs = self._measure_gradients(hidden, keep_outputs)
        else:
            outputs = self._measure_inputs(hidden, len(hidden) if keep_outputs else self.num_probes)
        experts = [name for name, layer in self.layers.items() if isinstance(layer, ExpertLayer)]
        self.expert_tokens = {name: self.statistics.num_tokens(name) for name in experts}
        self._require_finite()
        return outputs

    def _is_unreached(self, name: str) -> bool:
        """Whether a layer is that of an expert that no calibration token is routed to."""
        return self.expert_tokens.get(name) == 0

    def _measure_gradients(self, hidden: Sequence[Tensor], keep_outputs: bool) -> list[Tensor]:
        outputs: list[Tensor] = []

        def on_output(output: Tensor) -> None:
            if keep_outputs or len(outputs) < self.num_probes:
                outputs.extend(output.split(1))

        with self._trainable():
            self.gradients = regional_gradients(
                self.run, self.layers, hidden, self.masks, self.statistics, on_output, self.ranks, self.graphed
            )
        return outputs

    def _measure_inputs(self, hidden: Sequence[Tensor], num_outputs: int = 0) -> list[Tensor]:
        """Collect input statistics; returns the outputs of at least the first `num_outputs` samples."""
        outputs: list[Tensor] = []
        self.statistics.reset()
        with self.statistics.collect(), self.constant_weights():
            for batch in self.batches.split(range(len(hidden))):
                states = torch.cat([hidden[index] for index in batch])
                wanted = len(outputs) < num_outputs
                with self.statistics.sample(self.batches.mask(batch), len(batch), states.shape, may_stop=not wanted):
                    output = self.run(batch, states)
                    if wanted:
                        outputs.extend(output.split(1))
        self.statistics.all_reduce(self.ranks)
        return outputs

    def _require_finite(self) -> None:
        """Refuse statistics that are not finite; the weights were checked before the first block."""
        reached = [name for name in self.layers if not self._is_unreached(name)]
        values = [("inputs", name, self.statistics.norm(name)) for name in reached]
        values += [("gradients", name, gradient) for name, gradient in self.gradients.items()]
        require_all_finite(values, self.index)

    def finish(self, hidden: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Prune the block by its method, after `measure`.

        Args:
            hidden: Input of the block for each sample.
            targets: Target output for each sample; used if the block is optimised.

        Returns:
            Masks in the layout of the weights, True where a weight is kept.
        """
        if self.optimisation is not None:
            return self._optimise(hidden, targets)
        if self.method.tuning_rounds:
            return self._tune(hidden, targets)
        return self._solve() if self.method.uses_gram else self.mask_by_score()

    def mask_by_score(self) -> dict[str, Tensor]:
        """Score the current weights and set the lowest scores to zero.

        Returns:
            Masks in the layout of the weights, True where a weight is kept.
        """
        kept = {name: self._mask_of(name) for name in self.layers}
        self.master.apply_masks(kept)
        return kept

    def _mask_of(self, name: str) -> Tensor:
        score = self._score(name)
        self.score_moments[name] = _std_mean(score)
        return weight_view(self.layers[name], make_mask(score, self.pattern)).contiguous()

    def _solve(self) -> dict[str, Tensor]:
        """Prune by SparseGPT, which chooses masks and adjusts the other weights."""
        kept = {name: self._mask_of(name) for name in self.layers if self._is_unreached(name)}
        for gram, names in self.statistics.gram_groups():
            views = [weight_view(self.layers[name], self.master.masters[name].detach()) for name in names]
            for name, view, (solved, mask) in zip(names, views, sparsegpt(views, gram, self.pattern), strict=True):
                view.copy_(solved)
                self.score_moments[name] = _std_mean(self.method.score(solved))
                kept[name] = weight_view(self.layers[name], mask).contiguous()
        self.master.apply_masks(kept)
        return kept

    def _optimise(self, hidden: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
        assert self.optimisation is not None

        def prune() -> None:
            self.mask_by_score()
            if self.loss_before is None:
                self.loss_before = self._probe_loss(hidden, targets)

        with self._trainable():
            optimise_block(
                self.run,
                self.master,
                prune,
                hidden,
                targets,
                self.masks,
                self.statistics,
                self.optimisation,
                self.generator,
                self.ranks,
                self.graphed,
            )
        # the last steps moved pruned weights away from zero
        self._measure_inputs(hidden)
        return self.mask_by_score()

    def _tune(self, hidden: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
        kept = self._solve()
        self.loss_before = self._probe_loss(hidden, targets)
        tuner = BlockTuner(
            self.run,
            self.constant_weights,
            self.master,
            kept,
            hidden,
            targets,
            self.masks,
            self.generator,
            self.ranks,
            self.graphed,
        )
        with self._trainable(), closing(tuner):
            self.tuning = tuner.tune(self.method.tuning_rounds, self.rates)
        return kept

    def _probe_loss(self, hidden: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
        probes = range(min(self.num_probes, len(hidden)))
        return self.mean_loss([self.run([index], hidden[index]) for index in probes], targets)

    def mean_loss(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
        """Mean loss of the first outputs, over all ranks.

        Args:
            outputs: Outputs of the block, from the first sample on.
            targets: Target output for each sample.
        """
        pairs = zip(outputs[: self.num_probes], targets, self.masks, strict=False)
        found = [optimisation_loss(output, target, mask) for output, target, mask in pairs]
        losses: list[float] = torch.stack(found).tolist() if found else []
        return self.ranks.sum(sum(losses)) / self.ranks.sum(len(losses))

    def records(self, kept: Mapping[str, Tensor]) -> tuple[LayerRecord, ...]:
        """Return the record of each layer for the report.

        Args:
            kept: The final masks.
        """
        if not self.layers:
            return ()
        records = []
        # one read of the device for each kind of figure
        counts = torch.stack([kept[name].sum() for name in self.layers]).tolist()
        moments = torch.stack([torch.stack(self.score_moments[name]) for name in self.layers]).tolist()
        for (name, layer), count, (std, mean) in zip(self.layers.items(), counts, moments, strict=True):
            out_features, in_features = weight_view(layer).shape
            sparsity = 1 - count / kept[name].numel()
            tokens = (self.expert_tokens[name],) if name in self.expert_tokens else ()
            shape = (out_features, in_features)
            records.append(LayerRecord(name, shape, self.pattern.label, sparsity, mean, std, tokens))
        return tuple(records)

    @contextmanager
    def _trainable(self) -> Iterator[None]:
        for layer in self.layers.values():
            layer.weight.requires_grad_(True)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.weight.requires_grad_(False)
                layer.weight.grad = None

    def _score(self, name: str) -> Tensor:
        layer, gradient = self.layers[name], self.gradients.get(name)
        weight = weight_view(layer, self.master.masters[name].detach())
        if self._is_unreached(name):
            return magnitude_score(weight)
        return self.method.score(
            weight,
            self.statistics.norm(name) if self.method.uses_calibration else None,
            None if gradient is None else weight_view(layer, gradient),
        )


def _std_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Like `torch.std_mean` without correction, which is ten times slower on a CPU."""
    mean = values.mean()
    return torch.linalg.vector_norm(values - mean) / values.numel() ** 0.5, mean
