"""Lightning callback that prunes a module before it is fitted."""

import hashlib
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from rich import get_console
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from wandazeta.callbacks.calibration_data import calibration_loader
from wandazeta.callbacks.keep_sparsity import (
    KeepSparsity,
    flattens_weights,
    refuse_flat_weights,
    trains_copies,
)
from wandazeta.lightning_compat import copies_module, fast_dev_run, requeue_signal
from wandazeta.models.sharded import is_shard, local_shard, sum_over_shards
from wandazeta.models.streaming import is_file_backed, require_in_memory
from wandazeta.models.zero3 import full_shape, gathered
from wandazeta.protocols import HasPrunedBackboneKey, SupportsCalibrationForward
from wandazeta.pruning.calibration import DEFAULT_NUM_SAMPLES, call_arguments
from wandazeta.pruning.held_masks import HeldMasks
from wandazeta.pruning.methods import PruningMethod, make_method
from wandazeta.pruning.options import ComputeDtype, PruneOptions
from wandazeta.pruning.pattern import SparsityPattern
from wandazeta.pruning.progress.folder import ProgressFolder
from wandazeta.pruning.records import PruneReport
from wandazeta.pruning.report.table import report_table
from wandazeta.pruning.session import PruningSession
from wandazeta.utilities.arguments import check_positive, existing_device
from wandazeta.utilities.ranks import Ranks
from wandazeta.utilities.signals import STOP_SIGNALS, DeferredSignals, requeue_slurm_job

_KEEP_REMEDY = "Set `keep_sparsity` to True to keep them at zero."


class WandaPPPruneCallback(Callback):
    """Prune the Linear layers of every decoder block when `fit` sets up, once.

    The module is pruned in `setup`, where its weights are complete and on the CPU, one block at a time on the device.
    Every finished block is written to `output_dir`: a run that was stopped, even killed, continues at the next block,
    and a run that finds a complete pruning loads it. `validate`, `test` and `predict` load it, too, or raise an error
    if there is none. With several ranks, each processes a part of the calibration samples, and only rank 0 uses the
    folder. With `fast_dev_run` of the trainer, only the first blocks are pruned, with few samples and without the
    folder, unless it holds a complete pruning. One trainer can have several of these callbacks, with a list of blocks
    and a folder each. Embeddings, norms and the head are not pruned.

    Pruned weights stay zero while they are trained, as with the callback `KeepSparsity`, by the masks of the pruning.
    Nothing is masked as long as none of them is trained, as with adapters on a frozen model. The sparsity at the end of
    the fit is reported. A checkpoint in which pruned weights are not zero is refused in every stage.

    Override `forward_batch` and `token_mask` for a module that has to be called differently.

    Args:
        sparsity_pattern: `"N:M"`, of every M consecutive inputs of a row N are kept, or `"unstructured"`; `"auto"` is
            `"unstructured"` if `sparsity` or `sparsity_slope` is given, else `"2:4"`.
        sparsity: Fraction of each row that is set to zero, for `"unstructured"` only; by default 0.5.
        sparsity_slope: Sparsity of the last block minus that of the first, for `"unstructured"` only.
        method: Pruning method: a name (`magnitude`, `wanda`, `rgs`, `ro`, `wanda++`, `sparsegpt` or `tuned-ro`), or an
            object with options such as `TunedRO(rounds=2)`. `wanda++` has the settings of its paper; the default
            prunes better on all models that were tried.
        compute_dtype: Precision of the block's matrix products: the `model`'s, or `bfloat16` by autocast.
        exclude_modules: Names of modules inside the blocks that stay dense, or regular expressions.
        num_calibration_samples: Number of calibration samples (rows of batches) to read; by default 128, or all if
            there are fewer.
        calibration: Source of the calibration samples, a dataloader or a LightningDataModule; by default the trainer's
            data module (its `calibration_dataloader()` if it has one), else the training data.
        blocks: Dotted name of the list of decoder blocks in the module; found by default.
        device: Device of the block that is pruned; `auto` is the trainer's device.
        output_dir: Folder that keeps the pruning.
        seed: Seed of the calibration samples and of all draws.
        keep_sparsity: Keep pruned weights at zero while they are trained; without it, a warning at the end of the fit
            tells how many have become dense.

    Raises:
        ValueError: If an option is out of range or two options contradict each other; when the training starts, if
            pruned weights are trained by a strategy that flattens them (classic FSDP).

    Examples:
        >>> from wandazeta.callbacks import WandaPPPruneCallback
        >>> WandaPPPruneCallback(sparsity_pattern="2:4", method="wanda").options.pattern.target_sparsity
        0.5
    """

    def __init__(
        self,
        sparsity_pattern: str = "auto",
        sparsity: float | None = None,
        sparsity_slope: float = 0.0,
        method: PruningMethod | str = "tuned-ro",
        compute_dtype: ComputeDtype = "model",
        exclude_modules: list[str] | None = None,
        num_calibration_samples: int | None = None,
        calibration: LightningDataModule | DataLoader | None = None,
        blocks: str | None = None,
        device: str = "auto",
        output_dir: str = "runs/pruned",
        seed: int = 0,
        keep_sparsity: bool = True,
    ) -> None:
        check_positive(num_calibration_samples=num_calibration_samples)
        options = PruneOptions(
            make_method(method),
            SparsityPattern(sparsity_pattern, sparsity, sparsity_slope),
            exclude_modules=exclude_modules or (),  # type: ignore[arg-type]  # a list is converted
            compute_dtype=compute_dtype,
            seed=seed,
        )
        with_defaults = options.for_samples(num_calibration_samples or DEFAULT_NUM_SAMPLES)
        # by default, the number of samples is known when they are read
        self.options = options if num_calibration_samples is None else with_defaults
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
        self.keep_sparsity = keep_sparsity
        self.report: PruneReport | None = None
        """Report of the pruning, once it was made or loaded."""
        self.key: str | None = None
        """Hash that identifies the pruning, once it was made or loaded."""
        self._exit_code: int | None = None
        self._was_pruned = False
        # whether `fast_dev_run` pruned only a part of the module
        self._is_partial = False
        # pruned weights by name, each with its number of nonzero values
        self._pruned: dict[str, tuple[weakref.ref[nn.Parameter], int]] = {}
        # the modules that hold the pruned weights: adapters and strategies may replace parameters, but not these
        self._owners: dict[str, weakref.ref[nn.Module]] = {}
        # of the blocks that `fast_dev_run` pruned, whose folder is gone
        self._trial_masks: dict[str, Tensor] | None = None
        # holds the masks while pruned weights are trained
        self._keeper: KeepSparsity | None = None
        # whether the checkpoint may have other values in pruned weights, and whether these are to be zero
        self._checkpoint_has_weights = self._checkpoint_must_be_sparse = True

    # -- for overriding ---------------------------------------------------------------------------------------------

    def forward_batch(self, pl_module: LightningModule, batch: Any) -> object:
        """Run the model on one calibration batch; the return value is ignored.

        By default this calls the module's `calibration_forward(batch)` if it has one, else its `forward` with those
        parts of the batch that its signature accepts, else its `training_step`. The forward is stopped after the last
        decoder block, before head, loss and logging.

        Args:
            pl_module: The module that is pruned.
            batch: A batch of the calibration data, of one row.
        """
        if isinstance(pl_module, SupportsCalibrationForward):
            return pl_module.calibration_forward(batch)
        if is_overridden("forward", pl_module, parent=LightningModule):
            args, kwargs = call_arguments(pl_module.forward, batch)
            return pl_module(*args, **kwargs)
        args, kwargs = call_arguments(pl_module.training_step, (batch, 0))
        return pl_module.training_step(*(args if args != ((batch, 0),) else (batch,)), **kwargs)

    def token_mask(self, batch: Any) -> Tensor | None:
        """Return the positions of a batch that are no padding; by default its `attention_mask`.

        Args:
            batch: A batch of the calibration data.

        Returns:
            Bool of shape (rows, tokens), or None if there is no padding.
        """
        mask = batch.get("attention_mask") if hasattr(batch, "get") else None
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    # -- hooks ------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.state.status == TrainerStatus.RUNNING:
            # the module would raise this error, too, but only after the pruning
            require_in_memory(pl_module)
        self._keeper = None
        self._checkpoint_has_weights = self._checkpoint_must_be_sparse = True
        self._was_pruned = self._is_pruned(pl_module)
        if self._was_pruned:
            if self._is_partial and not fast_dev_run(trainer):
                raise ValueError(
                    f"Expected a dense {type(pl_module).__name__}, but a trainer with `fast_dev_run` has pruned a part "
                    "of it; build the module anew."
                )
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[: callbacks.index(self)] if self in callbacks else ():
            if copies_module(callback):
                name, other = type(self).__name__, type(callback).__name__
                raise ValueError(
                    f"Expected {name} before {other} in argument `callbacks`, but got it after: {other} has copied "
                    f"weights that are not pruned yet; put {name} first"
                )
        if is_overridden("configure_model", pl_module):
            # Lightning calls it again after this hook; `on_fit_start` checks that this changes nothing
            pl_module.configure_model()
        if any(map(is_shard, pl_module.parameters())):
            raise ValueError(
                f"Expected whole weights to prune, but {type(pl_module).__name__} shards them in `configure_model`; "
                "prune first (`wandazeta prune`) and load the pruned model, or build the model in `__init__` and let "
                "`configure_model` shard it only after `setup`."
            )
        if stage == "fit":
            self.prune_module(trainer, pl_module)
        else:
            session = self._session(pl_module)
            self._remember(trainer, pl_module, session.load_finished(), session)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow_shards()
        present = {id(parameter) for parameter in pl_module.parameters()}
        by_name = dict(pl_module.named_parameters(remove_duplicate=False))
        for name, (reference, nonzero) in self._pruned.items():
            kept = reference()
            rebuilt = kept is None or id(kept) not in present
            weight = by_name.get(name) if rebuilt else kept
            # sharded weights have no elements here; weights from a checkpoint or an earlier fit may be trained
            may_be_trained = trainer.ckpt_path is not None or self._was_pruned
            if weight is None or weight.numel() == 0 or (may_be_trained and not rebuilt):
                continue
            if sum_over_shards(torch.count_nonzero(local_shard(weight)), weight) > nonzero:
                remedy = (
                    "build the model once: let `configure_model` return at once if it is there, and build nothing in "
                    "`setup`"
                    if rebuilt
                    else "load weights in `__init__` or in `configure_model`"
                )
                raise ValueError(
                    f"Expected `{name}` to have its pruned values, but {type(pl_module).__name__} "
                    f"{'built it anew' if rebuilt else 'filled it with other values'} afterwards; {remedy}."
                )
        if flattens_weights(trainer):
            if self._may_train_flat(pl_module):
                refuse_flat_weights(trainer, ", or set `keep_sparsity` to False")
        elif not trainer.strategy.restore_checkpoint_after_setup:
            self._check_checkpoint(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._check_checkpoint(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_checkpoint(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_checkpoint(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.strategy.restore_checkpoint_after_setup:
            self._check_checkpoint(trainer, pl_module)
        self._keep_if_trained(trainer, pl_module)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # a callback may unfreeze weights at any time
        self._keep_if_trained(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._keeper is not None:
            self._keeper.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._keeper is not None:
            self._keeper.on_train_end(trainer, pl_module)
        if trains_copies(trainer):
            # its weights can be gathered only before the strategy is torn down
            self._report_sparsity(pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._keeper is not None:
            self._keeper.on_fit_end(trainer, pl_module)
        if not (trains_copies(trainer) or flattens_weights(trainer)):
            self._report_sparsity(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._exit_code is not None:
            # a callback that saves on every exception must not write a half-pruned model
            raise SystemExit(self._exit_code)

    @property
    @override
    def state_key(self) -> str:
        # one trainer may prune several lists of blocks, or other modules of the same blocks
        return self._generate_state_key(blocks=self.blocks, output_dir=str(self.output_dir))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"key": self.key}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # of all prunings in the checkpoint, as the state of this one has another name if its folder was moved
        states = checkpoint.get("callbacks", {}).items()
        restored = {state.get("key") for name, state in states if name.startswith(f"{type(self).__qualname__}{{")}
        if self.key is not None and restored - {None} and self.key not in restored:
            raise ValueError(
                f"Expected a checkpoint that was trained on the pruning in '{self.output_dir}', but this one was "
                "trained on another; give it the `output_dir` it was trained with, or start without it."
            )
        weights = {id(weight) for weight in self._pruned_weights(pl_module).values()}
        names = {name for name, weight in pl_module.named_parameters() if id(weight) in weights}
        # there is no `state_dict` under DeepSpeed, which has files of its own
        self._checkpoint_has_weights = "state_dict" not in checkpoint or bool(names & checkpoint["state_dict"].keys())
        # without `keep_sparsity`, the checkpoints of a run become dense
        self._checkpoint_must_be_sparse = self.keep_sparsity or not restored

    # -- sparsity during and after training -------------------------------------------------------------------------

    def _pruned_weights(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        """The pruned weights that the module still has, by their names when they were pruned."""
        # not by name alone: adapters may have changed the names since
        found = {name: reference() for name, (reference, _) in self._pruned.items()}
        if any(weight is None for weight in found.values()):
            by_name = dict(pl_module.named_parameters())
            found = {name: by_name.get(name) if weight is None else weight for name, weight in found.items()}
        return {name: weight for name, weight in found.items() if weight is not None}

    def _follow_shards(self) -> None:
        """Find pruned weights again that FSDP2 has replaced by their shards since."""
        for name, (_, nonzero) in self._pruned.items():
            shard = getattr(self._owners[name](), name.rpartition(".")[2], None)
            if isinstance(shard, nn.Parameter) and is_shard(shard):
                self._pruned[name] = (weakref.ref(shard), nonzero)

    def _check_checkpoint(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a checkpoint in which pruned weights are not zero."""
        needed = self._checkpoint_has_weights and self._checkpoint_must_be_sparse
        if trainer.ckpt_path is None or not needed or flattens_weights(trainer):
            return
        self._follow_shards()
        masks = self._read_masks(trainer, pl_module)
        try:
            HeldMasks(self._pruned_weights(pl_module), masks)
        except ValueError as error:
            raise ValueError(
                f"Expected argument `ckpt_path` to be a checkpoint with the sparsity of the pruning in "
                f"'{self.output_dir}', but in '{trainer.ckpt_path}' pruned weights are not zero ({error}). It is from "
                "a run without this callback or with `keep_sparsity=False`; use one of a run with it, or take the "
                "callback out to use the dense weights."
            ) from error

    def _keep_if_trained(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold the masks if pruned weights are trained and nothing else holds theirs."""
        if self._keeper is not None or not self.keep_sparsity:
            return
        references = (reference() for reference, _ in self._pruned.values())
        if not any(weight is not None and weight.requires_grad for weight in references):
            return
        if any(isinstance(callback, KeepSparsity) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            return
        self._keeper = KeepSparsity()
        self._keeper.hold(trainer, HeldMasks(self._pruned_weights(pl_module), self._read_masks(trainer, pl_module)))

    def _may_train_flat(self, pl_module: LightningModule) -> bool:
        """Whether pruned weights are trained under classic FSDP, whose wrappers change names and join weights."""
        blocks = {name.rpartition(".")[0] for name in self._pruned} if self.keep_sparsity else set()
        for name, weight in pl_module.named_parameters():
            plain = name.replace("_fsdp_wrapped_module.", "")
            joined = "_flat_param" in plain and any(block.startswith(plain.rpartition(".")[0]) for block in blocks)
            if weight.requires_grad and self.keep_sparsity and (plain in self._pruned or joined):
                return True
        return False

    def _read_masks(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Read the masks of the pruning on rank 0, for all ranks: not from zeros, which can be kept weights."""
        ranks = Ranks.of_process_group(trainer.strategy.root_device)
        stored = ranks.run_on_all(lambda: self._stored_masks() if ranks.rank == 0 else {})
        masks = {}
        for name, weight in self._pruned_weights(pl_module).items():
            masks[name] = stored[name] if stored else torch.empty(full_shape(weight), dtype=torch.bool)
            ranks.broadcast_([masks[name]])
        return masks

    def _stored_masks(self) -> dict[str, Tensor]:
        assert self.report is not None
        if self._trial_masks is not None:
            return self._trial_masks
        folder = ProgressFolder(Path(self.output_dir).absolute())
        folder.open_existing()
        if folder.key_digest != self.key:
            raise ValueError(
                f"Expected '{self.output_dir}' to hold the pruning that this run started with, but it holds another one"
                " by now; give every run an `output_dir` of its own."
            )
        return _masks_in(folder, self.report)

    def _report_sparsity(self, pl_module: LightningModule) -> None:
        """Report the zeros of the pruned weights, with a warning if there are fewer than after the pruning."""
        found = before = total = 0
        for name, weight in self._pruned_weights(pl_module).items():
            with gathered([weight]):
                found += weight.numel() - sum_over_shards(torch.count_nonzero(local_shard(weight)), weight)
                total += weight.numel()
                before += weight.numel() - self._pruned[name][1]
        if total == 0:
            return
        if found >= before:
            rank_zero_info(f"Sparsity after the fit: {found / total:.1%} of {total:,} weights in the pruned layers.")
            return
        rank_zero_warn(
            f"Sparsity after the fit: {found / total:.1%} of {total:,} weights in the pruned layers, but "
            f"{before / total:.1%} after the pruning: the training has changed pruned weights. "
            + ("Something other than the optimizers writes to them." if self.keep_sparsity else _KEEP_REMEDY)
        )

    def _release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._keeper is not None:
            self._keeper.teardown(trainer, pl_module, "fit")
            self._keeper = None

    # -- the pruning ------------------------------------------------------------------------------------------------

    def prune_module(self, trainer: Trainer, pl_module: LightningModule) -> PruneReport:
        """Prune a module, continue its pruning, or load it if it is complete.

        Args:
            trainer: The trainer; its device, its data and its ranks are used.
            pl_module: The module, built and with complete weights.

        Returns:
            The report.

        Raises:
            ValueError: If the model, the data, the options or the folder do not fit, before any long work.
            SystemExit: If a signal asked to stop; all finished blocks are on disk.
        """
        # may be set by an earlier fit in the same process
        self._exit_code = self._trial_masks = None
        if fast_dev_run(trainer):
            return self._prune_a_little(trainer, pl_module)
        self._is_partial = False
        session = self._session(pl_module)
        report = self._prune(session, trainer, pl_module)
        if session.was_complete:
            rank_zero_info(f"Loaded the pruning in '{self.output_dir}'; it was complete.")
        return report

    def _prune_a_little(self, trainer: Trainer, pl_module: LightningModule) -> PruneReport:
        """Prune as many blocks as `fast_dev_run` runs batches, with as many samples, or load a complete pruning."""
        session = self._session(pl_module)
        self._is_partial = not session.folder.is_complete
        if not self._is_partial:
            report = session.load_finished()
            self._remember(trainer, pl_module, report, session)
            return report
        number = fast_dev_run(trainer)
        with tempfile.TemporaryDirectory() as directory:
            session.folder = ProgressFolder(directory)
            session.num_blocks, session.num_samples = number, min(number, self.num_calibration_samples or number)
            session.options = self.options.for_trial(session.num_samples)
            report = self._prune(session, trainer, pl_module)
            self._trial_masks = _masks_in(session.folder, report) if trainer.is_global_zero else {}
        rank_zero_info(
            f"Running with `fast_dev_run`: pruned only the first {len(report.blocks)} block(s), with "
            f"{session.num_samples} samples and at most one round; nothing is written to '{self.output_dir}'."
        )
        return report

    def _prune(self, session: PruningSession, trainer: Trainer, pl_module: LightningModule) -> PruneReport:
        stop_signals = STOP_SIGNALS | {found for found in (requeue_signal(trainer),) if found is not None}
        with DeferredSignals(stop_signals, deliver=False) as signals, _without_logging(pl_module):
            report = self._run(session, trainer, pl_module, signals)
        if report is None:
            self._stop(trainer, signals)
        if signals.received is not None:
            # it came after the last block: deliver it now
            os.kill(os.getpid(), signals.received)
        self._remember(trainer, pl_module, report, session)
        if not session.was_complete and trainer.is_global_zero and trainer.progress_bar_callback is not None:
            console = get_console()
            console.print(report_table(report), width=console.width if console.is_terminal else 80)
        return report

    def _session(self, pl_module: LightningModule) -> PruningSession:
        return PruningSession(
            module=pl_module,
            options=self.options,
            folder=ProgressFolder(Path(self.output_dir).absolute()),
            forward=partial(self.forward_batch, pl_module),
            token_mask=self.token_mask,
            num_samples=self.num_calibration_samples,
            block_name=self.blocks,
        )

    def _run(
        self, session: PruningSession, trainer: Trainer, pl_module: LightningModule, signals: DeferredSignals
    ) -> PruneReport | None:
        """Run a session; returns None if a signal stopped it on any rank."""
        ranks = Ranks.of_process_group(trainer.strategy.root_device)
        try:
            report = session.run(
                lambda: calibration_loader(trainer, pl_module, self.calibration),
                device=trainer.strategy.root_device if self.device == "auto" else existing_device(self.device),
                ranks=ranks,
                should_stop=lambda: signals.received is not None,
                show_progress=trainer.progress_bar_callback is not None,
            )
        except ValueError as error:
            explained = _explain_unbuilt(pl_module)
            if explained is not None:
                raise explained from error
            raise
        # a signal during the last block, or to one rank only, stops all ranks
        return None if ranks.sum(float(signals.received is not None)) else report

    def _stop(self, trainer: Trainer, signals: DeferredSignals) -> NoReturn:
        name = signals.received.name if signals.received is not None else "a signal"
        self._exit_code = 128 + signals.received if signals.received is not None else 1
        requeued = None
        if trainer.is_global_zero and signals.received is not None and signals.received == requeue_signal(trainer):
            requeued = requeue_slurm_job()
            rank_zero_info(requeued)
        # all ranks wait until the job is requeued: SLURM would take the end of one for a failure
        Ranks.of_process_group(trainer.strategy.root_device).broadcast_object(requeued)
        rank_zero_info(
            f"Stopped by {name} while pruning: finished blocks are in '{self.output_dir}'; start the same command "
            "again to go on."
        )
        raise SystemExit(self._exit_code)

    def _remember(
        self, trainer: Trainer, pl_module: LightningModule, report: PruneReport, session: PruningSession
    ) -> None:
        """Keep the result, and what `on_fit_start` needs to detect weights that were replaced."""
        self.report, self.key = report, session.key_digest
        self._pruned.clear()
        self._owners.clear()
        parameters = dict(pl_module.named_parameters(remove_duplicate=False))
        for block in report.blocks:
            for layer in block.layers:
                name = f"{block.name}.{layer.name}"
                weight = parameters[name]
                nonzero = weight.numel() if is_file_backed(weight) else int(torch.count_nonzero(weight))
                self._pruned[name] = (weakref.ref(weight), nonzero)
                self._owners[name] = weakref.ref(pl_module.get_submodule(name.rpartition(".")[0]))
        if isinstance(pl_module, HasPrunedBackboneKey):
            callbacks = trainer.callbacks  # type: ignore[attr-defined]
            others = [c.key for c in callbacks if isinstance(c, WandaPPPruneCallback) and c is not self]
            keys = sorted(key for key in (*others, self.key) if key is not None)
            digest = hashlib.sha256(" ".join(keys).encode()).hexdigest()[: len(self.key)]
            pl_module.pruned_backbone_key = self.key if len(keys) == 1 else digest

    def _is_pruned(self, pl_module: LightningModule) -> bool:
        """Whether this callback pruned or loaded this module object in this process."""
        present = {id(parameter) for parameter in pl_module.parameters()}
        references = [reference() for reference, _ in self._pruned.values()]
        return bool(references) and all(weight is not None and id(weight) in present for weight in references)


def _masks_in(folder: ProgressFolder, report: PruneReport) -> dict[str, Tensor]:
    """Return the masks of a pruning by the names of the weights."""
    results = zip(report.blocks, folder.results(len(report.blocks)), strict=True)
    return {f"{record.name}.{name}": mask for record, result in results for name, mask in result.masks.items()}


def _explain_unbuilt(pl_module: LightningModule) -> ValueError | None:
    """Return a better error for a module in which no blocks were found because it is not built yet."""
    built = any(parameter.ndim >= 2 for parameter in pl_module.parameters())
    if not built and is_overridden("setup", pl_module, parent=LightningModule):
        return ValueError(
            f"Expected {type(pl_module).__name__} to be built before its `setup`, in `__init__` or in "
            "`configure_model`, but it has no parameters yet; move what builds it from `setup` to `configure_model`."
        )
    return None


@contextmanager
def _without_logging(pl_module: LightningModule) -> Iterator[None]:
    """Make `log` do nothing, so that a `training_step` that logs can run outside a loop."""
    for name in ("log", "log_dict"):
        pl_module.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del pl_module.__dict__[name]
