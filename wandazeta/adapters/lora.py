"""LoRA adapters of a model in one flat vector, with many perturbed copies at once (Hu et al., arXiv 2106.09685).

The output of a Linear becomes `y = x W + (alpha / rank) (x Aᵀ) Bᵀ`, with A `(r, in)` and B `(out, r)` as in peft.
Legend: P perturbed copies, d length of the vector, N rows of a copy, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from wandazeta.adapters.flat_vector import AdapterVector
from wandazeta.adapters.inject import AdaptedModule, refuse_adapted
from wandazeta.adapters.sites import is_linear, unused_modules
from wandazeta.models.zero3 import full_shape
from wandazeta.utilities.arguments import closest_names


@dataclass(frozen=True)
class LoRASite:
    """A Linear with LoRA factors.

    Args:
        name: Dotted name in the model.
        in_features: Input width.
        out_features: Output width.
    """

    name: str
    in_features: int
    out_features: int


class LoRAMatrices(NamedTuple):
    """The factors of one site, with or without leading P, and their scale."""

    A: Tensor
    B: Tensor
    scale: float

    def apply(self, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        """Return the addition to the output of the Linear for inputs `(…, in)`: `(…, out)`, in the factors' dtype."""
        x_ND = x.reshape(*rows, x.shape[-1]).to(self.A.dtype)
        added = (x_ND @ self.A.mT).mul_(self.scale) @ self.B.mT
        return added.reshape(*x.shape[:-1], added.shape[-1])


class LoRALayout:
    """Positions of the factors in the flat vector: A, then B, site after site.

    Args:
        sites: The Linears.
        rank: Inner width.
        alpha: Numerator of the scale alpha / rank.
    """

    def __init__(self, sites: Sequence[LoRASite], rank: int, alpha: float) -> None:
        self.rank = rank
        self.alpha = alpha
        self.shapes = [((rank, site.in_features), (site.out_features, rank)) for site in sites]
        self.starts = [0]
        for site in sites:
            self.starts.append(self.starts[-1] + rank * (site.in_features + site.out_features))
        self.num_parameters = self.starts[-1]

    def merge(self, theta: Tensor) -> list[LoRAMatrices]:
        """Return the factors of all sites, as views of vectors `(…, num_parameters)`."""
        return [self.merge_site(theta, site) for site in range(len(self.shapes))]

    def merge_site(self, theta: Tensor, site: int) -> LoRAMatrices:
        """Return the factors of one site."""
        shape_A, shape_B = self.shapes[site]
        start, middle, end = self.starts[site], self.starts[site] + shape_A[0] * shape_A[1], self.starts[site + 1]
        A = theta[..., start:middle].unflatten(-1, shape_A)
        return LoRAMatrices(A, theta[..., middle:end].unflatten(-1, shape_B), self.alpha / self.rank)

    def bias_slices(self) -> list[slice]:
        """Return no slices: LoRA has no biases."""
        return []

    def initial(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Return an initial vector as peft's: A uniform within `±1 / sqrt(in)` (Kaiming with a = sqrt(5)), B zero."""
        theta = torch.zeros(self.num_parameters, dtype=dtype, device="cpu")
        for site in range(len(self.shapes)):
            nn.init.kaiming_uniform_(self.merge_site(theta, site).A, a=sqrt(5), generator=generator)
        return theta


class LoRAVector(AdapterVector):
    """The LoRA factors of a model.

    Args:
        sites: The Linears.
        rank: Inner width.
        alpha: Scale of the adapters, which add alpha / rank times their product.
        generator: Source of the initial values; seed 0 by default.
        dtype: Precision of the vector and of the adapters' arithmetic.
    """

    layout: LoRALayout

    def __init__(
        self,
        sites: Sequence[LoRASite],
        rank: int = 8,
        alpha: float = 16,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        layout = LoRALayout(sites, rank, alpha)
        with torch.inference_mode(False):
            theta = layout.initial(generator or torch.Generator().manual_seed(0), dtype)
        super().__init__(layout, theta)
        self.sites = tuple(sites)

    @override
    def adapter_description(self) -> dict[str, Any]:
        return {
            "kind": "lora",
            "rank": self.layout.rank,
            "alpha": self.layout.alpha,
            "sites": [f"{site.name}:{site.in_features}:{site.out_features}" for site in self.sites],
        }

    file_name = "adapter_model.safetensors"

    @override
    def tensors(self) -> dict[str, Tensor]:
        named = {name: factor.detach() for name, factor in self.factors().items()} | self.linear_tensors()
        return {f"base_model.model.{name}": tensor for name, tensor in named.items()}

    @override
    def peft_config(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "task_type": None if self.linear_shapes else "CAUSAL_LM",
            "r": self.layout.rank,
            "lora_alpha": self.layout.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": [site.name for site in self.sites],
            "modules_to_save": list(self.linear_shapes) or None,
            "inference_mode": True,
        }

    def factors(self) -> dict[str, Tensor]:
        """Return views of both factors of every site, by peft's names `<module>.lora_{A,B}.weight`."""
        named: dict[str, Tensor] = {}
        for site, matrices in zip(self.sites, self.layout.merge(self.theta), strict=True):
            named |= {f"{site.name}.lora_A.weight": matrices.A, f"{site.name}.lora_B.weight": matrices.B}
        return named


class LoRAModule(AdaptedModule):
    """A Linear with low-rank factors beside it."""

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the Linear and add the output of the factors."""
        output = self.base(x, *args, **kwargs)
        return self.vector.adapt(self.index, x).add_(output).to(output.dtype)


def inject_lora(
    model: nn.Module,
    *,
    targets: Sequence[str] | None = None,
    within: Sequence[nn.Module] | None = None,
    rank: int = 8,
    alpha: float = 16,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoRAVector:
    """Insert LoRA adapters beside Linears of a model.

    The vector is on the CPU; register it (`self.adapters = vector`) so that it moves with the model.

    Args:
        model: The model; changed in place.
        targets: Names of the Linears, in full or their last parts; by default all except the output embeddings.
        within: Only Linears inside these modules, such as the top blocks; by default of the whole model.
        rank: Inner width.
        alpha: Scale of the adapters, which add alpha / rank times their product.
        generator: Source of the initial values; seed 0 by default.
        dtype: Precision of the vector and of the adapters' arithmetic.

    Returns:
        The vector, with all factors in its buffer `theta`.

    Raises:
        ValueError: If a target is no Linear of the model, or the model has adapters already.
    """
    refuse_adapted(model)
    output_embeddings: Any = getattr(model, "get_output_embeddings", None)
    head = None if output_embeddings is None else output_embeddings()
    left_out = {head, *unused_modules(model)}
    linears: dict[str, Any] = {n: m for n, m in model.named_modules() if is_linear(m) and m not in left_out}
    for target in targets or []:
        if not any(_is_named(name, target) for name in linears):
            raise ValueError(
                f"Expected argument `targets` to name Linears of the model other than its head, but got {target!r}; "
                f"{closest_names(target, sorted({name.rpartition('.')[2] for name in linears}))}."
            )
    inside = None if within is None else {inner for module in within for inner in module.modules()}
    found = {
        name: linear
        for name, linear in linears.items()
        if (targets is None or any(_is_named(name, target) for target in targets))
        and (inside is None or linear in inside)
    }
    if not found:
        raise ValueError("Expected Linears for LoRA adapters, but the chosen part of the model has none.")
    vector = LoRAVector(
        [LoRASite(name, *_widths(linear)) for name, linear in found.items()], rank, alpha, generator, dtype
    )
    wrap_linears(model, vector)
    return vector


def wrap_linears(model: nn.Module, vector: LoRAVector) -> None:
    """Wrap the Linears at the sites of a vector, so that its factors apply beside them."""
    for index, site in enumerate(vector.sites):
        parent, _, child = site.name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRAModule(model.get_submodule(site.name), vector, index))


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _widths(linear: nn.Module) -> tuple[int, int]:
    # the Conv1D of transformers is transposed and has no attributes for its widths
    rows, columns = full_shape(linear.get_parameter("weight"))
    return (columns, rows) if isinstance(linear, nn.Linear) else (rows, columns)
