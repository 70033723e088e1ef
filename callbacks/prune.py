"""Prune any LightningModule with Wanda++ before it is fitted."""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich import get_console
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from wandazeta.callbacks.calibration_data import calibration_loader
from wandazeta.callbacks.cluster.requeue import requeue_signal
from wandazeta.models.streaming import is_stored, require_whole
from wandazeta.pruning.calibration import call_arguments
from wandazeta.pruning.options import (
    Alpha,
    ComputeDtype,
    LRSchedule,
    MaskMode,
    Method,
    Optimizer,
    PruneOptions,
    Start,
    Target,
)
from wandazeta.pruning.progress.folder import ProgressFolder
from wandazeta.pruning.records import PruneReport, table
from wandazeta.pruning.session import PruneRun
from wandazeta.utilities.ranks import Ranks
from wandazeta.utilities.signals import STOP_SIGNALS, DeferredSignals, requeue_slurm_job


class WandaPPPruneCallback(Callback):
    """Prunes the Linears of every decoder block with Wanda++ when `fit` sets up, and never again.

    It prunes in `setup`, while the weights are whole and on the CPU, one block at a time on the device. Each finished
    block goes to `output_dir`; a run that was stopped, even killed, goes on at the next block, and one that finds the
    pruning complete only loads it. Several ranks share the calibration samples out, and rank 0 alone uses the folder
    while they prune. `validate`, `test` and `predict` load it too, or refuse. Embeddings, norms and the
    head stay as they are. Method: Wanda++ (ACL Findings 2025, arXiv 2503.04992).

    A model is called with a batch as `forward_batch` says, and the padding is found by `token_mask`; override them
    for a module whose batches are like no other.

    Args:
        sparsity_pattern: `"N:M"`, of every M consecutive inputs of a row N are kept, or `"unstructured"`.
        sparsity: Fraction of each row that is set to zero, for `"unstructured"` only.
        sparsity_slope: By how much the last block's fraction is above the first's, for `"unstructured"` only.
        method: Score and optimisation: `magnitude`, `wanda`, `rgs`, `ro`, `wanda++` or `sparsegpt`.
        alpha: Weight of the regional gradient in the score; `auto` weighs it layer by layer, whatever the width.
        rounds: Rounds of regional optimisation of each block.
        samples_per_round: Calibration samples drawn for each round.
        optimizer: Optimizer of the regional optimisation.
        learning_rate: Learning rate of the regional optimisation.
        lr_schedule: `constant`, or `linear`, which falls to zero over the rounds.
        start: What the first round prunes by: the `score`, or `sparsegpt`, whose mask and weights the optimisation
            starts from.
        target: What a pruned block is fitted to: `dense_block`, the dense block's output on the same input, or
            `dense_stream`, what the unpruned model has at this depth.
        samples_per_step: Samples whose mean loss makes an optimizer step.
        generated_copies: Samples that the dense model writes for each calibration sample, from some of its tokens on,
            used beside it where blocks are optimised, which learn few by heart; for transformers' causal models.
        mask_mode: What pruned weights do during the steps: `free`, they move and the next round prunes again; `fixed`,
            they stay zero and with them the first round's mask; `straight_through`, they are trained beside the block,
            which runs without them, and may come back in the next round.
        compute_dtype: Precision of the block's matrix products: the `model`'s, or `bfloat16` by autocast; weights,
            statistics and scores stay as they are.
        exclude_modules: Names, or regular expressions of names, of modules inside the blocks to leave dense.
        num_calibration_samples: Calibration samples (rows of batches) to read.
        calibration: Where they come from: a dataloader or a LightningDataModule; by default the trainer's data
            module (its `calibration_dataloader()` if it has one), else the training data.
        blocks: Dotted name of the list of decoder blocks in the module; found where it is not given.
        device: Where the block at work is: `auto` is the trainer's device.
        output_dir: Folder that keeps the pruning.
        seed: Seed of every draw.

    Raises:
        ValueError: If an option is out of range or two options contradict each other.

    Example:
        >>> from wandazeta.callbacks import WandaPPPruneCallback
        >>> WandaPPPruneCallback(sparsity_pattern="2:4").options.target_sparsity
        0.5
    """

    def __init__(
        self,
        sparsity_pattern: str = "2:4",
        sparsity: float | None = None,
        sparsity_slope: float = 0.0,
        method: Method = "wanda++",
        alpha: Alpha = 100.0,
        rounds: int = 5,
        samples_per_round: int = 32,
        optimizer: Optimizer = "rmsprop",
        learning_rate: float = 3e-7,
        lr_schedule: LRSchedule = "constant",
        start: Start = "score",
        target: Target = "dense_block",
        samples_per_step: int = 1,
        generated_copies: int = 0,
        mask_mode: MaskMode = "free",
        compute_dtype: ComputeDtype = "model",
        exclude_modules: list[str] | None = None,
        num_calibration_samples: int = 128,
        calibration: LightningDataModule | DataLoader | None = None,
        blocks: str | None = None,
        device: str = "auto",
        output_dir: str = "runs/pruned",
        seed: int = 0,
    ) -> None:
        self.options = PruneOptions(
            method=method,
            sparsity_pattern=sparsity_pattern,
            sparsity=sparsity,
            sparsity_slope=sparsity_slope,
            alpha=alpha,
            rounds=rounds,
            samples_per_round=samples_per_round,
            optimizer=optimizer,
            learning_rate=learning_rate,
            lr_schedule=lr_schedule,
            start=start,
            target=target,
            samples_per_step=samples_per_step,
            generated_copies=generated_copies,
            mask_mode=mask_mode,
            compute_dtype=compute_dtype,
            exclude_modules=tuple(exclude_modules) if isinstance(exclude_modules, list) else exclude_modules or (),
            seed=seed,
        )
        if isinstance(num_calibration_samples, bool) or num_calibration_samples < 1:
            raise ValueError(
                f"Expected argument `num_calibration_samples` to be at least 1, but got {num_calibration_samples!r}."
            )
        num_samples = num_calibration_samples * (1 + self.options.num_copies)
        if self.options.uses_optimisation and num_samples < samples_per_round:
            raise ValueError(
                "Expected argument `samples_per_round` to be at most `num_calibration_samples` with their copies, but "
                f"got {samples_per_round} of {num_samples}."
            )
        if device != "auto":
            try:
                torch.device(device)
            except RuntimeError as error:
                raise ValueError(
                    f"Expected argument `device` to be 'auto' or a device such as 'cuda:0', but got {device!r}."
                ) from error
        self.num_calibration_samples = num_calibration_samples
        self.calibration = calibration
        self.blocks = blocks
        self.device = device
        self.output_dir = output_dir
        self.report: PruneReport | None = None
        """What was done to each layer; there once the pruning was made or loaded."""
        self.key: str | None = None
        """The hash that names the pruning in force."""
        self._exit_code: int | None = None
        self._was_pruned = False
        self._pruned: dict[str, tuple[weakref.ref[nn.Parameter], int]] = {}

    # -- for overriding ---------------------------------------------------------------------------------------------

    def forward_batch(self, pl_module: LightningModule, batch: Any) -> object:
        """Runs the model on one calibration batch; what it returns is not used.

        By default this is the module's `calibration_forward(batch)` if it has one, else its `forward` with as much of
        the batch as its signature takes, else its `training_step`. The run ends after the last decoder block, before
        head, loss and logging.

        Args:
            pl_module: The module that is pruned.
            batch: A batch of the calibration data.
        """
        special = getattr(pl_module, "calibration_forward", None)
        if callable(special):
            return special(batch)
        if is_overridden("forward", pl_module, parent=LightningModule):
            args, kwargs = call_arguments(pl_module.forward, batch)
            return pl_module(*args, **kwargs)
        args, kwargs = call_arguments(pl_module.training_step, (batch, 0))
        return pl_module.training_step(*(args if args != ((batch, 0),) else (batch,)), **kwargs)

    def token_mask(self, batch: Any) -> Tensor | None:
        """Marks the positions of a batch that are not padding.

        Args:
            batch: A batch of the calibration data.

        Returns:
            Bool of shape (rows, tokens), or `None` if all count. By default the batch's `attention_mask`.
        """
        mask = batch.get("attention_mask") if hasattr(batch, "get") else None
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    # -- hooks ------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.state.status == TrainerStatus.RUNNING:
            # the module would say so too, but after the pruning
            require_whole(pl_module)
        self._was_pruned = self._is_pruned(pl_module)
        if self._was_pruned:
            return
        if is_overridden("configure_model", pl_module):
            # Lightning calls it after this hook, and asks that a second call changes nothing: see `on_fit_start`
            pl_module.configure_model()
        if stage == "fit":
            self.prune(trainer, pl_module)
        else:
            run = self._run(pl_module)
            self._adopt(pl_module, run.load_finished(), run)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        present = {id(parameter) for parameter in pl_module.parameters()}
        by_name = dict(pl_module.named_parameters())
        for name, (reference, nonzero) in self._pruned.items():
            kept = reference()
            rebuilt = kept is None or id(kept) not in present
            weight = by_name.get(name) if rebuilt else kept
            # sharded weights have no elements here; a checkpoint, or a fit before this one, may have trained them
            may_be_trained = trainer.ckpt_path is not None or self._was_pruned
            if weight is None or weight.numel() == 0 or (may_be_trained and not rebuilt):
                continue
            if int(torch.count_nonzero(weight)) > nonzero:
                remedy = (
                    "build the model once: let `configure_model` return at once if it is there, and build nothing in "
                    "`setup`"
                    if rebuilt
                    else "load weights in `__init__` or in `configure_model`"
                )
                raise ValueError(
                    f"Expected `{name}` to be as it was pruned, but {type(pl_module).__name__} "
                    f"{'built it anew' if rebuilt else 'filled it with other values'} afterwards; {remedy}."
                )

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._exit_code is not None:
            # a callback that saves on every exception must not write a half-pruned model
            raise SystemExit(self._exit_code)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"key": self.key}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        restored = state_dict.get("key")
        if None not in (restored, self.key) and restored != self.key:
            raise ValueError(
                f"Expected a checkpoint that was trained on the pruning in '{self.output_dir}', but this one was "
                "trained on another; give it the `output_dir` it was trained with, or start without it."
            )

    # -- the pruning ------------------------------------------------------------------------------------------------

    def prune(self, trainer: Trainer, pl_module: LightningModule) -> PruneReport:
        """Prunes a module that is built, or goes on with its pruning, or loads it if it is complete.

        Every rank works on its share of the calibration samples; rank 0 reads and writes the folder.

        Args:
            trainer: The trainer; its device, its data and its ranks are used.
            pl_module: The module, its weights whole.

        Returns:
            The report.

        Raises:
            ValueError: If the model, the data, the options or the folder do not fit, before any long work.
            SystemExit: If a signal asked to stop; all finished blocks are on disk.
        """
        # of a fit before this one, in a process that survived it
        self._exit_code = None
        run = self._run(pl_module)
        stop_signals = STOP_SIGNALS | {found for found in (requeue_signal(trainer),) if found is not None}
        with DeferredSignals(stop_signals, deliver=False) as signals, _quiet(pl_module):
            report = self._make(trainer, pl_module, run, signals)
        if report is None:
            self._stop(trainer, signals)
        if signals.received is not None:
            # it came to this rank alone, or once all was done: as if it came now
            os.kill(os.getpid(), signals.received)
        self._adopt(pl_module, report, run)
        if run.was_complete:
            rank_zero_info(f"Loaded the pruning in '{self.output_dir}'; it was complete.")
        elif trainer.is_global_zero and trainer.progress_bar_callback is not None:
            console = get_console()
            console.print(table(report), width=console.width if console.is_terminal else 120)
        return report

    def _run(self, pl_module: LightningModule) -> PruneRun:
        return PruneRun(
            module=pl_module,
            options=self.options,
            folder=ProgressFolder(Path(self.output_dir).absolute()),
            forward=partial(self.forward_batch, pl_module),
            token_mask=self.token_mask,
            num_samples=self.num_calibration_samples,
            block_name=self.blocks,
        )

    def _make(
        self, trainer: Trainer, pl_module: LightningModule, run: PruneRun, signals: DeferredSignals
    ) -> PruneReport | None:
        ranks = Ranks.of_process_group(trainer.strategy.root_device)
        try:
            report = run.prune(
                lambda: calibration_loader(trainer, pl_module, self.calibration),
                device=trainer.strategy.root_device if self.device == "auto" else _present(self.device),
                ranks=ranks,
                should_stop=lambda: signals.received is not None,
                show_progress=trainer.progress_bar_callback is not None,
            )
        except ValueError as error:
            explained = _explained(error, pl_module)
            if explained is not None:
                raise explained from error
            raise
        # one that came during the last block, or to one rank only, stops all of them
        return None if ranks.sum(float(signals.received is not None)) else report

    def _stop(self, trainer: Trainer, signals: DeferredSignals) -> NoReturn:
        name = signals.received.name if signals.received is not None else "a signal"
        self._exit_code = 128 + signals.received if signals.received is not None else 1
        requeued = None
        if trainer.is_global_zero and signals.received is not None and signals.received == requeue_signal(trainer):
            requeued = requeue_slurm_job()
            rank_zero_info(requeued)
        # no rank ends before the job is back in the queue: the others would take that for an error
        Ranks.of_process_group(trainer.strategy.root_device).broadcast_object(requeued)
        rank_zero_info(
            f"Stopped by {name} while pruning: finished blocks are in '{self.output_dir}'; start the same command "
            "again to go on."
        )
        raise SystemExit(self._exit_code)

    def _adopt(self, pl_module: LightningModule, report: PruneReport, run: PruneRun) -> None:
        self.report, self.key = report, run.key_digest
        self._pruned.clear()
        parameters = dict(pl_module.named_parameters())
        for block in report.blocks:
            for layer in block.layers:
                name = f"{block.name}.{layer.name}"
                weight = parameters[name]
                nonzero = weight.numel() if is_stored(weight) else int(torch.count_nonzero(weight))
                self._pruned[name] = (weakref.ref(weight), nonzero)
        if hasattr(pl_module, "pruned_backbone_key"):
            pl_module.pruned_backbone_key = self.key  # type: ignore[assignment]

    def _is_pruned(self, pl_module: LightningModule) -> bool:
        """Whether this callback pruned, or loaded, this very module in this process."""
        present = {id(parameter) for parameter in pl_module.parameters()}
        references = [reference() for reference, _ in self._pruned.values()]
        return bool(references) and all(weight is not None and id(weight) in present for weight in references)


def _present(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(
            f"Expected argument `device` to be one of this machine, but got {name!r} ({str(error).splitlines()[0]})."
        ) from error


def _explained(error: BaseException, pl_module: nn.Module) -> ValueError | None:
    """Says what is wrong with a module in which no blocks were found because it is not built yet."""
    built = any(parameter.ndim >= 2 for parameter in pl_module.parameters())
    if not built and isinstance(error, ValueError) and is_overridden("setup", pl_module, parent=LightningModule):
        return ValueError(
            f"Expected {type(pl_module).__name__} to be built before its `setup`, in `__init__` or in "
            "`configure_model`, but it has no parameters yet; move what builds it from `setup` to `configure_model`."
        )
    return None


@contextmanager
def _quiet(pl_module: LightningModule) -> Iterator[None]:
    """Lets a `training_step` that logs early run outside a loop."""
    for name in ("log", "log_dict"):
        pl_module.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del pl_module.__dict__[name]
