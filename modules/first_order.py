"""Fine-tuning by back-propagation, the baseline of `ZerothOrderModule` on the same batches."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from wandazeta.adapters import AdapterVector, TensorTrainAdapters, train_linears
from wandazeta.adapters.files import describe_backbone, require_same, save_adapter_files
from wandazeta.models.blocks import find_blocks
from wandazeta.models.loading import LoadingOptions
from wandazeta.models.sparsity import is_pruned
from wandazeta.models.zero3 import gathered, is_shared_out
from wandazeta.modules.language_model import LanguageModel
from wandazeta.modules.strategies import configure_deepspeed
from wandazeta.scoring.head_scorer import HeadScorer
from wandazeta.scoring.objectives import objective_losses
from wandazeta.utilities.arguments import check_range, closest_names, describe_rates, stepped


class FirstOrderModule(LanguageModel):
    """A language model that is trained by back-propagation with AdamW: adapters, or all of its weights.

    The new head of an encoder is trained with either. Batches, losses and metrics are those of `ZerothOrderModule`. A
    backbone that a callback prunes is pruned by the time `setup` puts the adapters in, and checkpoints hold nothing
    else: peft's LoRA (Hu et al., arXiv 2106.09685), or the tensor trains of `ZerothOrderModule`, in the same flat
    vector (by back-propagation they are LoRETTA, arXiv 2402.11417). To train all weights of a pruned backbone and keep
    it sparse, add the callback `KeepSparsity`.

    Args:
        model_name_or_path: Hugging Face name or local directory of a causal language model, or of an encoder.
        loading: Precision, attention kernels, pad token and other options of loading; see `LoadingOptions`.
        train: What is trained, `lora` or `tensor_train` adapters beside frozen weights, or the `full` model.
        learning_rate: Learning rate of AdamW.
        lr_scheduler: Makes a learning rate scheduler from the optimizer; it is stepped after every training step.
        weight_decay: Weight decay of matrices; biases and norms have none. For `tensor_train` it is 0: AdamW cannot
            spare the biases in one vector.
        lora_rank: Rank of the adapters.
        lora_alpha: Scale of the adapters, which add alpha / rank times their product.
        lora_dropout: Dropout at the input of the adapters.
        target_modules: Names of the modules with adapters; by default all Linears but the head, of an encoder those of
            the blocks.
        tensor_train: Sites and sizes of the adapters for `tensor_train`, those of `ZerothOrderModule` by default.
        seed: Seed of the adapters' start.

    Raises:
        ValueError: If an argument is out of range or does not fit the model, or peft is not installed.
    """

    def __init__(
        self,
        model_name_or_path: str,
        loading: LoadingOptions | None = None,
        train: Literal["lora", "tensor_train", "full"] = "lora",
        learning_rate: float = 1e-4,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        weight_decay: float = 0.0,
        lora_rank: int = 8,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        target_modules: list[str] | None = None,
        tensor_train: TensorTrainAdapters | None = None,
        seed: int = 0,
    ) -> None:
        check_range("train", train, train in ("lora", "tensor_train", "full"), "lora, tensor_train or full")
        check_range("learning_rate", learning_rate, learning_rate > 0, "above 0")
        check_range("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        if train == "tensor_train":
            check_range("weight_decay", weight_decay, weight_decay == 0, "0 where train='tensor_train'")
        check_range("lora_rank", lora_rank, lora_rank >= 1, "at least 1")
        check_range("lora_alpha", lora_alpha, lora_alpha > 0, "above 0")
        check_range("lora_dropout", lora_dropout, 0 <= lora_dropout < 1, "at least 0 and below 1")
        check_range("target_modules", target_modules, target_modules != [], "one name or more")
        if train == "lora" and find_spec("peft") is None:
            raise ValueError(
                "Expected the package peft for train='lora', but it is not installed; "
                "run `pip install peft`, or set `train` to 'tensor_train' or 'full'"
            )
        loading = loading or LoadingOptions()
        loading.refuse("stream_weights", type(self).__name__, "it is for `prune` with LanguageModel")
        loading.refuse("shard_on_load", type(self).__name__, "DeepSpeed shards the weights after loading them")
        super().__init__(model_name_or_path, loading)
        self.train_mode = train
        self.strict_loading = train == "full"
        self.learning_rate = learning_rate
        self.lr_scheduler = lr_scheduler
        self.weight_decay = weight_decay
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.target_modules = target_modules
        self.tensor_train = tensor_train or TensorTrainAdapters()
        self.adapters: AdapterVector | None = None
        self.seed = seed
        self.pruned_backbone_key: str | None = None  # set by whoever prunes the backbone
        self._backbone_description: dict[str, Any] = {}
        self.adapter_names: frozenset[str] = frozenset()
        self._check_target_modules()
        if train == "tensor_train":
            self.tensor_train.check(self.backbone, num_states=2)

    @property
    def backbone_key(self) -> str:
        """Key of the backbone, pruned or not, that training begins from."""
        return str(self._backbone_description.get("backbone_key", ""))

    @override
    def setup(self, stage: str) -> None:
        """Put the adapters into the backbone, which may have been pruned by now."""
        if not self._backbone_description:
            self._backbone_description = describe_backbone(self.backbone, self.pruned_backbone_key)
        if self.train_mode != "full" and not self.adapter_names:
            if self.train_mode == "lora":
                self._insert_lora()
            else:
                self._insert_tensor_trains()
        if stage == "fit":
            self._require_adapters("train")
            # models come from their files in evaluation mode, without dropout
            self.backbone.train()
        if self._trainer is not None:
            configure_deepspeed(self._trainer.strategy, save_frozen=self.train_mode == "full")

    def _check_target_modules(self) -> None:
        known = {name for name, module in self.backbone.named_modules() if name and not any(module.children())}
        for target in self.target_modules or []:
            if not any(name == target or name.endswith(f".{target}") for name in known):
                raise ValueError(
                    f"Expected argument `target_modules` to name modules of the model, but got {target!r}; "
                    f"{closest_names(target, sorted({name.rpartition('.')[2] for name in known}))}"
                )

    def _insert_tensor_trains(self) -> None:
        self.backbone.requires_grad_(False)
        self.adapters = self.tensor_train.insert(self.backbone, self.seed)
        if isinstance(self.scorer, HeadScorer):
            train_linears(self.backbone, self.adapters, ["head"])
        self.adapters.train_by_gradient()
        self.adapter_names = frozenset({"adapters.theta"})
        rank_zero_info(f"{self.adapters.num_parameters:,} trainable values in tensor-train adapters")

    def _insert_lora(self) -> None:
        from peft import LoraConfig, get_peft_model

        has_head = isinstance(self.scorer, HeadScorer)
        config = LoraConfig(
            task_type=None if has_head else "CAUSAL_LM",
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules or (self._block_linears() if has_head else "all-linear"),
            modules_to_save=["head"] if has_head else None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            # changes the backbone in place; the wrapper saves and merges, and stays out of the module's own names
            self.__dict__["_peft_model"] = get_peft_model(self.backbone, config)
        trainable = {name: p.numel() for name, p in self.named_parameters() if p.requires_grad}
        self.adapter_names = frozenset(trainable)
        num_adapters = sum("lora_A" in name for name in trainable)
        rank_zero_info(f"{sum(trainable.values()):,} trainable values, {num_adapters} LoRA adapters")

    def _block_linears(self) -> list[str]:
        """Names of the Linears in an encoder's blocks; peft's own choice knows models of transformers only."""
        name, blocks = find_blocks(self.backbone)
        return [f"{name}.{child}" for child, module in blocks.named_modules() if isinstance(module, nn.Linear)]

    def _require_adapters(self, what: str) -> None:
        if self.train_mode == "lora" and "_peft_model" not in self.__dict__:
            raise ValueError(
                f"Expected LoRA adapters to {what}, but there are none: they are put in by `setup`, which runs in "
                "`fit`, `validate`, `test` and `predict`, and `merge` takes them out"
            )

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = objective_losses(None, self.scorer, self.scorer.prepare(batch))[0]
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    @override
    def configure_optimizers(self) -> Any:
        return stepped(self._new_optimizer(), self.lr_scheduler)

    def _new_optimizer(self) -> Optimizer:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        return AdamW([group for group in groups if group["params"]], lr=self.learning_rate)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.train_mode != "full":
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: state[name] for name in state if name in self.adapter_names}
        checkpoint["first_order"] = self._description() | self._rates()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("first_order")
        if saved is None:
            raise ValueError("Expected a checkpoint of FirstOrderModule, but it has no `first_order` entry")
        is_fitting = self._trainer is not None and self._trainer.training
        require_same(saved, self._description() | (self._rates() if is_fitting else {}))
        # DeepSpeed has loaded files of its own by now
        if self.train_mode != "full" and set(checkpoint.get("state_dict", self.adapter_names)) != self.adapter_names:
            difference = set(checkpoint["state_dict"]) ^ self.adapter_names
            raise ValueError(
                f"Expected a checkpoint with exactly the adapters of this run, but {len(difference)} are in one only, "
                f"first `{min(difference)}`; use the same `target_modules`, or start a new run"
            )

    def save_adapter(self, directory: str | Path) -> None:
        """Write the adapters as peft does: `adapter_config.json` and `adapter_model.safetensors`.

        They belong on the backbone that they were trained on, pruned where that was pruned. All ranks have to call it,
        as DeepSpeed's stage 3 shares adapters out, too; rank 0 writes.

        Args:
            directory: Where to write.

        Raises:
            ValueError: If there are no adapters.
        """
        check_range(
            "train", self.train_mode, self.train_mode != "full", "lora or tensor_train to have adapters to save"
        )
        if self.train_mode == "tensor_train":
            self._save_tensor_trains(Path(directory))
            return
        self._require_adapters("save")
        with gathered(map(self.get_parameter, self.adapter_names)):
            # `save_embedding_layers` would ask a hub about the vocabulary
            self.__dict__["_peft_model"].save_pretrained(
                str(directory), save_embedding_layers=False, is_main_process=self.global_rank == 0
            )

    def _save_tensor_trains(self, directory: Path) -> None:
        if self.adapters is None:
            raise ValueError("Expected adapters to save, but there are none: they are put in by `setup`")
        with gathered(self.adapters.parameters()):
            if self.global_rank == 0:
                save_adapter_files(directory, self.adapters, self.adapters.description() | self._backbone_description)

    @torch.no_grad()
    def merge(self, keep_mask: bool = False) -> None:
        """Merge the adapters into the backbone, which is a plain model of transformers afterwards.

        A pruned weight plus a product of two factors is a dense weight. So on a pruned backbone this needs
        `keep_mask=True`, which sets what was pruned to zero again: sparse as before, but no longer the function that
        was trained; measure it.

        Args:
            keep_mask: Set the weights that were zero before to zero after the merge.

        Raises:
            ValueError: If there are no adapters, the backbone is pruned and its masks are not to be kept, or its
                weights are shared out over ranks.
        """
        from peft.tuners.lora import LoraLayer

        check_range("train", self.train_mode, self.train_mode == "lora", "lora to have adapters to merge")
        self._require_adapters("merge")
        if any(map(is_shared_out, self.parameters())):
            raise ValueError(
                "Expected whole weights to merge adapters into, but DeepSpeed's stage 3 has shared them out; write the "
                "adapters (`save_adapter`), and merge them in one process"
            )
        layers: dict[str, Any] = {name: m for name, m in self.backbone.named_modules() if isinstance(m, LoraLayer)}
        bases = {name: layer.get_base_layer().weight for name, layer in layers.items()}
        rows_dims = {name: int(getattr(layer, "fan_in_fan_out", False)) for name, layer in layers.items()}
        zeros = {name: base == 0 for name, base in bases.items() if is_pruned(base, rows_dims[name])}
        if zeros and not keep_mask:
            raise ValueError(
                f"Expected argument `keep_mask` to be True for a pruned backbone, but got {keep_mask!r}: merged with "
                f"its adapter a sparse weight is dense, and {len(zeros)} layers such as "
                f"`{next(iter(zeros))}` are sparse; keep the adapters beside the weights (`save_adapter`), "
                "or merge with keep_mask=True, which gives up what the adapters add to pruned places"
            )
        self.__dict__.pop("_peft_model").merge_and_unload(safe_merge=True)
        for name, pruned in zeros.items():
            self.backbone.get_submodule(name).weight.masked_fill_(pruned, 0.0)  # type: ignore[operator]

    def _description(self) -> dict[str, Any]:
        common = {"train": self.train_mode, "backbone_key": self.backbone_key}
        if self.train_mode == "full":
            # `load_from_checkpoint` fills a module that was not set up, which is fine where nothing is missing
            return common if self._backbone_description else {"train": "full"}
        if self.train_mode == "tensor_train":
            assert self.adapters is not None
            return common | self.adapters.description()
        return common | {
            "lora_rank": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "target_modules": self.target_modules,
        }

    def _rates(self) -> dict[str, Any]:
        return describe_rates(self._new_optimizer(), self.lr_scheduler) | {"weight_decay": self.weight_decay}
