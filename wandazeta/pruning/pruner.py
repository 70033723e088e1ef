"""Execute a prepared pruning: block by block, in plain torch."""

import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wandazeta.models.attention import differentiable_attention
from wandazeta.models.blocks import call_block
from wandazeta.models.experts import fused_name, split_experts
from wandazeta.models.modes import evaluation_mode, frozen
from wandazeta.models.placement import BlockPlacement
from wandazeta.pruning.calibration import check_shares
from wandazeta.pruning.method.block import BlockPruner
from wandazeta.pruning.method.layers import PrunableWeight, prunable_layers, prunable_weights, require_all_finite
from wandazeta.pruning.options import PruneOptions
from wandazeta.pruning.records import BlockRecord, LayerRecord, PruneReport
from wandazeta.pruning.samples import Batches, Samples, capture_samples
from wandazeta.utilities.background import BackgroundThread
from wandazeta.utilities.graphs import GraphedCall, graph_backend
from wandazeta.utilities.host_memory import HostCopies, pack_mask, unpack_mask
from wandazeta.utilities.memory import peak_memory
from wandazeta.utilities.ranks import Ranks
from wandazeta.utilities.rng import isolated_rng


@dataclass(frozen=True)
class PreparedPruning:
    """A pruning with its blocks and calibration samples, found and checked; `prune_blocks` executes it.

    Args:
        model: The model.
        block_name: Dotted name of the list of blocks.
        blocks: The blocks, in the order in which they run.
        options: The options, with all defaults filled in.
        rows: Calibration samples, each a batch of one row; none if the method uses no calibration data.
        forward: Runs the model on one row.
        token_mask: Returns the positions of a row, bool of shape (1, tokens), that are no padding; None if all are.
    """

    model: nn.Module
    block_name: str
    blocks: nn.ModuleList
    options: PruneOptions
    rows: Sequence[Any]
    forward: Callable[[Any], object]
    token_mask: Callable[[Any], Tensor | None] | None = None


@dataclass(frozen=True)
class BlockResult:
    """A finished block.

    Args:
        weights: Pruned weights in the model's precision, by parameter name relative to the block, such as
            `mlp.up_proj.weight`.
        masks: True where a weight was kept; names and shapes as in `weights`.
        record: The report's record of the block.
    """

    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    record: BlockRecord


class Progress(Protocol):
    """Storage of finished blocks, from which an interrupted pruning continues."""

    def num_saved(self) -> int:
        """Number of blocks that seem to be saved, from the first on, without reading them."""

    def load(self, block_index: int) -> BlockResult | None:
        """Return a finished block, or None if it is missing or damaged.

        Args:
            block_index: Position of the block.
        """

    def save(self, block_index: int, result: BlockResult) -> None:
        """Save a finished block; called in a thread of its own while the next block is pruned.

        Args:
            block_index: Position of the block.
            result: The block, on the CPU; the next one overwrites its tensors.
        """


class PruningInterrupted(Exception):  # noqa: N818 - a request that was granted, not an error
    """Raised when pruning stopped because `should_stop` returned True; every finished block was saved.

    Args:
        block_index: Position of the last finished block.
    """

    def __init__(self, block_index: int) -> None:
        super().__init__(f"Pruning was interrupted after block {block_index}; start again to go on at the next block")
        self.block_index = block_index


# compiled code does not call the hooks that collect statistics
@torch.compiler.set_stance("force_eager")
def prune_blocks(
    prepared: PreparedPruning,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    on_block: Callable[[BlockRecord, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    ranks: Ranks | None = None,
) -> PruneReport:
    """Prune the blocks of a model in place, from the first to the last.

    Args:
        prepared: The pruning.
        device: Device of the current block and of the hidden states.
        progress: Storage of finished blocks, of which the first ones are loaded instead of pruned. Only rank 0 uses it.
        on_block: Called after each block with its record and the number of blocks. The block is saved while the next
            one is pruned; whatever ends this function waits for that.
        should_stop: Called after each block; returns whether to stop. One rank is enough to stop all.
        ranks: The ranks, among which the samples are distributed; all pass the same pruning. By default one.

    Returns:
        The report.

    Raises:
        ValueError: If the model or the calibration data do not fit.
        PruningInterrupted: If `should_stop` returned True before the last block.
        OSError: If a block cannot be saved, for example on a full disk; noticed at the end of the next block.
    """
    device, options, num_blocks = torch.device(device), prepared.options, len(prepared.blocks)
    _warn_of_slow_bfloat16(device, options)
    ranks = ranks or Ranks()
    progress = progress if ranks.rank == 0 else None
    with (
        # gradients are needed inside, even if the caller is in inference mode
        torch.inference_mode(False),
        torch.no_grad(),
        isolated_rng(options.seed),
        evaluation_mode(prepared.model.modules()),
        frozen(prepared.model),
        BackgroundThread(device) as reader,
        BackgroundThread(device) as writer,
    ):
        is_complete = ranks.broadcast_object(_is_complete(progress, num_blocks))
        samples = None
        if options.method.uses_calibration and not is_complete:
            check_shares(len(prepared.rows), ranks.size)
            rows = prepared.rows[ranks.rank :: ranks.size]
            samples = capture_samples(prepared.blocks, prepared.forward, rows, prepared.token_mask, device)
        sequence = _BlockSequence(prepared, samples, device, ranks, reader)
        copies = HostCopies(device)
        records: list[BlockRecord] = []
        num_saved = progress.num_saved() if progress is not None else 0
        loading = True
        for index in range(num_blocks):
            # blocks after one that is missing were made from it, so they are made again, too
            found = progress.load(index) if progress is not None and loading and index < num_saved else None
            record = ranks.broadcast_object(found.record if found is not None else None) if loading else None
            loading = record is not None
            if record is not None:
                sequence.replay(index, record, found)
            else:
                result, homes = sequence.prune(index)
                record = result.record
                # if the disk of rank 0 is full, no rank may wait for it at the next block
                ranks.run_on_all(writer.wait)
                if progress is not None or homes:
                    # a bool takes a byte
                    finish_copy = _start_copy(result, copies, packs=device.type == "cuda")
                    writer.submit(partial(_keep, progress, index, finish_copy, homes))
                del result, homes
            records.append(record)
            if on_block is not None:
                on_block(record, num_blocks)
            stops = should_stop is not None and should_stop()
            if index < num_blocks - 1 and ranks.sum(float(stops)):
                ranks.run_on_all(writer.wait)
                raise PruningInterrupted(index)
        ranks.run_on_all(writer.wait)
    return PruneReport(options.to_dict(), prepared.block_name, tuple(records))


def _is_complete(progress: Progress | None, num_blocks: int) -> bool:
    """Whether every block can be loaded; reads the blocks only if all seem to be there."""
    if progress is None or progress.num_saved() < num_blocks:
        return False
    return all(progress.load(index) is not None for index in range(num_blocks))


def _start_copy(result: BlockResult, copies: HostCopies, packs: bool) -> Callable[[], BlockResult]:
    """Start to copy a finished block to the CPU.

    Args:
        result: The block.
        copies: Makes the copies.
        packs: Copy the masks with eight values a byte.

    Returns:
        A function that waits until the copy is complete and returns it, in any thread.
    """
    weights = {("weight", name): weight for name, weight in result.weights.items()}
    masks = {("mask", name): pack_mask(mask) if packs else mask for name, mask in result.masks.items()}
    shapes = {name: mask.shape for name, mask in result.masks.items()}
    copied, wait = copies.start(weights | masks)
    record = result.record

    def finish() -> BlockResult:
        wait()
        of_kind = {kind: {name: t for (k, name), t in copied.items() if k == kind} for kind in ("weight", "mask")}
        if packs:
            of_kind["mask"] = {name: unpack_mask(mask, shapes[name]) for name, mask in of_kind["mask"].items()}
        return BlockResult(of_kind["weight"], of_kind["mask"], record)

    return finish


def _keep(
    progress: Progress | None, index: int, finish_copy: Callable[[], BlockResult], homes: Mapping[str, Tensor]
) -> None:
    """Write a finished block to the weights of the model that are not on the device, and to the progress."""
    result = finish_copy()
    for name, home in homes.items():
        home.copy_(result.weights[name])
    if progress is not None:
        progress.save(index, result)


class _BlockSequence:
    """Runs the blocks one after another, with the state that goes from block to block.

    The state is the hidden states of the pruned model and, for the tuned optimisation, those of the dense model.

    Args:
        prepared: The pruning.
        samples: The calibration samples of this rank at the first block; None if no block has to be run.
        device: Device of the current block.
        ranks: The ranks.
        reader: Reads the next block.
    """

    def __init__(
        self,
        prepared: PreparedPruning,
        samples: Samples | None,
        device: torch.device,
        ranks: Ranks,
        reader: BackgroundThread,
    ) -> None:
        self.name = prepared.block_name
        self.blocks = prepared.blocks
        self.options = prepared.options
        self.samples = samples
        self.device = device
        self.ranks = ranks
        self._placement = BlockPlacement(prepared.blocks, device, reader)
        self.dense_stream = list(samples.hidden) if samples is not None and self.options.method.tuning_rounds else None
        # for the forward and backward passes of regional gradients and of each step, and the held-out errors: all other
        # forward passes run in batches, which keep a GPU busy. A graph is captured anew for every block. Graphs that
        # all blocks share would need their weights, masters and statistics at common addresses, and blocks that are
        # known to be alike, and would save little: a capture costs about as much as two calls, of dozens to hundreds
        self.graph_backend = graph_backend(device)
        # of the blocks that the tuned optimisation improved
        self.rates: list[float] = []
        self._is_batchable: dict[Hashable, bool] = {}

    def replay(self, index: int, record: BlockRecord, result: BlockResult | None) -> None:
        """Load a finished block and move the hidden states on, exactly as when it was pruned.

        Args:
            index: Position of the block.
            record: Its record.
            result: The block; None on ranks other than 0.

        Raises:
            ValueError: If it is a block of another model.
        """
        self._note_rate(record)
        with self._block(index) as (weights, homes):
            self.ranks.run_on_all(partial(self._check_result, index, weights, result))
            feeds_next = self.samples is not None and index < len(self.blocks) - 1
            batches = self._batches(index) if feeds_next else Batches(())
            if self.dense_stream is not None and feeds_next:
                self._forward(index, self.dense_stream, batches)
            if result is not None:
                for name, weight in weights.items():
                    weight.parameter.copy_(result.weights[name])
            self.ranks.broadcast_([weight.parameter for weight in weights.values()])
            for name, home in homes.items():
                home.copy_(weights[name].parameter)
            if self.samples is not None and feeds_next:
                self._forward(index, self.samples.hidden, batches)

    def _note_rate(self, record: BlockRecord) -> None:
        if record.tuning is not None and record.tuning.rounds:
            self.rates.append(record.tuning.rate)

    def _check_result(self, index: int, weights: dict[str, PrunableWeight], result: BlockResult | None) -> None:
        shapes = {name: weight.parameter.shape for name, weight in weights.items()}
        if result is not None and {name: weight.shape for name, weight in result.weights.items()} != shapes:
            raise ValueError(
                f"Expected the finished `{self.name}.{index}` to hold {', '.join(weights)}, but it holds "
                f"{', '.join(result.weights)}; remove the progress and start again"
            )

    def prune(self, index: int) -> tuple[BlockResult, dict[str, Tensor]]:
        """Prune a block and move the hidden states on.

        Args:
            index: Position of the block.

        Returns:
            The block, on the device; and weights of the model by name that are in memory elsewhere, still dense.
        """
        start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self._block(index) as (prunable, homes), ExitStack() as stack:
            block = BlockPruner(
                index,
                prunable_layers(self.blocks[index], self.options.exclude_modules, f"{self.name}.{index}"),
                replace(self.options, pattern=self.options.pattern.of_block(index, len(self.blocks))),
                partial(self._run, index),
                partial(self._constant_weights, index),
                self._batches(index),
                self.samples.masks if self.samples is not None else (),
                self.ranks,
                partial(GraphedCall, keys=self._keys(index), backend=self.graph_backend),
                self.rates,
            )
            stack.callback(block.close)
            if self.samples is None:
                kept, loss_after = block.mask_by_score(), None
            else:
                kept, loss_after = self._prune_calibrated(index, block, self.samples)
            weights = {name: weight.parameter.detach() for name, weight in prunable.items()}
            require_all_finite([("pruned weights", name, weight) for name, weight in weights.items()], index)
            masks, layer_records = _by_parameter(kept, block.records(kept), prunable)
            record = BlockRecord(
                index,
                f"{self.name}.{index}",
                layer_records,
                block.loss_before,
                loss_after,
                seconds=time.perf_counter() - start,
                peak_memory=peak_memory(self.device),
                num_samples=int(self.ranks.sum(len(self.samples))) if self.samples is not None else 0,
                num_tokens=int(self.ranks.sum(self.samples.num_tokens)) if self.samples is not None else 0,
                tuning=block.tuning,
            )
        self._note_rate(record)
        return BlockResult(weights, masks, record), homes

    def _prune_calibrated(
        self, index: int, block: BlockPruner, samples: Samples
    ) -> tuple[dict[str, Tensor], float | None]:
        """Prune a block with calibration data; returns the masks and the loss afterwards."""
        is_last = index == len(self.blocks) - 1
        if not block.layers:  # excluded
            for hidden in (samples.hidden, self.dense_stream):
                if hidden is not None and not is_last:
                    self._forward(index, hidden, block.batches)
            return {}, None
        # at the first block, pruned and dense model have the same hidden states
        starts_stream = self.dense_stream is not None and index == 0
        targets = block.measure(samples.hidden, keep_outputs=starts_stream or block.optimisation is not None)
        if self.dense_stream is not None:
            if not starts_stream:
                self._forward(index, self.dense_stream, block.batches)
                targets = self.dense_stream
            self.dense_stream = targets
        kept = block.finish(samples.hidden, targets)
        # all ranks did the same arithmetic on the same sums; the broadcast makes them equal on different hardware, too
        self.ranks.broadcast_([layer.weight for layer in block.layers.values()])
        # behind the last block only the samples whose loss is reported are needed
        num_needed = block.num_probes if is_last else len(samples)
        outputs = samples.hidden[:num_needed]
        self._forward(index, outputs, block.batches)
        samples.hidden[:num_needed] = outputs
        loss_after = block.mean_loss(outputs, targets)
        if block.loss_before is None:
            block.loss_before = loss_after
        return kept, loss_after

    def _keys(self, index: int) -> list[Hashable]:
        return self.samples.keys(index) if self.samples is not None else []

    def _batches(self, index: int) -> Batches:
        """Group the samples that can run through a block together; tried once for each signature of its calls."""
        if self.samples is None:
            return Batches(())
        batches = self.samples.batches(index)
        trial = next((batch[:2] for batch in batches.split(range(len(self.samples))) if len(batch) > 1), None)
        if trial is None:
            return batches
        signature = self.samples.call_signature(trial[0], index)
        if signature not in self._is_batchable:
            self._is_batchable[signature] = self._try_batch(index, trial)
        return batches if self._is_batchable[signature] else batches.one_by_one()

    def _try_batch(self, index: int, trial: list[int]) -> bool:
        """Whether two samples have the same outputs in one batch as one by one."""
        assert self.samples is not None
        hidden = [self.samples.hidden[sample] for sample in trial]
        alone = torch.cat([self._run(index, [sample], states) for sample, states in zip(trial, hidden, strict=True)])
        try:
            batched = self._run(index, trial, torch.cat(hidden))
        except RuntimeError:
            return False  # an argument does not broadcast over samples
        return bool((batched - alone).norm() <= 1e-2 * alone.norm())

    def _run(self, index: int, batch: Sequence[int], hidden: Tensor) -> Tensor:
        assert self.samples is not None
        with self._autocast(), differentiable_attention(hidden.device, hidden.shape[1] if hidden.ndim > 2 else None):
            return call_block(self.blocks[index], hidden, self.samples.calls[batch[0]][index])

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.options.compute_dtype == "model":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @contextmanager
    def _constant_weights(self, index: int) -> Iterator[None]:
        """Let autocast cast the weights of a block once for all forwards inside; it caches only trainable weights."""
        autocasts = self.options.compute_dtype != "model"
        weights = self.blocks[index].parameters() if autocasts else ()
        frozen_weights = [weight for weight in weights if weight.is_floating_point() and not weight.requires_grad]
        with self._autocast():
            try:
                for weight in frozen_weights:
                    weight.requires_grad_(True)
                yield
            finally:
                for weight in frozen_weights:
                    weight.requires_grad_(False)

    def _forward(self, index: int, hidden: list[Tensor], batches: Batches) -> None:
        """Replace hidden states by the outputs of a block."""
        with self._constant_weights(index):
            for batch in batches.split(range(len(hidden))):
                output = self._run(index, batch, torch.cat([hidden[sample] for sample in batch]))
                for sample, states in zip(batch, output.split(1), strict=True):
                    hidden[sample] = states

    @contextmanager
    def _block(self, index: int) -> Iterator[tuple[dict[str, PrunableWeight], dict[str, Tensor]]]:
        """Put a block on the device inside the context, and split its experts.

        Yields:
            Its weights to prune; and those of the model that are in memory elsewhere, by the same names.
        """
        with self._placement.on_device(index) as homes:
            weights = prunable_weights(self.blocks[index], self.options.exclude_modules, f"{self.name}.{index}")
            with split_experts(weight.module for weight in weights.values()):
                yield weights, {name: homes[name] for name in weights if name in homes}


def _by_parameter(
    masks: Mapping[str, Tensor], records: Sequence[LayerRecord], weights: Mapping[str, PrunableWeight]
) -> tuple[dict[str, Tensor], tuple[LayerRecord, ...]]:
    """Join the masks and the records of layers whose weights are slices of one parameter."""
    groups: dict[str, list[LayerRecord]] = {}
    for record in records:
        groups.setdefault(fused_name(record.name), []).append(record)
    joined, joined_records = {}, []
    for name, group in groups.items():
        fused = weights[name].is_fused
        joined[name] = torch.stack([masks[record.name] for record in group]) if fused else masks[name]
        joined_records.append(LayerRecord.fused(name, group) if fused else group[0])
    return joined, tuple(joined_records)


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
