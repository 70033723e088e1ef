"""Find and check the layers to prune, and view their weights as (output features, input features)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from wandazeta.models.streaming import is_file_backed
from wandazeta.pruning.options import PruneOptions
from wandazeta.pruning.pattern import SparsityPattern, num_pruned
from wandazeta.utilities.arguments import closest_names

# modules with matrices that no pruning method applies to; they stay dense without an error
_LEFT_DENSE = (nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer stores its weight as (in, out), as transformers' `Conv1D` does."""
    return type(layer).__name__ == "Conv1D"


def weight_view(layer: nn.Linear, tensor: Tensor | None = None) -> Tensor:
    """View the weight of a layer, or a tensor in its layout, with shape (out, in).

    Args:
        layer: A layer from `prunable_layers`.
        tensor: A tensor with the shape of the weight, such as a gradient or a mask; by default the weight.

    Returns:
        A view, which shares its memory with the tensor.
    """
    tensor = layer.weight.detach() if tensor is None else tensor
    return tensor.t() if is_transposed(layer) else tensor


def prunable_layers(block: nn.Module, exclude_modules: Sequence[str] = (), name: str = "") -> dict[str, nn.Linear]:
    """Find the layers of a block that are pruned.

    Args:
        block: The block.
        exclude_modules: Names of modules that stay dense, or regular expressions.
        name: Dotted name of the block in the model.

    Returns:
        The layers by the name of their weight relative to the block, such as `mlp.up_proj.weight`.
    """
    # Conv1D is not a Linear, but has the same attributes
    return {
        f"{layer_name}.weight": cast(nn.Linear, layer)
        for layer_name, layer in block.named_modules()
        if (isinstance(layer, nn.Linear) or is_transposed(layer))
        and not _excluded(f"{name}.{layer_name}", exclude_modules)
    }


def validate_layers(
    blocks: nn.ModuleList, options: PruneOptions, *, model: nn.Module | None = None, block_name: str = "blocks"
) -> None:
    """Check that every block can be pruned, before any work.

    Args:
        blocks: The blocks.
        options: The pruning options.
        model: The model, to find weights of the blocks that it uses elsewhere, too.
        block_name: Dotted name of the list of blocks, for error messages.

    Raises:
        ValueError: If a layer's width does not fit the pattern, an excluded name matches nothing, no layer is left to
            prune, or a block holds matrices that cannot be pruned; the message names them.
    """
    names = {f"{block_name}.{i}.{n}": m for i, block in enumerate(blocks) for n, m in block.named_modules() if n}
    for pattern in options.exclude_modules:
        if not any(_matches(name, pattern) for name in names):
            known = {_name_in_block(name, block_name) for name in names}
            raise ValueError(
                f"Expected argument `exclude_modules` to name modules inside `{block_name}`, but {pattern!r} matches "
                f"none; {closest_names(pattern, sorted(known))}"
            )
    wanted = {name: module for name, module in names.items() if not _excluded(name, options.exclude_modules)}
    for name, module in wanted.items():
        _check_weight(name, module)
    _check_own_matrices(wanted, block_name)
    layers: dict[str, nn.Linear] = {}
    for i, block in enumerate(blocks):
        prefix = f"{block_name}.{i}"
        of_block = {f"{prefix}.{n}": m for n, m in prunable_layers(block, options.exclude_modules, prefix).items()}
        for name, layer in of_block.items():
            _check_width(name, layer, options.pattern.of_block(i, len(blocks)))
        layers |= of_block
    if not layers:
        raise ValueError(
            f"Expected Linear layers to prune in `{block_name}`, but found none; "
            "check `exclude_modules` and the name of the list of blocks"
        )
    _check_shared(layers, model)


def _check_width(name: str, layer: nn.Linear, pattern: SparsityPattern) -> None:
    in_features = weight_view(layer).shape[1]
    remedy = "choose another pattern or add the layer to `exclude_modules`"
    if pattern.group is not None and in_features % pattern.group[1]:
        raise ValueError(
            f"Expected argument `sparsity_pattern` to fit the width of every layer, but {pattern.sparsity_pattern!r} "
            f"does not divide the {in_features} inputs of `{name}`; {remedy}"
        )
    if pattern.group is None and num_pruned(in_features, pattern.target_sparsity) == 0:
        raise ValueError(
            f"Expected argument `sparsity` to remove at least one weight of each row, but {pattern.sparsity:g} of the "
            f"{in_features} inputs of `{name}` rounds down to 0; {remedy}"
        )


def _check_weight(name: str, module: nn.Module) -> None:
    remedy = "add it to `exclude_modules` to leave it dense"
    if not (isinstance(module, nn.Linear) or is_transposed(module)):
        return
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(f"Expected plain weights, but the weight of `{name}` is computed; {remedy}")
    if (weight.is_meta and not is_file_backed(weight)) or weight.numel() == 0:
        raise ValueError(f"Expected complete weights, but `{name}` is on the meta device or sharded; load it first")
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or weight.ndim != 2:
        raise ValueError(
            f"Expected floating-point matrices, but `{name}` ({type(module).__name__}) holds {weight.dtype} of "
            f"shape {tuple(weight.shape)}; prune the model before it is quantized, or {remedy}"
        )


def _check_own_matrices(modules: Mapping[str, nn.Module], block_name: str) -> None:
    """Refuse matrices outside Linear layers: routers, fused 3-D experts, `in_proj_weight` of MultiheadAttention."""
    found: dict[str, str] = {}
    for name, module in modules.items():
        if isinstance(module, (nn.Linear, *_LEFT_DENSE)) or is_transposed(module):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if sum(size > 1 for size in parameter.shape) >= 2:
                kind = "fused experts" if parameter.ndim == 3 else "a matrix"
                what = (
                    f"`{name}` ({type(module).__name__}) holds {kind}, `{parameter_name}` of {tuple(parameter.shape)}"
                )
                found.setdefault(_name_in_block(name, block_name), what)
    if found:
        raise ValueError(
            f"Expected blocks whose matrices are all in Linear layers, but {'; '.join(found.values())}, which cannot "
            f"be pruned; add {', '.join(f'`{name}`' for name in found)} to `exclude_modules` to leave that dense"
        )


def _check_shared(layers: dict[str, nn.Linear], model: nn.Module | None) -> None:
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        other = owners.setdefault(_identity(layer.weight), name)
        if other != name:
            raise ValueError(
                f"Expected weights of their own in every layer, but `{name}` and `{other}` share one; "
                "add both to `exclude_modules` to leave them dense"
            )
    own = {id(layer) for layer in layers.values()}
    # `named_modules` yields each module once, so a second name of the blocks does not count as tied weights
    for name, module in model.named_modules() if model is not None else ():
        for parameter_name, parameter in module.named_parameters(recurse=False) if id(module) not in own else ():
            owner = owners.get(_identity(parameter))
            if owner is not None:
                raise ValueError(
                    f"Expected weights of their own in every layer, but `{owner}` is tied to "
                    f"`{name}.{parameter_name}`; add it to `exclude_modules` to leave it dense"
                )


def _identity(weight: Tensor) -> int:
    # a tensor that is still in its file has no address
    return weight.data_ptr() or id(weight)


def _name_in_block(name: str, block_name: str) -> str:
    return name.removeprefix(f"{block_name}.").split(".", 1)[1]


def _excluded(name: str, exclude_modules: Sequence[str]) -> bool:
    return any(_matches(name, pattern) for pattern in exclude_modules)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a module or one of its parents: by full name, by its last parts, or as an expression."""
    return any(_matches_tail(prefix, pattern) for prefix in _prefixes(name))


def _matches_tail(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}") or re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))
