"""Put adapters into a model and take them out again, without hooks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.adapters.flat_vector import AdapterVector, Site, TensorTrainVector
from wandazeta.adapters.sites import block_indices, default_sites, parse_site


class VectorModule(nn.Module):
    """A module of the model that reads what is trained about it from a bank.

    Everything else the model may ask of the module (`weight`, `in_features`, …) is answered by the module itself.

    Args:
        base: The module as it was.
        bank: Holder of what is trained; referenced, not registered, as it belongs to whoever injected it.
    """

    bank: AdapterVector

    def __init__(self, base: nn.Module, bank: AdapterVector) -> None:
        super().__init__()
        self.base = base
        # past nn.Module.__setattr__, which would register the bank once per site
        object.__setattr__(self, "bank", bank)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)


class AdaptedModule(VectorModule):
    """A module with an adapter before or after it, or (a subclass) beside it.

    Args:
        base: The module as it was.
        bank: Holder of the adapter.
        index: Which of the bank's sites this is.
        position: Where the adapter sits.
    """

    def __init__(self, base: nn.Module, bank: AdapterVector, index: int, position: str = "beside") -> None:
        super().__init__(base, bank)
        self.index = index
        self.position = position

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module on adapted input, or adapt its output (the first item if it returns a tuple)."""
        if self.position == "before":
            return self.base(self.bank.adapt(self.index, x), *args, **kwargs)
        output = self.base(x, *args, **kwargs)
        if isinstance(output, tuple):
            return (self.bank.adapt(self.index, output[0]), *output[1:])
        return self.bank.adapt(self.index, output)

    def extra_repr(self) -> str:
        """Where the adapter sits, for `print(model)`."""
        return f"position={self.position}"


class TrainedLinear(VectorModule):
    """A Linear whose weight and bias are the bank's; its own, from before the training, are left as they were.

    Args:
        base: The Linear as it was.
        bank: Holder of what is trained.
        name: Name of the Linear in the model.
    """

    def __init__(self, base: nn.Module, bank: AdapterVector, name: str) -> None:
        super().__init__(base, bank)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Apply the Linear."""
        return self.bank.linear(self.name, x)


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
    """Wrap modules of the chosen blocks so that a new bank adapts their input or output.

    The bank starts on the CPU; register it somewhere (`self.adapters = bank`) so that it moves with the model.

    Args:
        model: Model that holds the blocks; changed in place.
        blocks: Its decoder or encoder blocks.
        sites: Adapter places in every block, such as `before:mlp.up_proj`; by default the paper's for LLaMA-like models
            and encoders, else after the last Linear outside attention.
        layers: Which blocks carry adapters; all by default.
        rank: TT rank.
        bottleneck: Inner width of every adapter.
        num_factors: Largest numbers of factors of a site's width and of the bottleneck.
        identity_start: Start with adapters that change nothing; otherwise with the reference's random ones.
        generator: Source of the initial values; seed 0 if not given.
        dtype: Type of the vector and of the adapters' arithmetic.

    Returns:
        The bank with all adapters in its buffer `theta`.

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
    bank = TensorTrainVector(found, rank, bottleneck, num_factors, identity_start, generator, dtype)
    wrap_sites(blocks, bank)
    return bank


def wrap_sites(blocks: nn.ModuleList, bank: TensorTrainVector) -> None:
    """Put the adapters of a bank where its sites are."""
    for site_index, place in enumerate(bank.sites):
        parent_name, _, child = place.name.rpartition(".")
        parent = blocks[place.block].get_submodule(parent_name)
        setattr(parent, child, AdaptedModule(getattr(parent, child), bank, site_index, place.position))


def train_linears(model: nn.Module, bank: AdapterVector, names: Sequence[str]) -> None:
    """Train Linears of a model in full, with the adapters of a bank that are in it.

    Args:
        model: The model; changed in place.
        bank: The bank; its vector grows.
        names: Dotted names of Linears with a bias, such as a new head.
    """
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    bank.append(linears)
    for name, linear in linears.items():
        model.set_submodule(name, TrainedLinear(linear, bank, name))


def remove_adapters(model: nn.Module) -> None:
    """Put the wrapped modules back as they were before `inject_adapters`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            while isinstance(child, VectorModule):
                child = child.base
                setattr(parent, name, child)


def refuse_adapted(model: nn.Module) -> None:
    """Refuse a second set of adapters in a model.

    Raises:
        ValueError: If it has any.
    """
    if any(isinstance(module, VectorModule) for module in model.modules()):
        raise ValueError("Expected a model without adapters, but got one that has them; call remove_adapters first.")


def _refuse_fused(block: nn.Module) -> None:
    if isinstance(block, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            "Expected blocks that call their submodules, but got nn.TransformerEncoderLayer, whose fast path passes "
            "adapters by in eval mode; call torch.backends.mha.set_fastpath_enabled(False) first."
        )
