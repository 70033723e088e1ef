"""What of a model is trained: the choices that a configuration names by class."""

from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
from torch import nn

from wandazeta.adapters.flat_vector import AdapterVector
from wandazeta.adapters.gradient_training import (
    GradientTraining,
    PeftLoRATraining,
    TensorTrainTraining,
    WeightTraining,
)
from wandazeta.adapters.inject import inject_adapters
from wandazeta.adapters.lora import inject_lora
from wandazeta.adapters.sites import unread_modules
from wandazeta.adapters.weights import InPlaceWeights
from wandazeta.models.blocks import find_blocks
from wandazeta.utilities.arguments import check_range, top_blocks


class Trainable(Protocol):
    """Puts what is trained into a model."""

    def check(self, model: nn.Module, num_states: int) -> None:
        """Check what can be told before the model is pruned.

        Args:
            model: The model.
            num_states: Values that the update keeps for each trained one.

        Raises:
            ValueError: If the choice does not fit the model.
        """

    def insert(self, model: nn.Module, seed: int) -> AdapterVector | InPlaceWeights:
        """Change the model in place and return what is trained.

        Args:
            model: A model whose blocks `find_blocks` finds.
            seed: Seed of the start.

        Raises:
            ValueError: If the choice does not fit the model.
        """


class TensorTrainAdapters:
    """Bottleneck adapters whose matrices are tensor trains (AdaZeta, arXiv 2406.18060).

    Args:
        rank: Tensor-train rank.
        bottleneck: Inner width of the adapters.
        sites: Places in every block such as `before:mlp.up_proj`; by default the paper's.
        layers: Blocks with adapters, `all` or the top ones as in `last:2`.
        identity_start: Start with adapters that change nothing; otherwise with the reference's random ones.

    Raises:
        ValueError: If an argument is out of range.
    """

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

    def check(self, model: nn.Module, num_states: int) -> None:
        """Check the layers, as `Trainable.check` says."""
        _, blocks = find_blocks(model)
        _chosen(self.layers, len(blocks))

    def insert(self, model: nn.Module, seed: int) -> AdapterVector:
        """Put the adapters in, as `Trainable.insert` says."""
        _, blocks = find_blocks(model)
        return inject_adapters(
            model,
            blocks=blocks,
            sites=self.sites,
            layers=_chosen(self.layers, len(blocks)),
            rank=self.rank,
            bottleneck=self.bottleneck,
            identity_start=self.identity_start,
            generator=torch.Generator().manual_seed(seed),
        )

    def by_gradient(self) -> GradientTraining:
        """Return the training of one model by back-propagation (LoRETTA, arXiv 2402.11417)."""
        return TensorTrainTraining(self)


class LoRAAdapters:
    """Low-rank factors beside Linears (LoRA, arXiv 2106.09685); trained by plain SGD this is MeZO-LoRA.

    Args:
        rank: Inner width of the factors.
        alpha: Scale of the adapters, which add alpha / rank times their product.
        target_modules: Names of the Linears with adapters; by default all but the head.
        layers: Blocks with adapters, `all` (and what is outside of blocks) or the top ones as in `last:2`.

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

    def check(self, model: nn.Module, num_states: int) -> None:
        """Check the layers, as `Trainable.check` says."""
        _, blocks = find_blocks(model)
        _chosen(self.layers, len(blocks))

    def insert(self, model: nn.Module, seed: int) -> AdapterVector:
        """Put the factors in, as `Trainable.insert` says."""
        _, blocks = find_blocks(model)
        chosen = _chosen(self.layers, len(blocks))
        return inject_lora(
            model,
            targets=self.target_modules,
            within=None if chosen is None else list(blocks)[chosen],
            rank=self.rank,
            alpha=self.alpha,
            generator=torch.Generator().manual_seed(seed),
        )


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


class Weights:
    """The model's own weights, without a copy of them (MeZO, arXiv 2305.17333): in 32 bits, by plain SGD.

    Checkpoints hold them, and a new head is one of them. What is zero in pruned Linears stays zero.

    Args:
        parts: `all` weights, the `biases`, or `biases_and_head` (BitFit and the output embeddings; where these are the
            input embeddings, too, they are trained in both places).

    Raises:
        ValueError: If `parts` is none of these.
    """

    def __init__(self, parts: Literal["all", "biases", "biases_and_head"] = "all") -> None:
        check_range("parts", parts, parts in ("all", "biases", "biases_and_head"), "all, biases or biases_and_head")
        self.parts = parts

    def check(self, model: nn.Module, num_states: int) -> None:
        """Check that there are such weights and that they can be trained, as `Trainable.check` says."""
        if num_states:
            raise ValueError(
                "Expected argument `update` to be SGDUpdate where `Weights` are trained, but got a rule with "
                f"{num_states} values for each weight, as much memory as {num_states} more models; take SGDUpdate"
            )
        InPlaceWeights(model, self._names(model))

    def insert(self, model: nn.Module, seed: int) -> InPlaceWeights:
        """Return what moves the weights; the model stays as it is."""
        return InPlaceWeights(model, self._names(model))

    def by_gradient(self) -> GradientTraining:
        """Return the training of one model by back-propagation.

        Raises:
            ValueError: If `parts` is not all.
        """
        return WeightTraining(self)

    def _names(self, model: nn.Module) -> list[str]:
        unread = {weight for module in unread_modules(model) for weight in module.parameters()}
        names = [name for name, weight in model.named_parameters() if weight not in unread]
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
    number = top_blocks(layers)
    if number is not None and number > num_blocks:
        raise ValueError(
            f"Expected argument `layers` to name at most the {num_blocks} blocks of the model, but got {layers!r}"
        )
    return None if number is None else slice(-number, None)
