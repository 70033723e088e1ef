"""The life cycle of a pruning: check, prepare, key, prune or resume or load, report."""

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.models.blocks import StopForward, block_lists, find_blocks, run_until_stopped
from wandazeta.models.modes import evaluation_mode, frozen
from wandazeta.models.streaming import is_file_backed
from wandazeta.pruning.calibration import DEFAULT_NUM_SAMPLES, check_lengths, collect_rows, split_rows
from wandazeta.pruning.method.layers import check_layers_run, validate_layers
from wandazeta.pruning.options import PruneOptions
from wandazeta.pruning.progress.folder import ProgressFolder
from wandazeta.pruning.progress.key import PruneKey, digest_batches, digest_model
from wandazeta.pruning.pruner import PreparedPruning, Progress, PruningInterrupted, prune_blocks
from wandazeta.pruning.records import BlockRecord, PruneReport
from wandazeta.utilities.ranks import Ranks
from wandazeta.utilities.rng import isolated_rng
from wandazeta.version import __version__

_logger = logging.getLogger(__name__)
_ARCHITECTURE = "(architecture)"
# attributes that do not change what blocks compute, and how a transformers model was loaded
_PASSING = frozenset(
    {
        "training",
        "forward",
        "gradient_checkpointing",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "name_or_path",
        "num_labels",
        "id2label",
        "label2id",
        "problem_type",
    }
)


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
    """Find the blocks of a model and prune them in place, without a folder.

    Args:
        model: The model; its weights are replaced by the pruned ones.
        forward: Runs the model on one batch; it is stopped after the last block.
        batches: Calibration batches; every row is one sample.
        options: The pruning options.
        block_name: Dotted name of the list of blocks; found by default.
        token_mask: Returns the positions of a batch, bool of shape (rows, tokens), that are no padding.
        device: See `prune_blocks`.
        progress: See `prune_blocks`.
        on_block: See `prune_blocks`.
        should_stop: See `prune_blocks`.
        ranks: See `prune_blocks`.

    Returns:
        The report.

    Raises:
        ValueError: If the model, the options or the calibration data do not fit; before any work.
        PruningInterrupted: If `should_stop` returned True before the last block.
    """
    ranks = ranks or Ranks()
    rows = [row for batch in batches for row in split_rows(batch)]
    check_lengths(model, rows)
    with torch.inference_mode(False), isolated_rng(options.seed), evaluation_mode(model.modules()), frozen(model):
        name, blocks = _find_and_check_blocks(model, options, (lambda: forward(rows[0])) if rows else None, block_name)
    if rows or not ranks.broadcast_object(progress is not None and progress.num_saved() >= len(blocks)):
        options = options.for_samples(len(rows))
    prepared = PreparedPruning(model, name, blocks, options, rows, forward, token_mask)
    return prune_blocks(
        prepared, device=device, progress=progress, on_block=on_block, should_stop=should_stop, ranks=ranks
    )


def _find_and_check_blocks(
    model: nn.Module,
    options: PruneOptions,
    forward: Callable[[], object] | None,
    name: str | None,
    try_forward: Callable[[], object] | None = None,
) -> tuple[str, nn.ModuleList]:
    name, blocks = find_blocks(model, forward, name)
    validate_layers(blocks, options, model=model, block_name=name, forward=forward or try_forward)
    return name, blocks


@dataclass
class PruningSession:
    """One pruning of a module with a folder that keeps it: made, continued, or loaded.

    Args:
        module: The module that is pruned in place, or that holds the model.
        options: The pruning options; those that depend on the number of samples are filled in.
        folder: Folder of the pruning.
        forward: Runs the model on one batch.
        token_mask: Returns the positions of a batch, bool of shape (rows, tokens), that are no padding; None if all
            are.
        num_samples: Number of calibration samples; None for `DEFAULT_NUM_SAMPLES`, or all if there are fewer.
        block_name: Dotted name of the list of blocks in `module`; found by default.
        num_blocks: Number of blocks to prune, from the first on; all by default. All are checked.
    """

    module: nn.Module
    options: PruneOptions
    folder: ProgressFolder
    forward: Callable[[Any], object]
    token_mask: Callable[[Any], Tensor | None]
    num_samples: int | None
    block_name: str | None = None
    num_blocks: int | None = None
    was_complete: bool = field(default=False, init=False)
    """Whether `run` loaded a complete pruning."""
    key_digest: str = field(default="", init=False)
    """Hash that identifies the pruning, once it is begun or loaded."""

    def run(
        self,
        loader: Callable[[], Iterable[Any]],
        *,
        device: torch.device,
        ranks: Ranks,
        should_stop: Callable[[], bool],
        show_progress: bool,
    ) -> PruneReport | None:
        """Prune the module, continue an interrupted pruning, or load a complete one.

        Args:
            loader: Makes the calibration loader; called after the checks that need no data.
            device: Device of the current block.
            ranks: The ranks; only rank 0 reads and writes the folder.
            should_stop: Called after each block; returns whether to stop.
            show_progress: Draw a progress bar.

        Returns:
            The report, or None if `should_stop` stopped the pruning on any rank.

        Raises:
            ValueError: If anything does not fit on any rank, before any long work.
        """
        prepared, key = ranks.run_on_all(lambda: self._prepare(loader, device, ranks))
        expected = ranks.broadcast_object(key)
        ranks.run_on_all(lambda: _require_same(key, expected))
        ranks.run_on_all(lambda: self.folder.open(key) if ranks.rank == 0 else None)
        self.key_digest = ranks.broadcast_object(self.folder.key_digest)
        report = ranks.broadcast_object(self._load(prepared.blocks) if ranks.rank == 0 else None)
        if report is not None:
            self.was_complete = True
            for block, record in zip(prepared.blocks, report.blocks, strict=True):
                parameters = dict(block.named_parameters())
                weights = [parameters[layer.name] for layer in record.layers]
                # those of a streamed model are read from the folder, below
                ranks.broadcast_([weight for weight in weights if not is_file_backed(weight)])
        else:
            report = self._prune(prepared, device, ranks, should_stop, show_progress)
        if report is not None:
            self.folder.redirect_stored_weights(prepared.blocks, report)
        return report

    def _prune(
        self,
        prepared: PreparedPruning,
        device: torch.device,
        ranks: Ranks,
        should_stop: Callable[[], bool],
        show_progress: bool,
    ) -> PruneReport | None:
        with _progress_bar(len(prepared.blocks), show_progress and ranks.rank == 0) as advance:
            try:
                report = prune_blocks(
                    prepared,
                    device=device,
                    progress=self.folder,
                    on_block=lambda record, num_blocks: advance(record),
                    should_stop=should_stop,
                    ranks=ranks,
                )
            except PruningInterrupted:
                return None
        ranks.run_on_all(lambda: self.folder.finish(report) if ranks.rank == 0 else None)
        return report

    def _prepare(
        self, loader: Callable[[], Iterable[Any]], device: torch.device, ranks: Ranks
    ) -> tuple[PreparedPruning, PruneKey]:
        """Find the blocks, check them and the folder, read the calibration samples, and make the key."""
        # before any forward, which may change attributes
        settings = {module: _settings(module) for module in self.module.modules()}
        lists = block_lists(self.module, self.block_name)
        uses_calibration = self.options.method.uses_calibration
        # of several lists, such as those of a teacher and of the model, a forward tells which one runs
        found = self._find_blocks(None, loader) if len(lists) <= 1 else None
        if found is None and not uses_calibration:
            raise ValueError(
                f"Expected argument `blocks` to name one of {', '.join(f'`{name}`' for name in lists)}, as without "
                "calibration data nothing tells which of them the model runs"
            )
        if ranks.rank == 0:
            weights = [weight for weight in found[1].parameters() if weight.ndim >= 2] if found is not None else []
            self.folder.reserve(sum(map(_saved_bytes, weights)))
        rows = collect_rows(loader(), self.num_samples, self.options.seed) if uses_calibration else []
        if rows:
            self.options = self.options.for_samples(len(rows))
            if self.num_samples is None and len(rows) < DEFAULT_NUM_SAMPLES and ranks.rank == 0:
                _logger.warning(
                    "Calibrating on all %d samples of the data; with more data, %d are used.",
                    len(rows),
                    DEFAULT_NUM_SAMPLES,
                )
        check_lengths(self.module, rows)
        with isolated_rng(self.options.seed), evaluation_mode(self.module.modules()), frozen(self.module):
            name, blocks = found or self._find_blocks(lambda: self.forward(rows[0]), loader)
            blocks = nn.ModuleList(list(blocks)[: self.num_blocks])
            prepared = PreparedPruning(self.module, name, blocks, self.options, rows, self.forward, self.token_mask)
            key = self._key(prepared, device, ranks)
        key.model[_ARCHITECTURE] = _architecture(blocks, settings)
        return prepared, key

    def _find_blocks(
        self, forward: Callable[[], object] | None, loader: Callable[[], Iterable[Any]]
    ) -> tuple[str, nn.ModuleList]:
        def try_forward() -> None:
            (row,) = collect_rows(loader(), 1, self.options.seed)
            with isolated_rng(self.options.seed), evaluation_mode(self.module.modules()):
                self.forward(row)

        return _find_and_check_blocks(self.module, self.options, forward, self.block_name, try_forward)

    def load_finished(self) -> PruneReport:
        """Load a finished pruning into the dense module, without calibration data.

        Returns:
            The report.

        Raises:
            ValueError: If the folder holds no finished pruning, or one of another model or with other options.
        """
        found = self.folder.read_key()
        name = self.block_name or (found.options.get("blocks") if found is not None else None)
        name, blocks = find_blocks(self.module, name=name)
        # all names of a tensor: a block may have another one before that in its list
        everything: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        everything |= dict(self.module.named_buffers(remove_duplicate=False))
        wanted = found.model if found is not None else {}
        model = digest_model({key: everything[key] for key in wanted if key in everything})
        model[_ARCHITECTURE] = _architecture(blocks, {module: _settings(module) for module in blocks.modules()})
        number = self.num_samples or (found.calibration.get("num_samples") if found is not None else None)
        options = self.options if number is None else self.options.for_samples(number)
        self.folder.open_finished(PruneKey({**options.to_dict(), "blocks": name}, model))
        self.key_digest = self.folder.key_digest
        report = self._load(blocks)
        if report is None:
            raise ValueError(
                f"Expected argument `output_dir` to hold a complete pruning, but a file in '{self.folder.directory}' "
                "is damaged; run `fit` or `prune` again to make it anew."
            )
        return report

    def _load(self, blocks: nn.ModuleList) -> PruneReport | None:
        try:
            report = self.folder.read_report()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return report if self.folder.load_into(blocks) else None

    def _key(self, prepared: PreparedPruning, device: torch.device, ranks: Ranks) -> PruneKey:
        calibration = {}
        tensors = {f"{prepared.block_name}.{key}": tensor for key, tensor in _tensors(prepared.blocks)}
        if prepared.rows:
            # of rows, so that the batch size does not matter
            contents = digest_batches(list(prepared.rows), self.token_mask)
            calibration = {"num_samples": len(prepared.rows), "contents": contents}
            tensors |= self._find_read_tensors(prepared)
        # sums over several ranks round differently
        environment = {"torch": torch.__version__, "wandazeta": __version__, "device": device.type}
        environment |= {"ranks": str(ranks.size)}
        options = {**self.options.to_dict(), "blocks": prepared.block_name}
        return PruneKey(options, digest_model(tensors), calibration, environment)

    def _find_read_tensors(self, prepared: PreparedPruning) -> dict[str, Tensor]:
        """Find the parameters and buffers that a forward reads up to the end of its last block.

        These are embeddings, rotary tables and weights between the blocks. A head, which may be new and random at every
        start, has no influence on the pruning and is not among them. The same forward shows whether the layers run.
        """
        token = object()

        def stop(*_: Any) -> None:
            raise StopForward(token)

        handle = prepared.blocks[-1].register_forward_hook(stop)
        try:
            read = check_layers_run(
                prepared.blocks,
                self.options,
                prepared.block_name,
                lambda: run_until_stopped(lambda: prepared.forward(prepared.rows[0]), token),
            )
        finally:
            handle.remove()
        return {name: tensor for name, tensor in _tensors(self.module) if id(tensor) in read}


def _require_same(key: PruneKey, expected: PruneKey) -> None:
    difference = key.difference(expected, ("options", "model", "calibration", "environment"))
    if difference:
        raise ValueError(
            f"Expected every rank to prune the same model with the same data, but this one differs from rank 0 in "
            f"{difference}; seed what is random, and give all the same files and versions"
        )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _architecture(blocks: nn.ModuleList, settings: dict[nn.Module, dict[str, str]]) -> str:
    """Hash the classes of the blocks' modules, and the settings in their attributes and configurations."""
    held = [(name, sorted(settings[module].items())) for name, module in blocks.named_modules() if module is not blocks]
    return hashlib.sha256(repr([repr(blocks), held]).encode()).hexdigest()[:32]


def _settings(module: nn.Module) -> dict[str, str]:
    """Plain values, functions and configurations in the attributes of a module."""
    found = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name in _PASSING:
            continue
        if isinstance(value, (bool, int, float, str, type(None))):
            found[name] = repr(value)
        elif inspect.isroutine(value) or isinstance(value, type):
            found[name] = str(getattr(value, "__qualname__", repr(type(value))))
        elif hasattr(value, "to_dict") and not isinstance(value, nn.Module):
            config = {str(key): repr(item) for key, item in value.to_dict().items()}
            found[name] = repr(sorted((k, v) for k, v in config.items() if not k.startswith("_") and k not in _PASSING))
    return found


def _saved_bytes(weight: Tensor) -> int:
    # the weight, and a mask of one byte per element
    return weight.numel() * (weight.element_size() + 1)


@contextmanager
def _progress_bar(num_blocks: int, visible: bool) -> Iterator[Callable[[BlockRecord], None]]:
    from rich.console import Console  # not at import: this package needs torch only
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("Pruning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("blocks"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not visible) as bar:
        task = bar.add_task("", total=num_blocks)

        def advance(record: BlockRecord) -> None:
            losses = ""
            if record.loss_before is not None and record.loss_after is not None:
                losses = f"loss {record.loss_before:.3g} → {record.loss_after:.3g}"
            bar.update(task, completed=record.index + 1, description=losses)

        yield advance
