"""Find and check the layers to prune, and view their weights as (output features, input features)."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from wandazeta.models.blocks import ReadTensors
from wandazeta.models.experts import ExpertLayer, expert_layers, find_routers, fused_weights
from wandazeta.models.peft_layers import adapter_modules, is_adapted
from wandazeta.models.streaming import is_file_backed, materialize
from wandazeta.pruning.options import PruneOptions
from wandazeta.pruning.pattern import SparsityPattern, num_pruned
from wandazeta.utilities.arguments import closest_names

# modules with matrices that no pruning method applies to; they stay dense without an error
_LEFT_DENSE = (nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer stores its weight as (in, out), as transformers' `Conv1D` and some of its experts do."""
    return _is_conv1d(layer) or (isinstance(layer, ExpertLayer) and layer.is_transposed)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


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


class PrunableWeight(NamedTuple):
    """A parameter that is pruned: the weight of a Linear layer, or the fused weights of experts.

    Args:
        module: The module that runs with it.
        parameter: The parameter.
    """

    module: nn.Module
    parameter: nn.Parameter

    @property
    def is_fused(self) -> bool:
        """Whether the parameter holds a weight for every expert."""
        return bool(fused_weights(self.module))

    @property
    def in_features(self) -> int:
        """Number of inputs of the layer, or of each expert's layer."""
        inputs_first = self.module.is_transposed if self.is_fused else _is_conv1d(self.module)
        return self.parameter.shape[-2 if inputs_first else -1]


def prunable_weights(
    block: nn.Module, exclude_modules: Sequence[str] = (), name: str = ""
) -> dict[str, PrunableWeight]:
    """Find the parameters of a block that are pruned: weights of Linears, and fused weights of experts.

    Routers stay dense, and so do the adapters that peft has added.

    Args:
        block: The block.
        exclude_modules: Names of modules that stay dense, or regular expressions.
        name: Dotted name of the block in the model.

    Returns:
        The weights by parameter name relative to the block, such as `mlp.up_proj.weight` or `mlp.experts.down_proj`.
    """
    dense = adapter_modules(block) | find_routers(block)
    return {
        f"{module_name}.{parameter_name}": PrunableWeight(module, getattr(module, parameter_name))
        for module_name, module in block.named_modules()
        if module not in dense
        for parameter_name in _own_weight_names(module)
        if not _excluded(f"{name}.{module_name}.{parameter_name}", exclude_modules)
    }


def _own_weight_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own parameters that pruning methods apply to."""
    return ("weight",) if isinstance(module, nn.Linear) or _is_conv1d(module) else tuple(fused_weights(module))


def prunable_layers(block: nn.Module, exclude_modules: Sequence[str] = (), name: str = "") -> dict[str, nn.Linear]:
    """Find the layers of a block that are pruned: those with the weights that `prunable_weights` finds.

    Args:
        block: The block, inside `split_experts` if it has fused experts.
        exclude_modules: Names of modules that stay dense, or regular expressions.
        name: Dotted name of the block in the model.

    Returns:
        The layers by the name of their weight relative to the block, such as `mlp.up_proj.weight`, or
        `mlp.experts.down_proj[3]` for the fourth expert.
    """
    layers: dict[str, nn.Module] = {}
    for weight_name, weight in prunable_weights(block, exclude_modules, name).items():
        if weight.is_fused:
            own = expert_layers(weight.module, weight_name.rpartition(".")[2])
            layers |= {f"{weight_name}[{index}]": layer for index, layer in enumerate(own)}
        else:
            layers[weight_name] = weight.module
    # Conv1D and the layers of experts are not Linears, but have the same attributes
    return cast(dict[str, nn.Linear], layers)


class _Refusal(ValueError):
    """A block cannot be pruned unless modules are excluded.

    Args:
        problem: What was expected and what was found.
        names: Names in the block to add to `exclude_modules`.
        alternative: Another remedy.
    """

    def __init__(self, problem: str, names: Iterable[str] = (), alternative: str = "") -> None:
        super().__init__(problem)
        self.problem, self.names, self.alternative = problem, list(names), alternative


def validate_layers(
    blocks: nn.ModuleList,
    options: PruneOptions,
    *,
    model: nn.Module | None = None,
    block_name: str = "blocks",
    forward: Callable[[], object] | None = None,
) -> None:
    """Check that every block can be pruned, before any work.

    Args:
        blocks: The blocks.
        options: The pruning options.
        model: The model, to find weights of the blocks that it uses elsewhere, too.
        block_name: Dotted name of the list of blocks, for error messages.
        forward: Runs the model on one calibration sample, to try what an error message suggests.

    Raises:
        ValueError: If a layer's width does not fit the pattern, an excluded name matches nothing, no layer is left to
            prune, a block holds matrices that cannot be pruned, or values are not finite; the message names them.
    """
    try:
        _validate_once(blocks, options, model, block_name)
    except _Refusal as refusal:
        remedy = _remedy(refusal, blocks, options, model, block_name, forward)
        raise ValueError(f"{refusal.problem}; {remedy}") from None
    _check_finite(blocks, options, block_name)


def check_layers_run(
    blocks: nn.ModuleList, options: PruneOptions, block_name: str, forward: Callable[[], object]
) -> set[int]:
    """Check that no layer is bypassed: its weight used, but the layer not called, so that its inputs are not seen.

    Args:
        blocks: The blocks.
        options: The pruning options.
        block_name: Dotted name of the list of blocks.
        forward: Runs the model on one calibration sample.

    Returns:
        Ids of all tensors that the forward has read.

    Raises:
        ValueError: If a layer is bypassed; the message names all of them.
    """
    bypassed, read = _bypassed_layers(blocks, options, block_name, forward)
    if bypassed:
        raise ValueError(
            f"Expected layers that are called, but {', '.join(f'`{name}`' for name in bypassed)} are not, although "
            f"their weights are used; {_exclude(bypassed)}"
        )
    return read


def _bypassed_layers(
    blocks: nn.ModuleList, options: PruneOptions, block_name: str, forward: Callable[[], object]
) -> tuple[list[str], set[int]]:
    """Return the names in the blocks of layers whose weights are used without a call, and the ids of read tensors."""
    weights = [
        (name.removesuffix(".weight"), weight)
        for i, block in enumerate(blocks)
        for name, weight in prunable_weights(block, options.exclude_modules, f"{block_name}.{i}").items()
    ]
    called: set[nn.Module] = set()
    with ExitStack() as hooks, torch.no_grad(), ReadTensors() as mode:
        for _, weight in weights:
            hooks.callback(weight.module.register_forward_pre_hook(lambda module, _: called.add(module)).remove)
        forward()
    bypassed = [name for name, weight in weights if weight.module not in called and id(weight.parameter) in mode.read]
    return list(dict.fromkeys(bypassed)), mode.read


def _exclude(names: Iterable[str]) -> str:
    return f"add {', '.join(f'`{name}`' for name in names)} to `exclude_modules` to leave that dense"


def _remedy(
    refusal: _Refusal,
    blocks: nn.ModuleList,
    options: PruneOptions,
    model: nn.Module | None,
    block_name: str,
    forward: Callable[[], object] | None,
) -> str:
    """Return the remedy for a refusal, after trying it: the names to exclude, if layers are left to prune then."""
    if not refusal.names:
        return refusal.alternative
    names, new = list(refusal.names), list(refusal.names)
    while new:
        trial = replace(options, exclude_modules=(*options.exclude_modules, *names))
        try:
            _validate_once(blocks, trial, model, block_name)
        except _Refusal as other:
            new = [name for name in other.names if name not in names]
        else:
            new = []
            if forward is not None and options.method.uses_calibration:
                # what is wrong with the data or the forward is said once the model fits
                with suppress(Exception):
                    new = _bypassed_layers(blocks, trial, block_name, forward)[0]
            if not new:
                return " or ".join(filter(None, (refusal.alternative, _exclude(names))))
        names += new
    if refusal.alternative:
        return refusal.alternative
    return "nothing else in these blocks can be pruned, so choose another list by `blocks`, or another model"


def _validate_once(blocks: nn.ModuleList, options: PruneOptions, model: nn.Module | None, block_name: str) -> None:
    """Check all but the values of the weights."""
    names = {f"{block_name}.{i}.{n}".rstrip("."): m for i, block in enumerate(blocks) for n, m in block.named_modules()}
    for pattern in options.exclude_modules:
        # the last name of each module, as a pattern matches the names of parents, too
        if not any(_matches(f"{name}.{p}", pattern) for name, m in names.items() for p in ("", *m._parameters)):
            known = {_name_in_block(name, block_name) for name in names} - {""}
            raise ValueError(
                f"Expected argument `exclude_modules` to name modules inside `{block_name}`, but {pattern!r} matches "
                f"none; {closest_names(pattern, sorted(known))}"
            )
    dense = adapter_modules(blocks) | find_routers(blocks)
    wanted = {name: module for name, module in names.items() if module not in dense}
    for name, module in wanted.items():
        for parameter_name in _own_weight_names(module):
            if not _excluded(f"{name}.{parameter_name}", options.exclude_modules):
                _check_weight(name, module, parameter_name, block_name)
    _check_copies(names, options, block_name)
    _check_own_matrices(wanted, options, block_name)
    weights: dict[str, PrunableWeight] = {}
    for i, block in enumerate(blocks):
        prefix = f"{block_name}.{i}"
        of_block = {f"{prefix}.{n}": w for n, w in prunable_weights(block, options.exclude_modules, prefix).items()}
        for name, weight in of_block.items():
            _check_width(name, weight, options.pattern.of_block(i, len(blocks)), block_name)
        weights |= of_block
    if not weights:
        raise _Refusal(
            f"Expected Linear layers to prune in `{block_name}`, but found none",
            alternative="check `exclude_modules` and the name of the list of blocks",
        )
    _check_shared(weights, model, block_name)


def _check_width(name: str, weight: PrunableWeight, pattern: SparsityPattern, block_name: str) -> None:
    in_features = weight.in_features
    problem = None
    if pattern.group is not None and in_features % pattern.group[1]:
        problem = (
            f"Expected argument `sparsity_pattern` to fit the width of every layer, but {pattern.sparsity_pattern!r} "
            f"does not divide the {in_features} inputs of `{name}`"
        )
    if pattern.group is None and num_pruned(in_features, pattern.target_sparsity) == 0:
        problem = (
            f"Expected argument `sparsity` to remove at least one weight of each row, but {pattern.sparsity:g} of the "
            f"{in_features} inputs of `{name}` rounds down to 0"
        )
    if problem is not None:
        raise _Refusal(problem, [_module_in_block(name, block_name)], "choose another pattern")


def _check_weight(name: str, module: nn.Module, parameter_name: str, block_name: str) -> None:
    exclude = [_name_in_block(name, block_name)]
    weight = module._parameters.get(parameter_name)
    if weight is None:
        raise _Refusal(f"Expected plain weights, but the weight of `{name}` is computed", exclude)
    if (weight.is_meta and not is_file_backed(weight)) or weight.numel() == 0:
        raise ValueError(f"Expected complete weights, but `{name}` is on the meta device or sharded; load it first")
    if weight.dtype not in _DTYPES or weight.ndim != (2 if parameter_name == "weight" else 3):
        raise _Refusal(
            f"Expected floating-point matrices, but `{name}` ({type(module).__name__}) holds {weight.dtype} of "
            f"shape {tuple(weight.shape)}",
            exclude,
            "prune the model before it is quantized",
        )


def _check_copies(modules: Mapping[str, nn.Module], options: PruneOptions, block_name: str) -> None:
    """Refuse layers that do not run as they are: copied by `modules_to_save` of peft, or with merged adapters."""
    for name, module in modules.items():
        if _excluded(f"{name}.weight", options.exclude_modules):
            continue
        exclude = [_name_in_block(name, block_name)]
        copied = module._modules.get("original_module") if "modules_to_save" in module._modules else None
        if copied is not None and prunable_weights(copied):
            raise _Refusal(
                f"Expected layers that run, but `{name}` runs a copy that peft's `modules_to_save` has made", exclude
            )
        if is_adapted(module) and fused_weights(module.get_submodule("base_layer")):
            raise _Refusal(f"Expected experts without adapters, but peft has put some on those of `{name}`", exclude)
        if is_adapted(module) and getattr(module, "merged", False):
            raise _Refusal(
                f"Expected adapters beside their base layers, but those of `{name}` are merged into its weight",
                exclude,
                "call `unmerge_adapter()`",
            )


def _check_own_matrices(modules: Mapping[str, nn.Module], options: PruneOptions, block_name: str) -> None:
    """Refuse matrices that are neither of Linears nor experts of transformers, such as those of MultiheadAttention."""
    found: dict[str, str] = {}
    for name, module in modules.items():
        if isinstance(module, _LEFT_DENSE) or _own_weight_names(module):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if _excluded(f"{name}.{parameter_name}", options.exclude_modules):
                continue
            if sum(size > 1 for size in parameter.shape) >= 2:
                kind = "fused experts of an unknown kind" if parameter.ndim == 3 else "a matrix"
                what = (
                    f"`{name}` ({type(module).__name__}) holds {kind}, `{parameter_name}` of {tuple(parameter.shape)}"
                )
                # the Linears of a module can be pruned without its own matrices, but that of MultiheadAttention never
                # runs as a module
                by_parameter = bool(prunable_weights(module)) and not isinstance(module, nn.MultiheadAttention)
                exclude = f"{name}.{parameter_name}" if by_parameter else name
                found.setdefault(_name_in_block(exclude, block_name), what)
    if found:
        raise _Refusal(
            f"Expected blocks whose matrices are all in Linear layers, but {'; '.join(found.values())}, which cannot "
            "be pruned",
            found,
        )


def _check_shared(weights: dict[str, PrunableWeight], model: nn.Module | None, block_name: str) -> None:
    owners: dict[int, str] = {}
    for name, weight in weights.items():
        other = owners.setdefault(_identity(weight.parameter), name)
        if other != name:
            raise _Refusal(
                f"Expected weights of their own in every layer, but `{name}` and `{other}` share one",
                dict.fromkeys(_module_in_block(owner, block_name) for owner in (name, other)),
            )
    own = {id(weight.module) for weight in weights.values()}
    # `named_modules` yields each module once, so a second name of the blocks does not count as tied weights
    for name, module in model.named_modules() if model is not None else ():
        for parameter_name, parameter in module.named_parameters(recurse=False) if id(module) not in own else ():
            owner = owners.get(_identity(parameter))
            if owner is not None:
                raise _Refusal(
                    f"Expected weights of their own in every layer, but `{owner}` is tied to `{name}.{parameter_name}`",
                    [_module_in_block(owner, block_name)],
                )


def _check_finite(blocks: nn.ModuleList, options: PruneOptions, block_name: str) -> None:
    """Refuse values that are not finite: comparisons with NaN would prune complete rows, or at random."""
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            has_values = parameter.dtype in _DTYPES and (is_file_backed(parameter) or not parameter.is_meta)
            if has_values and not _excluded(f"{block_name}.{index}.{name}", options.exclude_modules):
                require_finite("weights", name, index, materialize(parameter))


def require_finite(what: str, name: str, index: int, values: Tensor) -> None:
    """Refuse values that are not finite.

    Args:
        what: What the values are, such as `weights`.
        name: Name of their layer in the block.
        index: Position of the block.
        values: The values.

    Raises:
        ValueError: If there are infinities or NaN.
    """
    if not bool(values.detach().isfinite().all()):
        raise ValueError(
            f"Expected finite {what} of `{name}` in block {index}, but got infinities or NaN in "
            f"{str(values.dtype).removeprefix('torch.')}; check the model, and give one that overflows float16 in "
            "bfloat16 or float32"
        )


def require_all_finite(values: Sequence[tuple[str, str, Tensor]], index: int) -> None:
    """Refuse values of a block that are not finite, with one read of the device for all.

    Args:
        values: What the values are, the name of their layer, and the values, as for `require_finite`.
        index: Position of the block.

    Raises:
        ValueError: If there are infinities or NaN.
    """
    finite = torch.stack([tensor.isfinite().all() for *_, tensor in values]).tolist() if values else []
    for (what, name, tensor), is_finite in zip(values, finite, strict=True):
        if not is_finite:
            require_finite(what, name, index, tensor)


def _identity(weight: Tensor) -> int:
    # a tensor that is still in its file has no address
    return weight.data_ptr() or id(weight)


def _module_in_block(weight_name: str, block_name: str) -> str:
    return _name_in_block(weight_name.removesuffix(".weight"), block_name)


def _name_in_block(name: str, block_name: str) -> str:
    """Return the name of a module or parameter without the list of blocks and the position of the block."""
    return name.removeprefix(f"{block_name}.").partition(".")[2]


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
