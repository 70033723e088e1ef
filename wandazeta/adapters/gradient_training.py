"""Back-propagation of the trainables: how each of them is inserted, described in checkpoints, saved and merged.

A trainable (`PeftLoRA`, `TensorTrainAdapters`, `Weights`) is a record of options that several modules may share. What
one module does with it is the state of a `GradientTraining`, which the trainable's method `by_gradient` makes.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import nn
from typing_extensions import override

from wandazeta.adapters.card import peft_card
from wandazeta.adapters.flat_vector import AdapterVector
from wandazeta.models.blocks import block_lists
from wandazeta.models.encoder import EncoderClassifier
from wandazeta.models.sharded import is_sharded, whole
from wandazeta.models.sparsity import is_pruned
from wandazeta.utilities.arguments import check_range, closest_names

if TYPE_CHECKING:
    from wandazeta.adapters.trainables import PeftLoRA, TensorTrainAdapters, Weights

__all__ = ["GradientTrainable", "GradientTraining", "PeftLoRATraining", "TensorTrainTraining", "WeightTraining"]


@runtime_checkable
class GradientTrainable(Protocol):
    """A trainable that back-propagation can train."""

    def by_gradient(self) -> "GradientTraining":
        """Return the training of one model.

        Raises:
            ValueError: If an option or an installed package does not allow it.
        """
        ...


class GradientTraining(ABC):
    """Training of one model by back-propagation, from the insertion of adapters to their export.

    Args:
        trainable: Class name of the trainable, as checkpoints and error messages state it.
    """

    has_adapters = True
    """Whether adapters are trained beside a frozen model; otherwise the weights of the model itself are."""

    supports_weight_decay = True
    """Whether matrices and biases are parameters of their own, so that AdamW can decay the matrices alone."""

    def __init__(self, trainable: str) -> None:
        self.trainable = trainable

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Check what can be checked before the model is pruned.

        Args:
            model: The model.

        Raises:
            ValueError: If an option does not fit the model.
        """

    @abstractmethod
    def insert(self, model: nn.Module, seed: int, heads: Sequence[str]) -> AdapterVector | None:
        """Make the trained values trainable parameters, and all others of the model frozen.

        Args:
            model: The model; adapters are inserted in place.
            seed: Seed of the adapters' initial values.
            heads: Dotted names of newly initialised Linears, which are trained in full.

        Returns:
            The module that holds the adapters, if it is not a part of the model.
        """

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Return what a checkpoint has to agree with, in plain values."""

    def require_adapters(self, action: str) -> None:
        """Check that adapters have been inserted.

        Args:
            action: What needs them, to follow "Expected adapters to".

        Raises:
            ValueError: If there are none.
        """
        raise ValueError(
            f"Expected argument `trainable` to be adapters to {action}, but got {self.trainable}, which has none; "
            "`backbone.save_pretrained` saves the weights of the model"
        )

    @abstractmethod
    def save(self, directory: Path, backbone: dict[str, Any], is_main_process: bool) -> None:
        """Write the adapters; every rank calls it while sharded parameters are gathered.

        Args:
            directory: Output directory.
            backbone: Description of the model that the adapters belong to, by `describe_backbone`.
            is_main_process: Whether this rank writes.
        """

    def merge(self, keep_mask: bool) -> None:
        """Merge the adapters into the weights of the model.

        Args:
            keep_mask: Whether weights that were zero before are set to zero after the merge.

        Raises:
            ValueError: If there are no such adapters, or `keep_mask` is missing for a pruned model; before any change.
        """
        raise ValueError(
            f"Expected argument `trainable` to be PeftLoRA to merge adapters, but got {self.trainable}; use PeftLoRA, "
            "or load the adapters beside the weights"
        )


class PeftLoRATraining(GradientTraining):
    """LoRA adapters of peft in a model.

    Args:
        options: Sizes and places of the adapters.
    """

    def __init__(self, options: "PeftLoRA") -> None:
        super().__init__(type(options).__name__)
        self.options = options
        self._peft_model: Any = None
        self._backbone: nn.Module | None = None
        self._num_classes: int | None = None

    @override
    def check(self, model: nn.Module) -> None:
        known = {name for name, module in model.named_modules() if name and not any(module.children())}
        for target in self.options.target_modules or []:
            if not any(name == target or name.endswith(f".{target}") for name in known):
                suggestion = closest_names(target, sorted({name.rpartition(".")[2] for name in known}))
                raise ValueError(
                    f"Expected argument `target_modules` to name modules of the model, but got {target!r}; {suggestion}"
                )

    @override
    def insert(self, model: nn.Module, seed: int, heads: Sequence[str]) -> None:
        from peft import LoraConfig, get_peft_model

        # "all-linear" of peft knows the classes of transformers only, and not an encoder with a new head
        targets = _block_linears(model) if heads else "all-linear"
        config = LoraConfig(
            task_type=None if heads else "CAUSAL_LM",
            r=self.options.rank,
            lora_alpha=self.options.alpha,
            lora_dropout=self.options.dropout,
            target_modules=self.options.target_modules or targets,
            modules_to_save=list(heads) or None,
        )
        # peft wraps the head
        num_classes = model.head.out_features if isinstance(model, EncoderClassifier) else None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # changes the model in place; the wrapper saves and merges
            self._peft_model = get_peft_model(model, config)
        self._backbone = model
        self._num_classes = num_classes

    @override
    def description(self) -> dict[str, Any]:
        return {name: getattr(self.options, name) for name in ("rank", "alpha", "target_modules")}

    @override
    def require_adapters(self, action: str) -> None:
        if self._peft_model is None:
            raise ValueError(
                f"Expected LoRA adapters to {action}, but there are none: `setup` inserts them, which runs in `fit`, "
                "`validate`, `test` and `predict`, and `merge` removes them"
            )

    @override
    def save(self, directory: Path, backbone: dict[str, Any], is_main_process: bool) -> None:
        # FSDP2 shards the adapters together with the blocks
        named = self._peft_model.named_parameters()
        adapters = {name: whole(parameter.detach()) for name, parameter in named if parameter.requires_grad}
        # save_embedding_layers="auto" would ask the hub about the vocabulary
        self._peft_model.save_pretrained(
            str(directory), state_dict=adapters, save_embedding_layers=False, is_main_process=is_main_process
        )
        if not is_main_process:
            return
        config = Path(directory, "adapter_config.json")
        name = backbone.get("backbone", backbone["base_model"])
        settings = json.loads(config.read_text()) | {"base_model_name_or_path": name}
        config.write_text(json.dumps(settings, indent=2) + "\n")
        Path(directory, "README.md").write_text(peft_card(backbone, self._num_classes))

    @override
    def merge(self, keep_mask: bool) -> None:
        self.require_adapters("merge")
        assert self._backbone is not None
        if any(map(is_sharded, self._backbone.parameters())):
            raise ValueError(
                "Expected whole weights to merge adapters into, but the strategy has sharded them; write the adapters "
                "(`save_adapters`), and merge them in one process"
            )
        pruned = self._pruned_weights()
        if pruned and not keep_mask:
            raise ValueError(
                f"Expected argument `keep_mask` to be True for a pruned backbone, but got {keep_mask!r}: merged with "
                f"its adapter a sparse weight becomes dense, and {len(pruned)} layers such as "
                f"`{next(iter(pruned))}` are sparse; keep the adapters beside the weights (`save_adapters`), "
                "or merge with keep_mask=True, which drops the values that the adapters add to pruned weights"
            )
        zeros = {name: weight == 0 for name, weight in pruned.items()}
        self._peft_model.merge_and_unload(safe_merge=True)
        self._peft_model = None
        for name, is_zero in zeros.items():
            self._backbone.get_submodule(name).weight.masked_fill_(is_zero, 0.0)  # type: ignore[operator]

    def _pruned_weights(self) -> dict[str, torch.Tensor]:
        """Return the pruned weights under adapters by the names of their modules."""
        from peft.tuners.lora import LoraLayer

        assert self._backbone is not None
        layers: dict[str, Any] = {n: m for n, m in self._backbone.named_modules() if isinstance(m, LoraLayer)}
        weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
        # Conv1D of GPT-2 stores its weight transposed
        rows_dims = {name: int(getattr(layer, "fan_in_fan_out", False)) for name, layer in layers.items()}
        return {name: weight for name, weight in weights.items() if is_pruned(weight, rows_dims[name])}


class TensorTrainTraining(GradientTraining):
    """Tensor-train adapters in one trainable vector (LoRETTA, arXiv 2402.11417).

    Args:
        options: Sizes and places of the adapters.
    """

    supports_weight_decay = False

    def __init__(self, options: "TensorTrainAdapters") -> None:
        super().__init__(type(options).__name__)
        self.options = options
        self._vector: AdapterVector | None = None

    @override
    def check(self, model: nn.Module) -> None:
        self.options.check(model, num_states=2)

    @override
    def insert(self, model: nn.Module, seed: int, heads: Sequence[str]) -> AdapterVector:
        model.requires_grad_(False)
        self._vector = self.options.insert(model, seed, heads)
        self._vector.train_by_gradient()
        return self._vector

    @override
    def description(self) -> dict[str, Any]:
        return self._inserted("load a checkpoint into").description()

    @override
    def require_adapters(self, action: str) -> None:
        self._inserted(action)

    @override
    def save(self, directory: Path, backbone: dict[str, Any], is_main_process: bool) -> None:
        from wandazeta.adapters.files import save_adapter_files

        if is_main_process:
            vector = self._inserted("save")
            save_adapter_files(directory, vector, vector.description() | backbone)

    def _inserted(self, action: str) -> AdapterVector:
        if self._vector is None:
            raise ValueError(
                f"Expected tensor-train adapters to {action}, but there are none: `setup` inserts them, which runs in "
                "`fit`, `validate`, `test` and `predict`"
            )
        return self._vector


class WeightTraining(GradientTraining):
    """All weights of the model, a new head included.

    Args:
        options: Which weights are trained.

    Raises:
        ValueError: If these are not all weights.
    """

    has_adapters = False

    def __init__(self, options: "Weights") -> None:
        super().__init__(type(options).__name__)
        check_range("parts", options.parts, options.parts == "all", "all to train `Weights` by back-propagation")

    @override
    def check(self, model: nn.Module) -> None:
        pass

    @override
    def insert(self, model: nn.Module, seed: int, heads: Sequence[str]) -> None:
        pass

    @override
    def description(self) -> dict[str, Any]:
        return {}

    @override
    def save(self, directory: Path, backbone: dict[str, Any], is_main_process: bool) -> None:
        self.require_adapters("save")


def _block_linears(model: nn.Module) -> list[str]:
    """Return the dotted names of the Linears in the blocks of a model."""
    return [
        f"{name}.{child}"
        for name, blocks in block_lists(model).items()
        for child, module in blocks.named_modules()
        if isinstance(module, nn.Linear)
    ]
