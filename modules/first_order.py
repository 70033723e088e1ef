"""Fine-tuning by back-propagation as a LightningModule, the baseline of `ZerothOrderModule` on the same batches."""

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from wandazeta.adapters import AdapterVector, PeftLoRA, TensorTrainAdapters, Weights
from wandazeta.adapters.files import backbone_fingerprint, describe_backbone, require_same, written_backbone
from wandazeta.adapters.gradient_training import GradientTrainable
from wandazeta.lightning_compat import attached_trainer, is_fitting
from wandazeta.models.attention import differentiable_attention
from wandazeta.models.loading import LoadingOptions, load_backbone, load_tokenizer
from wandazeta.models.sharded import average_gradients
from wandazeta.models.zero3 import gathered
from wandazeta.modules.checkpoints import require_checkpoint_of
from wandazeta.modules.language_model import LanguageModel, NonFiniteLossError
from wandazeta.modules.strategies import configure_deepspeed, refuse_float16_training
from wandazeta.modules.supported_callbacks import copy_module_again, model_states, refuse_callbacks
from wandazeta.scoring.distillation import TeacherTargets, teacher_loss
from wandazeta.scoring.head_scorer import HeadScorer
from wandazeta.scoring.objectives import objective_losses
from wandazeta.utilities.arguments import check_range, describe_rates, stepped

_NO_FINETUNING = "it freezes all that the optimizer could train; choose the trained part by `trainable`"
_NO_PRUNING = "it masks frozen weights under trained adapters; use WandaPPPruneCallback"


class FirstOrderModule(LanguageModel):
    """A language model that is trained by back-propagation with AdamW: adapters, or all of its weights.

    The new head of an encoder is trained in addition. Batches, losses and metrics are those of `ZerothOrderModule`.
    Adapters are inserted by `setup`, after a callback has pruned the backbone. Checkpoints contain the adapters alone,
    unless all weights are trained. To train all weights of a backbone that was pruned before and keep it sparse, add
    the callback `KeepSparsity`; `WandaPPPruneCallback` keeps what it pruned by itself.

    Args:
        model_name_or_path: Hugging Face name or local directory of a causal language model, or of an encoder.
        loading: Precision, attention kernels, pad token and other options of loading; see `LoadingOptions`. All
            weights are best trained in float32; adapters are float32 in any case.
        trainable: What is trained: `PeftLoRA` adapters (the default), `TensorTrainAdapters` (LoRETTA, arXiv
            2402.11417), or all `Weights` of the model.
        learning_rate: Learning rate of AdamW.
        lr_scheduler: Makes a learning rate scheduler from the optimizer; it is stepped after every training step.
        weight_decay: Weight decay of matrices; biases and norms have none. It has to be 0 for `TensorTrainAdapters`,
            whose matrices and biases are one parameter.
        seed: Seed of the adapters' initial values.
        teacher: Hugging Face name or local directory of a causal language model with the same tokenizer, whose
            predictions are the targets instead of the text: distillation, for example from the dense model to a pruned
            one. For running text. The loss is the Kullback-Leibler divergence from the teacher's most probable tokens
            and all others together, in float32. Targets are computed once for each text and kept in the folder
            `teacher` of the trainer's `default_root_dir`. The teacher is neither trained nor in checkpoints.

    Raises:
        ValueError: If an argument is out of range or does not fit the model, or peft is not installed.

    Examples:
        >>> FirstOrderModule("runs/pruned", trainable=PeftLoRA(rank=16), learning_rate=5e-4)  # doctest: +SKIP
        >>> FirstOrderModule("runs/pruned", trainable=Weights(), teacher="path/to/dense")  # doctest: +SKIP
    """

    def __init__(
        self,
        model_name_or_path: str,
        loading: LoadingOptions | None = None,
        trainable: PeftLoRA | TensorTrainAdapters | Weights | None = None,
        learning_rate: float = 1e-4,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        weight_decay: float = 0.0,
        seed: int = 0,
        teacher: str | None = None,
    ) -> None:
        check_range("learning_rate", learning_rate, learning_rate > 0, "above 0")
        check_range("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        trainable = trainable or PeftLoRA()
        if not isinstance(trainable, GradientTrainable):
            raise ValueError(
                "Expected argument `trainable` to be PeftLoRA, TensorTrainAdapters or Weights for back-propagation, "
                f"but got {type(trainable).__name__}; use PeftLoRA for LoRA"
            )
        training = trainable.by_gradient()
        decays = weight_decay == 0 or training.supports_weight_decay
        check_range("weight_decay", weight_decay, decays, f"0 for {training.trainable}")
        loading = loading or LoadingOptions()
        owner = type(self).__name__
        loading.refuse("stream_weights", owner, "it is for `prune` with LanguageModel")
        loading.refuse("shard_on_load", owner, "leave it out: the strategy shards weights that are loaded")
        if teacher is not None and loading.num_classes is not None:
            raise ValueError(
                f"Expected argument `teacher` to be left out with `num_classes`, but got {teacher!r}; it is for causal "
                "language models"
            )
        super().__init__(model_name_or_path, loading)
        if teacher is not None:
            _require_same_vocabulary(self.tokenizer, teacher, loading.trust_remote_code)
        self.trainable = trainable
        self.strict_loading = not training.has_adapters
        self.learning_rate = learning_rate
        self.lr_scheduler = lr_scheduler
        self.weight_decay = weight_decay
        self.seed = seed
        self.adapters: AdapterVector | None = None
        """Tensor-train adapters; those of peft are inside the backbone."""
        self.adapter_names: frozenset[str] = frozenset()
        """Names of the adapters' parameters, which are all that checkpoints contain; empty if weights are trained."""
        self.pruned_backbone_key: str | None = None
        """Key of the pruning of the backbone, set by the callback that prunes it."""
        self.teacher = teacher
        self.teacher_targets: TeacherTargets | None = None
        """The teacher and its targets, from the setup of a fit on; no submodule, so that checkpoints do not hold it."""
        self._teacher_fingerprint: str | None = None
        self._training = training
        self._backbone_description: dict[str, Any] = {}
        training.check(self.backbone)

    @property
    def backbone_key(self) -> str:
        """Key of the backbone, pruned or not, that training begins from."""
        return str(self._backbone_description.get("backbone_key", ""))

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Check the trainer before a callback prunes the model, which takes long."""
        callbacks = super().configure_callbacks()
        if is_fitting(self.trainer):
            trains_weights = not self._training.has_adapters
            trained = {p.dtype for p in self.backbone.parameters()} if trains_weights else set()
            refuse_float16_training(self.trainer, trained)
            refuse_callbacks(self.trainer, type(self).__name__, {BaseFinetuning: _NO_FINETUNING})
            if self._training.has_adapters:
                refuse_callbacks(self.trainer, self._training.trainable, {ModelPruning: _NO_PRUNING})
        return callbacks

    @override
    def setup(self, stage: str) -> None:
        """Insert the adapters into the backbone, which has been pruned by now if a callback does that."""
        if not self._backbone_description:
            self._backbone_description = describe_backbone(self.backbone, self.pruned_backbone_key)
        if self._training.has_adapters and not self.adapter_names:
            self._insert_adapters()
            if attached_trainer(self) is not None:
                copy_module_again(self.trainer, self, stage)
        if stage == "fit":
            if self._training.has_adapters:
                self._training.require_adapters("train")
            if attached_trainer(self) is not None:
                refuse_float16_training(self.trainer, {p.dtype for p in self.parameters() if p.requires_grad})
            # transformers loads models in evaluation mode, without dropout
            self.backbone.train()
            if self.teacher is not None and self.teacher_targets is None:
                self.teacher_targets = self._load_teacher(self.teacher)
        if attached_trainer(self) is not None:
            configure_deepspeed(self.trainer.strategy, save_frozen=not self._training.has_adapters)
        self._is_set_up = True

    @override
    def _complete_sharding(self, mesh: DeviceMesh) -> None:
        super()._complete_sharding(mesh)
        if self.adapters is not None:
            # one vector for all blocks, and small: every rank has it
            average_gradients(self.adapters.parameters(), mesh)

    @override
    def _is_saved(self, name: str) -> bool:
        return not self._training.has_adapters or name in self.adapter_names

    def _load_teacher(self, name: str) -> TeacherTargets:
        model = load_backbone(name, self.loading).requires_grad_(False).eval()
        trainer = attached_trainer(self)
        precision = "32-true" if trainer is None else trainer.precision
        self._teacher_fingerprint = backbone_fingerprint(model)
        key = sha256(f"{self._teacher_fingerprint} {precision}".encode()).hexdigest()[:16]
        folder = Path("." if trainer is None else trainer.default_root_dir) / "teacher"
        # ranks have texts of their own, and write to files of their own
        head: Any = self.scorer.head
        return TeacherTargets(model, folder, f"{key}-{self.global_rank}", head.weight.shape[0])

    def _insert_adapters(self) -> None:
        heads = ["head"] if isinstance(self.scorer, HeadScorer) else []
        self.adapters = self._training.insert(self.backbone, self.seed, heads)
        trained = {name: parameter.numel() for name, parameter in self.named_parameters() if parameter.requires_grad}
        self.adapter_names = frozenset(trained)
        rank_zero_info(f"{sum(trained.values()):,} trainable values ({self._training.trainable})")

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state; adapters in it are inserted first, as the main process of `ddp_spawn` has not run `setup`."""
        holds_adapters = any(name == "adapters.theta" or ".lora_A." in name for name in state_dict)
        if holds_adapters and self._training.has_adapters and not self.adapter_names:
            self._backbone_description = describe_backbone(self.backbone, self.pruned_backbone_key)
            self._insert_adapters()
        return super().load_state_dict(state_dict, strict, assign)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        with differentiable_attention(self.device):
            prepared = self.scorer.prepare(batch)
            if self.teacher_targets is None:
                loss = objective_losses(None, self.scorer, prepared)[0]
            else:
                loss = teacher_loss(self.scorer, prepared, self.teacher_targets)
        self._require_finite(loss.detach())
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def _require_finite(self, loss: Tensor) -> None:
        """Raise an error on every rank before a loss that is not finite on any rank reaches the weights."""
        num_bad = (~loss.isfinite()).to(torch.float32)
        if float(self.trainer.strategy.reduce(num_bad, reduce_op="sum")) > 0:
            raise NonFiniteLossError(
                f"Expected finite losses, but the loss of step {self.trainer.global_step} is nan or infinite; lower "
                "`learning_rate`, and check the data and the precision"
            )

    @override
    def configure_optimizers(self) -> Any:
        return stepped(self._new_optimizer(), self.lr_scheduler)

    def _new_optimizer(self) -> Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return AdamW([group for group in groups if group["params"]], lr=self.learning_rate)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key, state in model_states(checkpoint):
            checkpoint[key] = {name: state[name] for name in state if self._is_saved(name)}
        checkpoint["first_order"] = self._description() | self._rates() | {"teacher": self._teacher_fingerprint}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = require_checkpoint_of("first_order", checkpoint)
        is_fitting = attached_trainer(self) is not None and self.trainer.training
        only_in_fit = self._rates() | {"teacher": self._teacher_fingerprint} if is_fitting else {}
        require_same(saved, self._description() | only_in_fit)
        if not self._training.has_adapters:
            return
        # there is no `state_dict` under DeepSpeed, which has loaded its own files by now
        difference = self.adapter_names ^ set(checkpoint.get("state_dict", self.adapter_names))
        if difference:
            raise ValueError(
                "Expected a checkpoint with exactly the adapters of this run, but the names of "
                f"{len(difference)} parameters differ, first `{min(difference)}`; use the same `target_modules`, or "
                "start a new run"
            )
        if "current_model_state" in checkpoint:
            # WeightAveraging loads both states, and expects the frozen weights in them
            for key, state in model_states(checkpoint):
                checkpoint[key] = {**self.state_dict(), **state}

    def save_adapters(self, directory: str | Path, backbone: str | None = None) -> None:
        """Write the adapters: PeftLoRA as peft does, tensor trains as `ZerothOrderModule.save_adapters` does.

        They fit the backbone that they were trained on, pruned if it was pruned. All ranks have to call this, as
        DeepSpeed ZeRO stage 3 and FSDP2 shard adapters too; rank 0 writes.

        Args:
            directory: Output directory.
            backbone: Directory inside it to which the pruned backbone was written, for the card to name.

        Raises:
            ValueError: If there are no adapters.
        """
        self._training.require_adapters("save")
        with gathered([self.get_parameter(name) for name in sorted(self.adapter_names)]):
            description = written_backbone(self._backbone_description, backbone)
            self._training.save(Path(directory), description, is_main_process=self.global_rank == 0)

    @torch.no_grad()
    def merge(self, keep_mask: bool = False) -> None:
        """Merge LoRA adapters into the backbone, which becomes a plain model of transformers.

        A sparse weight plus the product of two factors is a dense weight. So a pruned backbone needs `keep_mask=True`,
        which sets the pruned weights to zero again after the merge: the sparsity is as before, but the model no longer
        computes the function that was trained; evaluate it again.

        Args:
            keep_mask: Set the weights that were zero before to zero after the merge.

        Raises:
            ValueError: If there are no LoRA adapters, the backbone is pruned and `keep_mask` is False, or the strategy
                has sharded its weights.
        """
        self._training.merge(keep_mask)

    def _description(self) -> dict[str, Any]:
        """Return what a checkpoint has to agree with."""
        description = {"trainable": self._training.trainable} | self._training.description()
        if not self._training.has_adapters and not self._backbone_description:
            # `load_from_checkpoint` fills a module before `setup`; all of its weights come from the file
            return description
        return description | {"backbone_key": self.backbone_key}

    def _rates(self) -> dict[str, Any]:
        return describe_rates(self._new_optimizer(), self.lr_scheduler) | {"weight_decay": self.weight_decay}


def _require_same_vocabulary(tokenizer: Any, teacher: str, trust_remote_code: bool) -> None:
    """Refuse a teacher whose tokens are not those of the model, by its tokenizer, before it is loaded."""
    vocabularies = tokenizer.get_vocab(), load_tokenizer(teacher, trust_remote_code, argument="teacher").get_vocab()
    if vocabularies[0] != vocabularies[1]:
        differ = len(set(vocabularies[0].items()) ^ set(vocabularies[1].items()))
        raise ValueError(
            f"Expected argument `teacher` to be a model with the same tokens, but got {teacher!r}, where {differ:,} "
            "differ; use the dense model that this one was made from"
        )
