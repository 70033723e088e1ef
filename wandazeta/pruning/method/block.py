"""All that happens to one block: statistics, regional gradients, rounds of optimisation, the final pruning."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from wandazeta.pruning.method.layers import weight_view
from wandazeta.pruning.method.masks import make_mask
from wandazeta.pruning.method.regional import (
    MasterWeights,
    RunBlock,
    optimisation_loss,
    optimise_block,
    regional_gradients,
)
from wandazeta.pruning.method.scores import magnitude_score, regional_score
from wandazeta.pruning.method.sparsegpt import sparsegpt
from wandazeta.pruning.method.statistics import InputStatistics
from wandazeta.pruning.options import PruneOptions
from wandazeta.pruning.records import LayerRecord
from wandazeta.pruning.samples import Batches
from wandazeta.utilities.ranks import Ranks

# the report's losses are means over the first samples: enough to see the gain, next to no cost
NUM_PROBES = 8


class BlockPruner:
    """Prunes one block in place.

    Args:
        index: Position of the block; decides its draws of samples, so that a resumed run draws the same.
        layers: The layers to prune, by the name of their weight.
        options: The options.
        run: Runs the block on a batch of samples.
        fixed: Within it, the weights stay as they are: what the runs make of them is kept.
        samples: Which samples it can run together.
        masks: Positions that count, for each sample.
        ranks: Those that the samples are shared out to; all samples here are this rank's.
    """

    def __init__(
        self,
        index: int,
        layers: Mapping[str, nn.Linear],
        options: PruneOptions,
        run: RunBlock,
        fixed: Callable[[], AbstractContextManager[None]],
        samples: Batches,
        masks: Sequence[Tensor | None],
        ranks: Ranks,
    ) -> None:
        self.index = index
        self.layers = dict(layers)
        self.options = options
        self.run = run
        self.fixed = fixed
        self.samples = samples
        self.masks = masks
        self.ranks = ranks
        self.num_probes = len(ranks.local_indices(range(NUM_PROBES)))
        self.statistics = InputStatistics(layers, with_gram=options.uses_gram)
        self.master = MasterWeights(layers, keep_pruned=options.keeps_pruned)
        self.gradients: dict[str, Tensor] = {}
        seed = hashlib.sha256(f"{options.seed}:{index}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(seed[:4], "big"))
        self.score_moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.loss_before: float | None = None

    def measure(self, hidden: Sequence[Tensor], keep_outputs: bool) -> list[Tensor]:
        """Take input statistics and, where the score wants them, regional gradients of the dense block.

        Args:
            hidden: The block's input for each sample.
            keep_outputs: Keep the dense outputs of all samples, not only of those that the report looks at.

        Returns:
            The dense outputs that are kept, from the first sample on.
        """
        if not self.options.uses_gradients:
            return self._measure_inputs(hidden, len(hidden) if keep_outputs else self.num_probes)
        outputs: list[Tensor] = []

        def on_output(output: Tensor) -> None:
            if keep_outputs or len(outputs) < self.num_probes:
                outputs.extend(output.split(1))

        with self._trainable():
            self.gradients = regional_gradients(
                self.run, self.layers, hidden, self.masks, self.statistics, on_output, self.ranks
            )
        return outputs

    def _measure_inputs(self, hidden: Sequence[Tensor], num_outputs: int = 0) -> list[Tensor]:
        """Takes the statistics; the outputs of at least the first `num_outputs` samples come back."""
        outputs: list[Tensor] = []
        self.statistics.reset()
        with self.statistics.collect(), self.fixed():
            for batch in self.samples.split(range(len(hidden))):
                states = torch.cat([hidden[index] for index in batch])
                wanted = len(outputs) < num_outputs
                with self.statistics.sample(self.samples.mask(batch), len(batch), states.shape, may_stop=not wanted):
                    output = self.run(batch, states)
                    if wanted:
                        outputs.extend(output.split(1))
        self.statistics.share(self.ranks)
        return outputs

    def require_finite(self) -> None:
        """Refuse what scores cannot be made of: a comparison with NaN would prune whole rows, or at random.

        Raises:
            ValueError: If weights, input norms or gradients are infinite or no numbers.
        """
        for name, layer in self.layers.items():
            values = {"weights": layer.weight, "inputs": self.statistics.norm(name)}
            if name in self.gradients:
                values["gradients"] = self.gradients[name]
            for what, tensor in values.items():
                if not bool(tensor.detach().isfinite().all()):
                    raise ValueError(
                        f"Expected finite {what} of `{name}` in block {self.index}, but got infinities or NaN in "
                        f"{str(layer.weight.dtype).removeprefix('torch.')}; check the model, and give one that "
                        "overflows float16 in bfloat16 or float32"
                    )

    def prune(self) -> dict[str, Tensor]:
        """Set the lowest scores of the block as it is to zero.

        Returns:
            Masks in the layout of the weights.
        """
        kept = {}
        for name in self.layers:
            score = self._score(name)
            self.score_moments[name] = _std_mean(score)
            kept[name] = self._in_layout(name, make_mask(score, self.options))
        self.master.apply_masks(kept)
        return kept

    def solve(self) -> dict[str, Tensor]:
        """Prune the block as it is by SparseGPT.

        Returns:
            Masks in the layout of the weights.
        """
        kept = {}
        for gram, names in self.statistics.groups():
            views = [weight_view(self.layers[name], self.master.masters[name].detach()) for name in names]
            for name, view, (solved, mask) in zip(names, views, sparsegpt(views, gram, self.options), strict=True):
                # what the masters keep of the pruned weights is not part of the solution
                view.copy_(torch.where(mask, solved, view))
                self.score_moments[name] = _std_mean(solved.abs())
                kept[name] = self._in_layout(name, mask)
        self.master.apply_masks(kept)
        return kept

    def optimise(self, hidden: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Regional optimisation; afterwards the block is pruned.

        Args:
            hidden: The block's input for each sample.
            targets: The wanted output for each sample.

        Returns:
            Masks in the layout of the weights.
        """
        kept: dict[str, Tensor] = {}

        def prune(number: int) -> dict[str, Tensor]:
            kept.update(self.solve() if number == 0 and self.options.start == "sparsegpt" else self.prune())
            if number == 0:
                self.statistics.leave_out_grams()  # the rounds look at norms alone
                self.loss_before = self.probe_loss(hidden, targets)
            return kept

        with self._trainable():
            optimise_block(
                self.run,
                self.master,
                prune,
                hidden,
                targets,
                self.samples,
                self.statistics,
                self.options,
                self.generator,
                self.ranks,
            )
        if self.options.mask_mode != "free":
            return kept  # what the last steps were made with
        self._measure_inputs(hidden)
        return self.prune()

    def probe_loss(self, hidden: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
        """Mean loss of the block as it is over the first samples."""
        probes = range(min(self.num_probes, len(hidden)))
        return self.mean_loss([self.run([index], hidden[index]) for index in probes], targets)

    def mean_loss(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
        """Mean loss of the first outputs, over all ranks."""
        pairs = zip(outputs[: self.num_probes], targets, self.masks, strict=False)
        losses = [optimisation_loss(output, target, mask).item() for output, target, mask in pairs]
        return self.ranks.sum(sum(losses)) / self.ranks.sum(len(losses))

    def records(self, kept: Mapping[str, Tensor]) -> tuple[LayerRecord, ...]:
        """What to report of each layer.

        Args:
            kept: The final masks.
        """
        records = []
        for name, layer in self.layers.items():
            out_features, in_features = weight_view(layer).shape
            sparsity = 1 - kept[name].sum().item() / kept[name].numel()
            std, mean = (value.item() for value in self.score_moments[name])
            pattern = self.options.pattern_label
            records.append(LayerRecord(name, (out_features, in_features), pattern, sparsity, mean, std))
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
        layer = self.layers[name]
        weight = weight_view(layer, self.master.masters[name].detach())
        if not self.options.uses_calibration:
            return magnitude_score(weight)
        gradient = self.gradients.get(name)
        gradient = None if gradient is None else weight_view(layer, gradient)
        return regional_score(weight, self.statistics.norm(name), gradient, self.options.alpha)

    def _in_layout(self, name: str, mask: Tensor) -> Tensor:
        return weight_view(self.layers[name], mask).contiguous()


def _std_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """As `torch.std_mean` without correction, which is ten times slower on a CPU."""
    mean = values.mean()
    return torch.linalg.vector_norm(values - mean) / values.numel() ** 0.5, mean
