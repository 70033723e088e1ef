"""Keep a pruned module exactly as sparse as it is while something trains its weights."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from wandazeta.models.zero3 import full_shape
from wandazeta.pruning.export.masks import match_masks, read_masks
from wandazeta.pruning.held_masks import HeldSparsity, pack_mask, unpack_mask, zero_masks


class KeepSparsity(Callback):
    """Holds pruned weights at zero while they are trained, whatever the module and its optimizers are.

    Gradients are masked before they are accumulated, reduced over ranks and clipped (a norm is that of the kept
    weights); weights and optimizer state after every step, so that weight decay, momenta and what a checkpoint brought
    back leave no trace. At the end of the fit sparsity is checked. Automatic and manual optimization, any number of
    optimizers, one device or DDP, any precision; the masks are kept in checkpoints, one bit a weight.

    DeepSpeed, whatever the stage, keeps copies of weights and optimizer state that masks cannot reach. There gradients
    alone are masked, which is enough for SGD, Adam and all that move a value by its own gradient; sparsity is checked
    after the first step, too. Every rank holds whole masks, a byte for each weight.

    Masked full fine-tuning is this callback beside `FirstOrderModule(trainable=Weights())`. In a list of callbacks its
    place does not matter.

    Args:
        masks: A `masks.safetensors`, or the directory of a `wandazeta prune` that holds it; by default the zeros of
            the Linears in the blocks when the fit starts.
        blocks: Dotted name of the list of blocks in the module; found where it is not given. For masks without a file.

    Raises:
        ValueError: Before training, if the strategy shards weights (FSDP), nothing is pruned or masks do not fit;
            after it, if something else has written to pruned weights.

    Example:
        >>> from wandazeta.callbacks import KeepSparsity
        >>> KeepSparsity(masks="runs/pruned_model").masks
        'runs/pruned_model'
    """

    def __init__(self, masks: str | None = None, blocks: str | None = None) -> None:
        if masks is not None and blocks is not None:
            raise ValueError(
                f"Expected argument `blocks` to be left out where `masks` names a file, but got {blocks!r}; "
                "the file says which weights are pruned"
            )
        self.masks = masks
        self.blocks = blocks
        self.held: HeldSparsity | None = None
        """The weights and masks in force, while fitting and after it."""
        self._first_step: int | None = None
        self._read: dict[str, Tensor] | None = None
        self._restored: dict[str, Tensor] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._restored = None
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            raise ValueError(
                f"Expected a strategy that leaves gradients whole, but got {type(trainer.strategy).__name__}, which "
                "keeps flat or sharded ones that masks cannot reach; use one device, DDP or DeepSpeed"
            )
        if self.masks is not None:
            # what is wrong with the file shows before the module is pruned or trained
            self._read = read_masks(self.masks)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # by now DeepSpeed, too, has loaded the checkpoint, and the optimizers are the final ones
        parameters = dict(pl_module.named_parameters())
        masks = None if self._read is None else match_masks(pl_module, self._read)
        if self._restored is not None:
            # not the zeros again: a kept weight may have become zero by chance, and would then stay so
            masks = self._restored_masks(parameters, masks)
        self.held = HeldSparsity(parameters, zero_masks(pl_module, self.blocks) if masks is None else masks)
        self._read = self._restored = None
        rank_zero_info(
            f"Holding {self.held.num_pruned:,} of {self.held.num_weights:,} weights in {len(self.held.masks)} layers "
            "at zero"
        )
        if _trains_copies(trainer):
            self.held.hold_gradients()
            self._first_step = trainer.global_step + 1
        else:
            self.held.hold(trainer.optimizers)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.held is not None and self._first_step is not None and trainer.global_step >= self._first_step:
            # an optimizer that moves weights without gradients is found now, not after hours
            self._first_step = None
            self.held.check(signs=False)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before the strategy is torn down, after which shares cannot be gathered
        if self.held is not None and _trains_copies(trainer):
            self.held.check(signs=False)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # none where a checkpoint was of a finished run
        if self.held is not None and not _trains_copies(trainer):
            self.held.check()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def state_dict(self) -> dict[str, Any]:
        masks = {} if self.held is None else self.held.masks
        return {"masks": {name: pack_mask(mask) for name, mask in masks.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # none in a checkpoint from before a fit
        self._restored = state_dict["masks"] or None

    def _restored_masks(self, parameters: dict[str, Any], given: dict[str, Tensor] | None) -> dict[str, Tensor]:
        assert self._restored is not None
        unknown = [name for name in self._restored if name not in parameters]
        if unknown:
            raise ValueError(
                f"Expected a checkpoint of the same module, but its masks are of `{unknown[0]}` and others that this "
                "one does not have; start without it"
            )
        masks = {name: unpack_mask(packed, full_shape(parameters[name])) for name, packed in self._restored.items()}
        if given is not None and not (
            given.keys() == masks.keys() and all(torch.equal(given[name], mask) for name, mask in masks.items())
        ):
            raise ValueError(
                f"Expected argument `masks` to be those that the checkpoint was trained with, but '{self.masks}' holds "
                "others; name the same file, or start without the checkpoint"
            )
        return masks

    def _release(self) -> None:
        if self.held is not None:
            self.held.release()


def _trains_copies(trainer: Trainer) -> bool:
    """Whether optimizers step on something else than the module's parameters."""
    return isinstance(trainer.strategy, DeepSpeedStrategy)
