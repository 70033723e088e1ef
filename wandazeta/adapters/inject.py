"""Insert adapters into a model and remove them again, without hooks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.adapters.flat_vector import AdapterVector
from wandazeta.adapters.sites import block_indices, default_sites, parse_site
from wandazeta.adapters.tensor_train_vector import Site, TensorTrainVector


class AdapterHost(nn.Module):
    """Base class of wrappers around a module of the model, whose trained values are in an `AdapterVector`.

    Other attributes that the model may read (`weight`, `in_features`, …) are those of the wrapped module.

    Args:
        base: The wrapped module.
        vector: Vector with the trained values. It is referenced and not registered, as it belongs to the caller.
    """

    vector: AdapterVector

    def __init__(self, base: nn.Module, vector: AdapterVector) -> None:
        super().__init__()
        self.base = base
        # nn.Module.__setattr__ would register the vector once per site
        object.__setattr__(self, "vector", vector)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)


class AdaptedModule(AdapterHost):
    """A module with an adapter before or after it, or (in a subclass) beside it.

    Args:
        base: The wrapped module.
        vector: Vector with the adapter.
        index: Index of the site in the vector.
        position: Place of the adapter, `before`, `after` or `beside` the module.
    """

    def __init__(self, base: nn.Module, vector: AdapterVector, index: int, position: str = "beside") -> None:
        super().__init__(base, vector)
        self.index = index
        self.position = position

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module on adapted input, or adapt its output (the first item if it returns a tuple)."""
        if self.position == "before":
            return self.base(self.vector.adapt(self.index, x), *args, **kwargs)
        output = self.base(x, *args, **kwargs)
        if isinstance(output, tuple):
            return (self.vector.adapt(self.index, output[0]), *output[1:])
        return self.vector.adapt(self.index, output)

    def extra_repr(self) -> str:
        """Return the place of the adapter, for `print(model)`."""
        return f"position={self.position}"


class TrainedLinear(AdapterHost):
    """A Linear that is trained in full: its weight and bias are in the vector, those of the base keep their values.

    Args:
        base: The wrapped Linear.
        vector: Vector with the trained weight and bias.
        name: Name of the Linear in the model.
    """

    def __init__(self, base: nn.Module, vector: AdapterVector, name: str) -> None:
        super().__init__(base, vector)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Apply the Linear."""
        return self.vector.linear(self.name, x)


def inject_adapters(
    model: nn.Module,
    *,
    blocks: nn.ModuleList,
    sites: Sequence[str] | None = None,
    layers: slice | Sequence[int] | None = None,
    rank: int = 5,
    bottleneck: int = 64,
    num_factors: tuple[int, int] = (3, 3),
    identity_start: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> TensorTrainVector:
    """Insert tensor-train adapters into the chosen blocks of a model.

    The vector is on the CPU; register it (`self.adapters = vector`) so that it moves with the model.

    Args:
        model: Model that contains the blocks; changed in place.
        blocks: Its decoder or encoder blocks.
        sites: Places of adapters in every block, such as `before:mlp.up_proj`; by default AdaZeta's for LLaMA-like
            models and encoders, else after the last Linear outside attention.
        layers: Indices of the blocks with adapters; all by default.
        rank: TT rank.
        bottleneck: Inner width of every adapter.
        num_factors: Largest numbers of factors of a site's width and of the bottleneck.
        identity_start: Start with adapters that change nothing; otherwise with random ones, as AdaZeta's code does.
        generator: Source of the initial values; seed 0 by default.
        dtype: Precision of the vector and of the adapters' arithmetic.

    Returns:
        The vector, with all adapters in its buffer `theta`.

    Raises:
        ValueError: If a site or layer does not exist, or the model has adapters already.
    """
    refuse_adapted(model)
    if sites is not None and not 0 < len(set(sites)) == len(sites):
        raise ValueError(f"Expected argument `sites` to name at least one place and each once, but got {list(sites)}.")
    found = []
    for index in block_indices(layers, len(blocks)):
        _refuse_fused(blocks[index])
        for site in default_sites(blocks[index]) if sites is None else sites:
            position, name, width = parse_site(site, blocks[index])
            found.append(Site(index, name, position, width))
    vector = TensorTrainVector(found, rank, bottleneck, num_factors, identity_start, generator, dtype)
    wrap_sites(blocks, vector)
    return vector


def wrap_sites(blocks: nn.ModuleList, vector: TensorTrainVector) -> None:
    """Wrap the modules at the sites of a vector, so that its adapters apply to them."""
    for site_index, place in enumerate(vector.sites):
        parent_name, _, child = place.name.rpartition(".")
        parent = blocks[place.block].get_submodule(parent_name)
        setattr(parent, child, AdaptedModule(getattr(parent, child), vector, site_index, place.position))


def train_linears(model: nn.Module, vector: AdapterVector, names: Sequence[str]) -> None:
    """Train Linears of a model in full, together with the adapters of a vector.

    Args:
        model: The model; changed in place.
        vector: The vector; their weights and biases are appended to it.
        names: Dotted names of Linears with a bias, such as a new head.
    """
    if not names:
        return
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    vector.append(linears)
    for name, linear in linears.items():
        model.set_submodule(name, TrainedLinear(linear, vector, name))


def adapted_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules of a model that have an adapter."""
    return {module for module in model.modules() if isinstance(module, AdaptedModule)}


def remove_adapters(model: nn.Module) -> None:
    """Replace every wrapper by the module that it wraps, as before the adapters were inserted."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            while isinstance(child, AdapterHost):
                child = child.base
                setattr(parent, name, child)


def refuse_adapted(model: nn.Module) -> None:
    """Raise an error if a model has adapters already.

    Raises:
        ValueError: If it has.
    """
    if any(isinstance(module, AdapterHost) for module in model.modules()):
        raise ValueError("Expected a model without adapters, but got one that has them; call remove_adapters first.")


def _refuse_fused(block: nn.Module) -> None:
    if isinstance(block, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            "Expected blocks that call their submodules, but got nn.TransformerEncoderLayer, whose fast path skips "
            "adapters in eval mode; call torch.backends.mha.set_fastpath_enabled(False) first."
        )
