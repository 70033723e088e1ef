"""Prune a model block by block: plain torch, any model whose blocks follow one another."""

import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wandazeta.models.blocks import call_block, find_blocks
from wandazeta.models.modes import evaluation_mode, frozen
from wandazeta.models.streaming import resident
from wandazeta.pruning.calibration import isolated_rng
from wandazeta.pruning.generate import find_writer, with_tokens, write_copies
from wandazeta.pruning.method.block import BlockPruner
from wandazeta.pruning.method.layers import prunable_layers, validate_layers
from wandazeta.pruning.options import PruneOptions
from wandazeta.pruning.records import BlockRecord, PruneReport
from wandazeta.pruning.samples import Batches, Samples, capture_samples, split_rows
from wandazeta.utilities.memory import peak_memory
from wandazeta.utilities.ranks import Ranks


@dataclass(frozen=True)
class BlockResult:
    """A finished block, all that is needed to go on after it.

    Args:
        weights: Pruned weights in the model's precision, on the CPU, by parameter name relative to the block
            (`mlp.up_proj.weight`).
        masks: True where a weight was kept; names and shapes as in `weights`.
        record: What was done.
    """

    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    record: BlockRecord


class Progress(Protocol):
    """Keeps finished blocks, so that a run that was killed goes on at the next one."""

    def load(self, block_index: int) -> BlockResult | None:
        """The finished block, or None if it has to be made; may be called more than once."""

    def save(self, block_index: int, result: BlockResult) -> None:
        """Keep a finished block."""

    def load_texts(self) -> list[Tensor] | None:
        """The samples that the model wrote, or None if they have to be written; tokens of shape (1, tokens)."""

    def save_texts(self, texts: Sequence[Tensor]) -> None:
        """Keep what the model wrote."""


class PruningInterrupted(Exception):  # noqa: N818 - a request that was granted, not an error
    """Pruning stopped because `should_stop` said so; every finished block was saved.

    Args:
        block_index: The last finished block.
    """

    def __init__(self, block_index: int) -> None:
        super().__init__(f"Pruning was interrupted after block {block_index}; start again to go on at the next block")
        self.block_index = block_index


# what is compiled does not see the hooks that collect statistics
@torch.compiler.set_stance("force_eager")
def prune_model(
    model: nn.Module,
    forward: Callable[[Any], object],
    batches: Sequence[Any],
    options: PruneOptions,
    *,
    block_name: str | None = None,
    token_mask: Callable[[Any], Tensor | None] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    on_block: Callable[[BlockRecord, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    ranks: Ranks | None = None,
) -> PruneReport:
    """Prune the blocks of a model in place, from the first to the last.

    Args:
        model: The model; its weights are replaced by the pruned ones.
        forward: Runs the real model on one batch; stopped by an exception after the last block.
        batches: Calibration batches; every row is one sample.
        options: What to prune and how.
        block_name: Dotted name of the list of blocks; found where it is not given.
        token_mask: Gives the positions of a batch, bool of shape (rows, tokens), that are not padding.
        device: Where the block at work and the hidden states are.
        progress: Keeps finished blocks; the ones that it has are not made again. Only rank 0's is used.
        on_block: Called after each block with its record and the number of blocks.
        should_stop: Asked after each block; it is enough that one rank's says so.
        ranks: Those that prune together, each with its share of the samples; all pass the same model and batches. By
            default this process prunes alone.

    Returns:
        The report.

    Raises:
        ValueError: If the model, the options or the calibration data do not fit; before any work.
        PruningInterrupted: If `should_stop` returned True before the last block.
    """
    device = torch.device(device)
    _warn_of_slow_bfloat16(device, options)
    ranks = ranks or Ranks()
    progress = progress if ranks.rank == 0 else None
    rows = [row for batch in batches for row in split_rows(batch)]
    # autograd is needed inside, whatever the caller is in
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        isolated_rng(options.seed),
        evaluation_mode(model.modules()),
        frozen(model),
    ):
        name, blocks = find_blocks(model, (lambda: forward(rows[0])) if rows else None, block_name)
        validate_layers(blocks, options, model=model, block_name=name)
        missing = ranks.broadcast_object(
            [i for i in range(len(blocks)) if progress is None or progress.load(i) is None]
        )
        samples = None
        if missing and options.uses_calibration:
            _check_samples(len(rows) * (1 + options.num_copies), options)
            if options.num_copies:
                rows = rows + _write_copies(model, blocks, rows, token_mask, options, device, progress, ranks)
            samples = capture_samples(blocks, forward, rows[ranks.rank :: ranks.size], token_mask, device)
        pruner = _Pruner(name, blocks, options, samples, device, max(missing, default=0), ranks)
        records = []
        for index in range(len(blocks)):
            if index in missing:
                result = pruner.prune(index)
                # on a full disk rank 0 would end alone, and the others would wait for it
                ranks.run_on_all(partial(_save, progress, index, result))
                record = result.record
            else:
                record = pruner.load(index, progress.load(index) if progress is not None else None)
            records.append(record)
            if on_block is not None:
                on_block(record, len(blocks))
            stops = should_stop is not None and should_stop()
            if index < len(blocks) - 1 and ranks.sum(float(stops)):
                raise PruningInterrupted(index)
    return PruneReport(options.to_dict(), name, tuple(records))


def _write_copies(
    model: nn.Module,
    blocks: nn.ModuleList,
    rows: Sequence[Any],
    token_mask: Callable[[Any], Tensor | None] | None,
    options: PruneOptions,
    device: torch.device,
    progress: Progress | None,
    ranks: Ranks,
) -> list[Any]:
    """Samples that rank 0 lets the model write, or wrote before it was stopped."""
    writer = find_writer(model, blocks)

    def write() -> list[Tensor]:
        known = progress.load_texts() if progress is not None else None
        if known is not None:
            return known
        masks = [token_mask(row) if token_mask is not None else None for row in rows]
        dtype = torch.bfloat16 if options.compute_dtype == "bfloat16" else None
        texts = write_copies(writer, rows, masks, options.num_copies, seed=options.seed, device=device, dtype=dtype)
        if progress is not None:
            progress.save_texts(texts)
        return texts

    texts = ranks.broadcast_object(ranks.run_on_all(lambda: write() if ranks.rank == 0 else []))
    return [with_tokens(rows[place % len(rows)], text) for place, text in enumerate(texts)]


def _save(progress: Progress | None, index: int, result: BlockResult) -> None:
    if progress is not None:
        progress.save(index, result)


class _Pruner:
    """What goes from block to block: the hidden states of the pruned model and, as a target, of the dense one."""

    def __init__(
        self,
        name: str,
        blocks: nn.ModuleList,
        options: PruneOptions,
        samples: Samples | None,
        device: torch.device,
        last_missing: int,
        ranks: Ranks,
    ) -> None:
        self.name = name
        self.blocks = blocks
        self.options = options
        self.samples = samples
        self.device = device
        self.last_missing = last_missing
        self.ranks = ranks
        keeps_stream = samples is not None and options.uses_optimisation and options.target == "dense_stream"
        self.stream = list(samples.hidden) if samples is not None and keeps_stream else None
        self._runs_together: dict[Hashable, bool] = {}

    def load(self, index: int, result: BlockResult | None) -> BlockRecord:
        """Take a finished block, which rank 0 has, and go on as if it had been made now."""
        with self._block(index) as layers:
            batches = self._batches(index) if index < self.last_missing else Batches(())
            shapes = {name: layer.weight.shape for name, layer in layers.items()}
            if result is not None and {name: weight.shape for name, weight in result.weights.items()} != shapes:
                raise ValueError(
                    f"Expected the finished `{self.name}.{index}` to hold {', '.join(layers)}, but it holds "
                    f"{', '.join(result.weights)}; remove the progress and start again"
                )
            if self.stream is not None and index < self.last_missing:
                # as the targets were made, beside the gradients: rows that share a product round otherwise
                apart = index == 0 and self.options.uses_gradients and layers
                self._forward(index, self.stream, batches.apart() if apart else batches)
            if result is not None:
                for name, layer in layers.items():
                    layer.weight.copy_(result.weights[name])
            self.ranks.broadcast_([layer.weight for layer in layers.values()])
            if self.samples is not None and index < self.last_missing:
                self._forward(index, self.samples.hidden, batches)
        record = self.ranks.broadcast_object(result.record if result is not None else None)
        assert record is not None
        return record

    def prune(self, index: int) -> BlockResult:
        """Prune a block, and move the hidden states on."""
        start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self._block(index) as layers:
            masks = self.samples.masks if self.samples is not None else ()
            run = partial(self._run, index)
            options = self.options.of_block(index, len(self.blocks))
            fixed = partial(self._fixed, index)
            work = BlockPruner(index, layers, options, run, fixed, self._batches(index), masks, self.ranks)
            if self.samples is None:
                kept, loss_after = work.prune(), None
            else:
                kept, loss_after = self._prune_calibrated(index, work, self.samples)
            weights = {name: layer.weight.detach().to("cpu", copy=True) for name, layer in layers.items()}
            record = BlockRecord(
                index,
                f"{self.name}.{index}",
                work.records(kept),
                work.loss_before,
                loss_after,
                seconds=time.perf_counter() - start,
                peak_memory=peak_memory(self.device),
                num_samples=int(self.ranks.sum(len(self.samples))) if self.samples is not None else 0,
                num_tokens=int(self.ranks.sum(self.samples.num_tokens)) if self.samples is not None else 0,
            )
        return BlockResult(weights, {name: mask.cpu() for name, mask in kept.items()}, record)

    def _prune_calibrated(
        self, index: int, work: BlockPruner, samples: Samples
    ) -> tuple[dict[str, Tensor], float | None]:
        if not work.layers:  # left dense
            for hidden in (samples.hidden, self.stream):
                if hidden is not None and index < self.last_missing:
                    self._forward(index, hidden, work.samples)
            return {}, None
        # at the first block the two streams are one
        shares = self.stream is None or index == 0
        targets = work.measure(samples.hidden, keep_outputs=shares and self.options.uses_optimisation)
        work.require_finite()
        if self.stream is not None:
            if not shares:
                self._forward(index, self.stream, work.samples)
                targets = self.stream
            self.stream = targets
        if self.options.uses_optimisation:
            kept = work.optimise(samples.hidden, targets)
        else:
            kept = work.solve() if self.options.method == "sparsegpt" else work.prune()
        # the ranks did the same arithmetic on the same sums; this makes them equal whatever their hardware
        self.ranks.broadcast_([layer.weight for layer in work.layers.values()])
        # the last block feeds no other: only the samples that the report looks at
        num_needed = len(samples) if index < self.last_missing else work.num_probes
        outputs = samples.hidden[:num_needed]
        self._forward(index, outputs, work.samples)
        samples.hidden[:num_needed] = outputs
        loss_after = work.mean_loss(outputs, targets)
        if work.loss_before is None:
            work.loss_before = loss_after
        return kept, loss_after

    def _batches(self, index: int) -> Batches:
        """Which samples the block can run together; tried once for each form of its other arguments."""
        if self.samples is None:
            return Batches(())
        batches = self.samples.batches(index)
        trial = next((batch[:2] for batch in batches.split(range(len(self.samples))) if len(batch) > 1), None)
        if trial is None:
            return batches
        form = self.samples.form(trial[0], index)
        if form not in self._runs_together:
            self._runs_together[form] = self._try_together(index, trial)
        return batches if self._runs_together[form] else batches.apart()

    def _try_together(self, index: int, trial: list[int]) -> bool:
        assert self.samples is not None
        hidden = [self.samples.hidden[sample] for sample in trial]
        alone = torch.cat([self._run(index, [sample], states) for sample, states in zip(trial, hidden, strict=True)])
        try:
            together = self._run(index, trial, torch.cat(hidden))
        except RuntimeError:
            return False  # an argument that is not broadcast over samples
        return bool((together - alone).norm() <= 1e-2 * alone.norm())

    def _run(self, index: int, batch: Sequence[int], hidden: Tensor) -> Tensor:
        assert self.samples is not None
        with self._autocast():
            return call_block(self.blocks[index], hidden, self.samples.calls[batch[0]][index])

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.options.compute_dtype == "model":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @contextmanager
    def _fixed(self, index: int) -> Iterator[None]:
        """While the block's weights stay as they are, autocast casts them once; it remembers trainable ones only."""
        autocasts = self.options.compute_dtype != "model"
        weights = self.blocks[index].parameters() if autocasts else ()
        frozen = [weight for weight in weights if weight.is_floating_point() and not weight.requires_grad]
        with self._autocast():
            try:
                for weight in frozen:
                    weight.requires_grad_(True)
                yield
            finally:
                for weight in frozen:
                    weight.requires_grad_(False)

    def _forward(self, index: int, hidden: list[Tensor], batches: Batches) -> None:
        with self._fixed(index):
            for batch in batches.split(range(len(hidden))):
                output = self._run(index, batch, torch.cat([hidden[sample] for sample in batch]))
                for sample, states in zip(batch, output.split(1), strict=True):
                    hidden[sample] = states

    @contextmanager
    def _block(self, index: int) -> Iterator[dict[str, nn.Linear]]:
        """One block on the device, its layers to prune."""
        block = self.blocks[index]
        with resident(block):
            home = next(block.parameters()).device
            block.to(self.device)
            try:
                yield prunable_layers(block, self.options, f"{self.name}.{index}")
            finally:
                block.to(home)


def _warn_of_slow_bfloat16(device: torch.device, options: PruneOptions) -> None:
    known = torch.cpu.get_capabilities()
    if options.compute_dtype != "bfloat16" or device.type != "cpu" or known.get("architecture") != "x86_64":
        return
    if not (known.get("avx512_bf16") or known.get("amx_bf16")):
        warnings.warn(
            "This CPU has no instructions for bfloat16, which takes several times as long as float32 on it; set "
            '`compute_dtype` to "model"',
            stacklevel=3,
        )


def _check_samples(num_samples: int, options: PruneOptions) -> None:
    if num_samples == 0:
        raise ValueError(f"Expected calibration samples for method={options.method!r}, but got none")
    if options.uses_optimisation and num_samples < options.samples_per_round:
        raise ValueError(
            f"Expected argument `samples_per_round` to be at most the number of calibration samples ({num_samples}), "
            f"but got {options.samples_per_round}; lower it or calibrate on more samples"
        )
