"""Sites of adapters: the modules of a decoder or encoder block that have one."""

from collections.abc import Iterable, Sequence

from torch import nn

from wandazeta.models.zero3 import full_shape
from wandazeta.protocols import HasUnusedModules
from wandazeta.utilities.arguments import closest_names

_GATED = ("gate_proj", "up_proj", "down_proj")
# the first family that the block has all modules of is used
_ENCODERS = (
    ("attention.output.dense", "output.dense"),  # BERT, RoBERTa, ELECTRA
    ("attention.attn.o", "output.dense"),  # MPNet
    ("attention.out_lin", "ffn.lin2"),  # DistilBERT
    ("attn.Wo", "mlp.Wo"),  # ModernBERT
)


def default_sites(block: nn.Module) -> list[str]:
    """Choose the sites of one block, written `position:name`.

    1. A gated MLP as in LLaMA (siblings `gate_proj`, `up_proj`, `down_proj`): before the first two, after the last.
    2. An encoder like BERT: after the attention's output and after the MLP's output, before each residual.
    3. Any other block: after its last Linear (in order of registration) that is outside attention and as wide as the
       block's norms.

    Routed experts have none by default, because an adapter there would see only some of the tokens.

    Raises:
        ValueError: If the block has no such Linear.
    """
    names = [name for name, _ in block.named_modules() if name and "expert" not in name]
    for name in names:
        parent = name.removesuffix(_GATED[0])
        if parent != name and all(parent + part in names for part in _GATED):
            return [f"before:{parent}gate_proj", f"before:{parent}up_proj", f"after:{parent}down_proj"]
    for family in _ENCODERS:
        if all(name in names for name in family):
            return [f"after:{name}" for name in family]
    norms = {name: width for name, child in block.named_children() if (width := _norm_width(child)) is not None}
    widths = set(norms.values())
    linears = [
        name
        for name in names
        if is_linear(module := block.get_submodule(name))
        and not any(part in name.lower() for part in ("attn", "attention"))
        and (len(widths) != 1 or _width(module, "after") in widths)
    ]
    if not linears:
        raise ValueError(
            f"Expected blocks with an MLP whose last Linear can carry an adapter, but got {type(block).__name__}; "
            f"name the sites in argument `sites`, such as 'after:{next(reversed(norms), 'mlp.out')}'."
        )
    return [f"after:{linears[-1]}"]


def parse_site(site: str, block: nn.Module) -> tuple[str, str, int]:
    """Split `position:name`, check that the block has the module, and look up its width.

    Returns:
        Position, name inside the block, and number of features.

    Raises:
        ValueError: If the text is malformed, the block has no such module or the module has no width.
    """
    position, _, name = site.partition(":")
    if position not in ("before", "after") or not name:
        raise ValueError(
            f"Expected argument `sites` to hold texts like 'before:mlp.up_proj' or 'after:mlp.down_proj', "
            f"but got {site!r}."
        )
    names = [known for known, _ in block.named_modules() if known]
    if name not in names:
        raise ValueError(
            f"Expected argument `sites` to name modules of {type(block).__name__}, but got {site!r}; "
            f"{closest_names(name, names)}"
        )
    width = _width(block.get_submodule(name), position)
    if width is None:
        raise ValueError(
            f"Expected argument `sites` to name a Linear or a norm, but got {site!r}, whose width is unknown; "
            f"name one of {[known for known in names if _width(block.get_submodule(known), position)]}."
        )
    return position, name, width


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, transformers' transposed `Conv1D` included."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def unused_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules that a model lists as unused (see `HasUnusedModules`), with all modules inside them."""
    unused: Sequence[nn.Module] = model.unused_modules if isinstance(model, HasUnusedModules) else []
    return {inner for module in unused for inner in module.modules()}


def block_indices(layers: slice | Sequence[int] | None, num_blocks: int) -> list[int]:
    """Return the indices of the chosen blocks in ascending order; negative ones count from the end.

    Raises:
        ValueError: If nothing is chosen or an index is out of range.
    """
    chosen: Iterable[int] = range(num_blocks)
    if isinstance(layers, slice):
        chosen = range(num_blocks)[layers]
    elif layers is not None:
        chosen = layers
        if any(not -num_blocks <= index < num_blocks for index in layers):
            raise ValueError(
                f"Expected argument `layers` to hold indices of the {num_blocks} blocks, but got {list(layers)}."
            )
    indices = sorted({index % num_blocks for index in chosen})
    if not indices:
        raise ValueError(f"Expected argument `layers` to choose at least one of {num_blocks} blocks, but got {layers}.")
    return indices


def _width(module: nn.Module, position: str) -> int | None:
    features = getattr(module, "in_features" if position == "before" else "out_features", None)
    if isinstance(features, int):
        return features
    if is_linear(module):
        return full_shape(module.get_parameter("weight"))[0 if position == "before" else 1]
    return _norm_width(module)


def _norm_width(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    shape = () if weight is None else full_shape(weight)
    return shape[0] if len(shape) == 1 else None
