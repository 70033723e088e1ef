"""Keep a pruned module sparse while its weights are trained."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from wandazeta.models.zero3 import full_shape
from wandazeta.pruning.export.masks import match_masks, read_masks
from wandazeta.pruning.held_masks import HeldMasks, masks_from_zeros, pack_mask, unpack_mask


class KeepSparsity(Callback):
    """Keeps pruned weights at zero while they are trained, for any module and any optimizers.

    Gradients are masked before they are accumulated, reduced over ranks and clipped (the clipped norm is that of the
    kept weights). Weights and optimizer state are masked after every step, so that neither weight decay nor momenta
    nor a loaded checkpoint can change a pruned weight. Sparsity is checked at the end of the fit. Works with automatic
    and manual optimization, several optimizers, one device or DDP, and any precision. Checkpoints hold the masks, one
    bit per weight.

    DeepSpeed (any stage) keeps copies of weights and optimizer state that masks cannot reach. There only gradients are
    masked, which is enough for SGD, Adam and other optimizers that update each value from its own gradient; sparsity
    is also checked after the first step. Every rank holds the masks of all weights, one byte per weight.

    Under FSDP2 (`ModelParallelStrategy`) every rank holds the masks of its shards only, and gradients are masked after
    they are reduced. Classic FSDP (`FSDPStrategy`) is refused.

    It is for models that were pruned before, such as those that `wandazeta prune` wrote: masked full fine-tuning is
    this callback beside `FirstOrderModule(trainable=Weights())`. `WandaPPPruneCallback` keeps what it pruned by itself.
    In a list of callbacks the place does not matter.

    Args:
        masks: A `masks.safetensors`, or the directory that `wandazeta prune` wrote it to; by default the zeros of the
            Linears and experts inside the blocks when the fit starts.
        blocks: Dotted name of the list of blocks in the module; by default all that are found. Only without `masks`.

    Raises:
        ValueError: Before training, if the strategy flattens weights (classic FSDP), nothing is pruned or the masks
            do not fit; after it, if something other than the optimizers has written to pruned weights.

    Examples:
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
        self.held: HeldMasks | None = None
        """The masks and their weights, from the start of the training on."""
        self._masks_from_file: dict[str, Tensor] | None = None
        self._packed_masks_from_checkpoint: dict[str, Tensor] | None = None
        # step after which sparsity is checked once during training
        self._check_at_step: int | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._packed_masks_from_checkpoint = None
        refuse_flat_weights(trainer)
        if self.masks is not None:
            # a bad file is refused before the module is pruned or trained
            self._masks_from_file = read_masks(self.masks)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the first hook at which DeepSpeed has loaded the checkpoint and the optimizers are the final ones
        parameters = dict(pl_module.named_parameters(remove_duplicate=False))
        self.hold(trainer, HeldMasks(parameters, self._find_masks(pl_module, parameters)))
        self._masks_from_file = self._packed_masks_from_checkpoint = None

    def hold(self, trainer: Trainer, held: HeldMasks) -> None:
        """Apply masks from now to the end of the fit.

        Args:
            trainer: The trainer, with the optimizers of the fit.
            held: The masks and their weights.
        """
        self.held = held
        rank_zero_info(
            f"Keeping {self.held.num_pruned:,} of {self.held.num_weights:,} weights in {self.held.num_layers} layers "
            "at zero"
        )
        if trains_copies(trainer):
            self.held.hold_gradients()
            self._check_at_step = trainer.global_step + 1
        else:
            self.held.hold(trainer.optimizers)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.held is not None and self._check_at_step is not None and trainer.global_step >= self._check_at_step:
            # detects an optimizer that moves weights without gradients now rather than after hours
            self._check_at_step = None
            self.held.check(signs=False)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # DeepSpeed's weights can be gathered only before the strategy is torn down
        if self.held is not None and trains_copies(trainer):
            self.held.check(signs=False)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # no masks are held where the checkpoint is that of a finished run, which trains nothing
        if self.held is not None and not trains_copies(trainer):
            self.held.check()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self.held is not None:
            self.held.release()

    @override
    def state_dict(self) -> dict[str, Any]:
        masks = {} if self.held is None else self.held.masks
        return {"masks": {name: pack_mask(mask) for name, mask in masks.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # a checkpoint from before the training holds none
        self._packed_masks_from_checkpoint = state_dict["masks"] or None

    def _find_masks(self, pl_module: LightningModule, parameters: dict[str, Any]) -> dict[str, Tensor]:
        """Take the masks from the checkpoint, the file or the zeros of the weights, in this order."""
        given = None if self._masks_from_file is None else match_masks(pl_module, self._masks_from_file)
        packed = self._packed_masks_from_checkpoint
        if packed is None:
            return masks_from_zeros(pl_module, self.blocks) if given is None else given
        # not from the zeros: a kept weight that has become zero by chance has to be trained on
        unknown = [name for name in packed if name not in parameters]
        if unknown:
            raise ValueError(
                f"Expected a checkpoint of the same module, but it has masks of `{unknown[0]}` and other weights that "
                "this module does not have; start without the checkpoint"
            )
        masks = {name: unpack_mask(bits, full_shape(parameters[name])) for name, bits in packed.items()}
        if given is not None and not (
            given.keys() == masks.keys() and all(torch.equal(given[name], mask) for name, mask in masks.items())
        ):
            raise ValueError(
                f"Expected argument `masks` to be those that the checkpoint was trained with, but '{self.masks}' holds "
                "others; name the same file, or start without the checkpoint"
            )
        return masks


def flattens_weights(trainer: Trainer) -> bool:
    """Whether weights and gradients are joined in flat shards, as by classic FSDP, so that masks cannot reach them."""
    return isinstance(trainer.strategy, FSDPStrategy)


def refuse_flat_weights(trainer: Trainer, remedy: str = "") -> None:
    """Raise an error if masks cannot reach the gradients.

    Args:
        trainer: The trainer.
        remedy: Another remedy than a different strategy.

    Raises:
        ValueError: If the strategy flattens weights.
    """
    if flattens_weights(trainer):
        raise ValueError(
            f"Expected a strategy that does not flatten weights, but got {type(trainer.strategy).__name__} (classic "
            "FSDP), whose flat gradients masks cannot reach; use FSDP2 (`ModelParallelStrategy`, as in "
            f"configs/trainer/fsdp2.yaml), one device, DDP or DeepSpeed{remedy}"
        )


def trains_copies(trainer: Trainer) -> bool:
    """Whether the optimizers update copies of the weights and not the module's own parameters."""
    return isinstance(trainer.strategy, DeepSpeedStrategy)
