"""Masks that a pruning wrote, put to the parameters of a module."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from wandazeta.models.zero3 import full_shape
from wandazeta.pruning.export.packed import MASKS_FILE
from wandazeta.pruning.export.pretrained import find_pretrained, names_on_disk
from wandazeta.utilities.arguments import closest_names


def read_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the masks that `wandazeta prune` wrote.

    Args:
        path: A file such as `masks.safetensors`, or the directory with `sparsity/masks.safetensors` in it.

    Returns:
        Bool masks in the layout of the weights, True where a weight is kept, by the name of the weight in its file.

    Raises:
        ValueError: If there is no such file, or it holds no masks.
    """
    file = Path(path)
    if file.is_dir():
        file = file / MASKS_FILE
    if not file.is_file():
        raise ValueError(
            f"Expected argument `masks` to be a {Path(MASKS_FILE).name} or a directory that `wandazeta prune` wrote, "
            f"but got '{path}', where there is none"
        )
    try:
        masks = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"Expected argument `masks` to be a safetensors file, but got '{file}' ({error})") from error
    strange = [name for name, mask in masks.items() if mask.dtype != torch.bool]
    if strange or not masks:
        found = f"{masks[strange[0]].dtype} for `{strange[0]}`" if strange else "nothing"
        raise ValueError(f"Expected argument `masks` to be a file of bool masks, but '{file}' holds {found}")
    return masks


def match_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Puts masks to the names that the weights have in a module.

    Args:
        module: The module; its parameters are called as the masks are, or it holds a transformers model whose files
            call them so.
        masks: Masks by name.

    Returns:
        The same masks by parameter name of `module`.

    Raises:
        ValueError: If a mask belongs to no parameter.
    """
    parameters = dict(module.named_parameters())
    if all(name in parameters for name in masks):
        return dict(masks)
    in_memory = _names_in_memory(module)
    for name in masks:
        if name not in in_memory:
            raise ValueError(
                f"Expected masks of weights of {type(module).__name__}, but it has no `{name}`; "
                f"{closest_names(name, in_memory or parameters)}"
            )
    return {in_memory[name]: mask for name, mask in masks.items()}


def _names_in_memory(module: nn.Module) -> dict[str, str]:
    """Parameter names of the transformers model that a module holds, by the names in the model's files."""
    try:
        prefix, model = find_pretrained(module)
    except ValueError:
        return {}
    names = [name for name, parameter in model.named_parameters() if len(full_shape(parameter)) == 2]
    # numbered, to see under which name in the files each comes out
    numbered = {name: torch.tensor([index]) for index, name in enumerate(names)}
    return {on_disk: f"{prefix}{names[int(number)]}" for on_disk, number in names_on_disk(model, numbered).items()}
