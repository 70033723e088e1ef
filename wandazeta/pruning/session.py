"""One pruning from start to end: check, read, key, prune or load, report."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wandazeta import __version__
from wandazeta.models.blocks import StopForward, block_lists, find_blocks, run_until_stopped
from wandazeta.models.modes import evaluation_mode, frozen
from wandazeta.pruning.calibration import collect_batches, digest_batches, isolated_rng
from wandazeta.pruning.method.layers import validate_layers
from wandazeta.pruning.options import PruneOptions
from wandazeta.pruning.progress.folder import ProgressFolder
from wandazeta.pruning.progress.key import PruneKey, digest_model
from wandazeta.pruning.pruner import PruningInterrupted, prune_model
from wandazeta.pruning.records import BlockRecord, PruneReport
from wandazeta.pruning.samples import split_rows
from wandazeta.utilities.files import check_writable
from wandazeta.utilities.ranks import Ranks

_ARCHITECTURE = "(architecture)"
# settings that say how, not what, is computed, and what a transformers model was loaded with
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


@dataclass
class PruneRun:
    """What a pruning needs to know, and the two ways to get it: make it, or load it.

    Args:
        module: The module that is pruned in place, or that holds the model.
        options: What to prune and how.
        folder: Where the progress is kept.
        forward: Runs the model on one batch.
        token_mask: Marks the positions of a batch that are not padding.
        num_samples: The number of calibration samples.
        block_name: Dotted name of the list of blocks in `module`; found where it is not given.
    """

    module: nn.Module
    options: PruneOptions
    folder: ProgressFolder
    forward: Callable[[Any], object]
    token_mask: Callable[[Any], Tensor | None]
    num_samples: int
    block_name: str | None = None
    was_complete: bool = field(default=False, init=False)
    """Whether `prune` found nothing left to do."""
    key_digest: str = field(default="", init=False)
    """The hash that names the pruning, once it is begun or found."""

    def prune(
        self,
        loader: Callable[[], Iterable[Any]],
        *,
        device: torch.device,
        ranks: Ranks,
        should_stop: Callable[[], bool],
        show_progress: bool,
    ) -> PruneReport | None:
        """Prunes the module, or goes on with its pruning, or loads it if it is complete.

        Args:
            loader: Makes the calibration loader; called once the cheap checks are through.
            device: Where the block at work is.
            ranks: Those that prune together; only rank 0 reads and writes the folder.
            should_stop: Asked after each block.
            show_progress: Whether to draw a progress bar.

        Returns:
            The report, or `None` if `should_stop` ended it on any rank.

        Raises:
            ValueError: If anything does not fit on any rank, before any long work.
        """
        name, blocks, batches, key = ranks.run_on_all(lambda: self._prepare(loader, device, ranks))
        found = ranks.broadcast_object(key)
        ranks.run_on_all(lambda: _require_same(key, found))
        ranks.run_on_all(lambda: self.folder.open(key) if ranks.rank == 0 else None)
        self.key_digest = ranks.broadcast_object(self.folder.key_digest)
        finished = ranks.broadcast_object(self._load(blocks) if ranks.rank == 0 else None)
        if finished is not None:
            self.was_complete = True
            for block, record in zip(blocks, finished.blocks, strict=True):
                parameters = dict(block.named_parameters())
                ranks.broadcast_([parameters[layer.name] for layer in record.layers])
            self.folder.lend_weights(blocks, finished)
            return finished
        with _progress_bar(len(blocks), show_progress and ranks.rank == 0) as advance:
            try:
                report = prune_model(
                    self.module,
                    self.forward,
                    batches,
                    self.options,
                    block_name=name,
                    token_mask=self.token_mask,
                    device=device,
                    progress=self.folder,
                    on_block=lambda record, num_blocks: advance(record),
                    should_stop=should_stop,
                    ranks=ranks,
                )
            except PruningInterrupted:
                return None
        ranks.run_on_all(lambda: self.folder.finish(report) if ranks.rank == 0 else None)
        self.folder.lend_weights(blocks, report)
        return report

    def _prepare(
        self, loader: Callable[[], Iterable[Any]], device: torch.device, ranks: Ranks
    ) -> tuple[str, nn.ModuleList, list[Any], PruneKey]:
        # before any forward, which may count or keep something in them
        settings = {module: _settings(module) for module in self.module.modules()}
        lists = block_lists(self.module) if self.block_name is None else []
        # a teacher or an average of weights beside the model: a forward tells which of them is pruned
        known = self._checked_blocks(None) if len(lists) <= 1 else None
        if known is None and not self.options.uses_calibration:
            raise ValueError(
                f"Expected argument `blocks` to name one of {', '.join(f'`{name}`' for name in lists)}, as without "
                "calibration data nothing tells which of them the model runs"
            )
        if ranks.rank == 0:
            weights = [weight for weight in known[1].parameters() if weight.ndim >= 2] if known is not None else []
            room = 0 if (self.folder.directory / "key.json").exists() else sum(map(_saved_bytes, weights))
            check_writable(self.folder.directory, needed_bytes=room)
        batches = (
            collect_batches(loader(), self.num_samples, self.options.seed) if self.options.uses_calibration else []
        )
        with isolated_rng(self.options.seed), evaluation_mode(self.module.modules()), frozen(self.module):
            name, blocks = known or self._checked_blocks(lambda: self.forward(batches[0]))
            key = self._key(name, blocks, batches, device, ranks)
        key.model[_ARCHITECTURE] = _architecture(blocks, settings)
        return name, blocks, batches, key

    def _checked_blocks(self, forward: Callable[[], object] | None) -> tuple[str, nn.ModuleList]:
        name, blocks = find_blocks(self.module, forward, self.block_name)
        validate_layers(blocks, self.options, model=self.module, block_name=name)
        return name, blocks

    def load_finished(self) -> PruneReport:
        """Loads a finished pruning into the dense module, without calibration data.

        Raises:
            ValueError: If the folder holds none, or that of another model or with other options.
        """
        found = self.folder.read_key()
        name = self.block_name or (found.options.get("blocks") if found is not None else None)
        name, blocks = find_blocks(self.module, name=name)
        everything = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        wanted = found.model if found is not None else {}
        model = digest_model({key: everything[key] for key in wanted if key in everything})
        model[_ARCHITECTURE] = _architecture(blocks, {module: _settings(module) for module in blocks.modules()})
        self.folder.open_finished(PruneKey({**self.options.to_dict(), "blocks": name}, model))
        self.key_digest = self.folder.key_digest
        report = self._load(blocks)
        if report is None:
            raise ValueError(
                f"Expected argument `output_dir` to hold a whole pruning, but a file in '{self.folder.directory}' is "
                "damaged; run `fit` or `prune` again to make it anew."
            )
        return report

    def _load(self, blocks: nn.ModuleList) -> PruneReport | None:
        try:
            report = self.folder.read_report()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return report if self.folder.load_into(blocks) else None

    def _key(
        self, name: str, blocks: nn.ModuleList, batches: list[Any], device: torch.device, ranks: Ranks
    ) -> PruneKey:
        calibration = {}
        tensors = {f"{name}.{key}": tensor for key, tensor in _tensors(blocks)}
        if batches:
            # by rows, which are what is pruned with: how they are batched changes nothing
            rows = [row for batch in batches for row in split_rows(batch)]
            calibration = {"num_samples": self.num_samples, "contents": digest_batches(rows, self.token_mask)}
            # copies are drawn by the head
            until = None if self.options.num_copies else blocks[-1]
            tensors |= _read(self.module, until, lambda: self.forward(rows[0]))
        # sums over ranks round otherwise than sums in one process
        environment = {"torch": torch.__version__, "wandazeta": __version__, "device": device.type}
        environment |= {"ranks": str(ranks.size)}
        return PruneKey({**self.options.to_dict(), "blocks": name}, digest_model(tensors), calibration, environment)


def _require_same(key: PruneKey, first: PruneKey) -> None:
    difference = key.difference(first, ("options", "model", "calibration", "environment"))
    if difference:
        raise ValueError(
            f"Expected every rank to prune the same model with the same data, but this one differs from rank 0 in "
            f"{difference}; seed what is random, and give all the same files and versions"
        )


class _ReadTensors(TorchFunctionMode):
    """Notes every tensor that an operation is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, Tensor):
                    self.read.add(id(item))
        return func(*args, **(kwargs or {}))


def _read(module: nn.Module, until: nn.Module | None, forward: Callable[[], object]) -> dict[str, Tensor]:
    """Finds the parameters and buffers that a forward reads: embeddings, rotary tables, what stands between blocks.

    Up to the end of the last block, by default: a head, which may be new and random at every start, does not decide
    what is pruned and is not among them.
    """
    token = object()

    def stop(*_: Any) -> None:
        raise StopForward(token)

    handle = until.register_forward_hook(stop) if until is not None else None
    try:
        with torch.no_grad(), _ReadTensors() as mode:
            run_until_stopped(forward, token)
    finally:
        if handle is not None:
            handle.remove()
    return {name: tensor for name, tensor in _tensors(module) if id(tensor) in mode.read}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _architecture(blocks: nn.ModuleList, settings: dict[nn.Module, dict[str, str]]) -> str:
    """Hashes what the blocks' tensors do not show: classes, and the settings that modules and configurations hold."""
    held = [(name, sorted(settings[module].items())) for name, module in blocks.named_modules() if module is not blocks]
    return hashlib.sha256(repr([repr(blocks), held]).encode()).hexdigest()[:32]


def _settings(module: nn.Module) -> dict[str, str]:
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
    # the weight, and one byte an element for its mask
    return weight.numel() * (weight.element_size() + 1)


@contextmanager
def _progress_bar(num_blocks: int, visible: bool) -> Iterator[Callable[[BlockRecord], None]]:
    from rich.console import Console  # not at import: the core needs torch alone
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
