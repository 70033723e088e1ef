"""Choices of what is trained of a model, which a configuration names by their classes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from typing_extensions import override

from wandazeta.adapters.flat_vector import AdapterVector
from wandazeta.adapters.gradient_training import (
    GradientTraining,
    PeftLoRATraining,
    TensorTrainTraining,
    WeightTraining,
)
from wandazeta.adapters.inject import inject_adapters, train_linears
from wandazeta.adapters.lora import inject_lora
from wandazeta.adapters.sites import unused_modules
from wandazeta.adapters.trained_vector import TrainedVector
from wandazeta.adapters.weights import InPlaceWeights
from wandazeta.models.blocks import find_blocks
from wandazeta.utilities.arguments import check_choice, check_range, top_blocks


class Trainable(ABC):
    """Base class of what can be trained by forward passes alone."""

    needs_whole_weights = False
    """Whether the weights of the model must not be sharded, nor copied by the strategy."""
    has_explicit_directions = True
    """Whether directions are vectors of values, which can have any distribution and be compared with each other."""
    has_separate_head = True
    """Whether a new head can have its own gradient and learning rate."""
    supports_answers = False
    """Whether a head over the scores of answer options can be trained in addition, and saved."""

    @property
    def trains_new_head(self) -> bool:
        """Whether the new head of an encoder is trained."""
        return True

    @abstractmethod
    def check(self, model: nn.Module, num_states: int) -> None:
        """Check what can be checked before the model is pruned.

        Args:
            model: The model.
            num_states: State values of the update rule for each trained value.

        Raises:
            ValueError: If the choice does not fit the model.
        """

    @abstractmethod
    def insert(self, model: nn.Module, seed: int, linears: Sequence[str] = ()) -> TrainedVector:
        """Change the model in place and return the vector of what is trained.

        Args:
            model: A model whose blocks `find_blocks` finds.
            seed: Seed of the initial values.
            linears: Dotted names of Linears to train in full, such as a new head.

        Raises:
            ValueError: If the choice does not fit the model.
        """


class TensorTrainAdapters(Trainable):
    """Bottleneck adapters whose matrices are tensor trains (AdaZeta, arXiv 2406.18060).

    Args:
        rank: Tensor-train rank.
        bottleneck: Inner width of the adapters.
        sites: Places in every block such as `before:mlp.up_proj`; by default AdaZeta's.
        layers: Blocks with adapters, `all` or the top ones as in `last:2`.
        identity_start: Start with adapters that change nothing; otherwise with random ones, as AdaZeta's code does.

    Raises:
        ValueError: If an argument is out of range.
    """

    supports_answers = True

    def __init__(
        self,
        rank: int = 5,
        bottleneck: int = 64,
        sites: list[str] | None = None,
        layers: str = "all",
        identity_start: bool = True,
    ) -> None:
        check_range("rank", rank, rank >= 1, "at least 1")
        check_range("bottleneck", bottleneck, bottleneck >= 1, "at least 1")
        top_blocks(layers)
        self.rank = rank
        self.bottleneck = bottleneck
        self.sites = sites
        self.layers = layers
        self.identity_start = identity_start

    @override
    def check(self, model: nn.Module, num_states: int) -> None:
        _, blocks = find_blocks(model)
        _chosen(self.layers, len(blocks))

    @override
    def insert(self, model: nn.Module, seed: int, linears: Sequence[str] = ()) -> AdapterVector:
        _, blocks = find_blocks(model)
        vector = inject_adapters(
            model,
            blocks=blocks,
            sites=self.sites,
            layers=_chosen(self.layers, len(blocks)),
            rank=self.rank,
            bottleneck=self.bottleneck,
            identity_start=self.identity_start,
            generator=torch.Generator().manual_seed(seed),
        )
        train_linears(model, vector, linears)
        return vector

    def by_gradient(self) -> GradientTraining:
        """Return the training of one model by back-propagation (LoRETTA, arXiv 2402.11417)."""
        return TensorTrainTraining(self)


class LoRAAdapters(Trainable):
    """LoRA adapters beside Linears (arXiv 2106.09685); trained with SGDUpdate this is MeZO-LoRA.

    Args:
        rank: Inner width of the factors.
        alpha: Scale of the adapters, which add alpha / rank times their product.
        target_modules: Names of the Linears with adapters; by default all except the head.
        layers: Blocks with adapters, `all` (Linears outside of blocks included) or the top ones as in `last:2`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, rank: int = 8, alpha: float = 16, target_modules: list[str] | None = None, layers: str = "all"
    ) -> None:
        check_range("rank", rank, rank >= 1, "at least 1")
        check_range("alpha", alpha, alpha > 0, "above 0")
        check_range("target_modules", target_modules, target_modules != [], "one name or more")
        top_blocks(layers)
        self.rank = rank
        self.alpha = alpha
        self.target_modules = target_modules
        self.layers = layers

    @override
    def check(self, model: nn.Module, num_states: int) -> None:
        _, blocks = find_blocks(model)
        _chosen(self.layers, len(blocks))

    @override
    def insert(self, model: nn.Module, seed: int, linears: Sequence[str] = ()) -> AdapterVector:
        _, blocks = find_blocks(model)
        chosen = _chosen(self.layers, len(blocks))
        vector = inject_lora(
            model,
            targets=self.target_modules,
            within=None if chosen is None else list(blocks)[chosen],
            rank=self.rank,
            alpha=self.alpha,
            generator=torch.Generator().manual_seed(seed),
        )
        train_linears(model, vector, linears)
        return vector


class PeftLoRA:
    """LoRA adapters of the package peft (arXiv 2106.09685), trained by back-propagation.

    Args:
        rank: Inner width of the factors.
        alpha: Scale of the adapters, which add alpha / rank times their product.
        dropout: Dropout probability at the input of the adapters.
        target_modules: Names of the modules with adapters; by default all Linears except the head, and of an encoder
            those of its blocks.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, rank: int = 8, alpha: int = 16, dropout: float = 0.0, target_modules: list[str] | None = None
    ) -> None:
        check_range("rank", rank, rank >= 1, "at least 1")
        check_range("alpha", alpha, alpha > 0, "above 0")
        check_range("dropout", dropout, 0 <= dropout < 1, "at least 0 and below 1")
        check_range("target_modules", target_modules, target_modules != [], "one name or more")
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.target_modules = target_modules

    def by_gradient(self) -> GradientTraining:
        """Return the training of one model by back-propagation.

        Raises:
            ValueError: If peft is not installed.
        """
        if find_spec("peft") is None:
            raise ValueError(
                "Expected the package peft for PeftLoRA, but it is not installed; run `pip install peft`, or set "
                "`trainable` to TensorTrainAdapters or Weights"
            )
        return PeftLoRATraining(self)


class Weights(Trainable):
    """The model's own weights, without a copy of them (MeZO, arXiv 2305.17333); in float32, with SGDUpdate.

    Checkpoints contain the trained weights, a new head included. Zeros in pruned Linears stay zero.

    Args:
        parts: `all` weights, the `biases`, or `biases_and_head` (BitFit and the output embeddings; if these are tied to
            the input embeddings, both are trained).

    Raises:
        ValueError: If `parts` is none of these.
    """

    needs_whole_weights = True
    has_explicit_directions = False
    has_separate_head = False

    def __init__(self, parts: Literal["all", "biases", "biases_and_head"] = "all") -> None:
        check_choice("parts", parts, ("all", "biases", "biases_and_head"))
        self.parts = parts

    @property
    @override
    def trains_new_head(self) -> bool:
        return self.parts != "biases"

    @override
    def check(self, model: nn.Module, num_states: int) -> None:
        if num_states:
            raise ValueError(
                "Expected argument `update` to be SGDUpdate if `Weights` are trained, but got a rule with "
                f"{num_states} state values for each weight, which need the memory of {num_states} more models; use "
                "SGDUpdate"
            )
        InPlaceWeights(model, self._names(model))

    @override
    def insert(self, model: nn.Module, seed: int, linears: Sequence[str] = ()) -> InPlaceWeights:
        # the model is unchanged; Linears of `linears` are among its weights
        return InPlaceWeights(model, self._names(model))

    def by_gradient(self) -> GradientTraining:
        """Return the training of one model by back-propagation.

        Raises:
            ValueError: If `parts` is not all.
        """
        return WeightTraining(self)

    def _names(self, model: nn.Module) -> list[str]:
        """Return the names of the trained parameters."""
        unused = {weight for module in unused_modules(model) for weight in module.parameters()}
        names = [name for name, weight in model.named_parameters() if weight not in unused]
        if self.parts == "all":
            return names
        output_embeddings: Any = getattr(model, "get_output_embeddings", None)
        head = list(output_embeddings().parameters()) if output_embeddings and self.parts != "biases" else []
        chosen = [n for n in names if n.endswith("bias") or any(model.get_parameter(n) is weight for weight in head)]
        if not any(name.endswith("bias") for name in chosen):
            raise ValueError(
                f"Expected a model with biases for argument `parts`, but {type(model).__name__} has none; "
                "train all weights, or adapters"
            )
        return chosen


def _chosen(layers: str, num_blocks: int) -> slice | None:
    """Return the slice of the blocks that `layers` names, or None for all."""
    number = top_blocks(layers)
    if number is not None and number > num_blocks:
        raise ValueError(
            f"Expected argument `layers` to name at most the {num_blocks} blocks of the model, but got {layers!r}"
        )
    return None if number is None else slice(-number, None)
