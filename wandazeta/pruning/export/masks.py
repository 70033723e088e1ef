"""Load mask files and match them to parameters."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from wandazeta.models.pretrained import join_on_disk, names_in_memory
from wandazeta.models.zero3 import full_shape
from wandazeta.utilities.arguments import closest_names

__all__ = ["MASKS_FILE", "match_masks", "read_masks"]

# not beside config.json: some loaders read every safetensors file there as weights
MASKS_FILE = "sparsity/masks.safetensors"


def read_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load the masks that `wandazeta prune` wrote.

    Args:
        path: A mask file, or a directory that holds `sparsity/masks.safetensors`.

    Returns:
        Bool masks in the shape of the weights, True where a weight is kept, by the name of the weight in its file.

    Raises:
        ValueError: If there is no such file, or it holds anything but masks.
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
    other = next((name for name, mask in masks.items() if mask.dtype != torch.bool), None)
    if other is not None or not masks:
        found = f"`{other}` of type {masks[other].dtype}" if other is not None else "no tensors"
        raise ValueError(f"Expected argument `masks` to be a file of bool masks, but '{file}' holds {found}")
    return masks


def match_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename masks to the parameter names of a module.

    Args:
        module: A module with parameters of the masks' names, or one that holds a transformers model whose files use
            these names.
        masks: Masks by name.

    Returns:
        The same masks by parameter name of `module`; those of experts that are fused in memory are put together.

    Raises:
        ValueError: If there is no parameter for a mask, or no mask for a part of a parameter.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if all(name in parameters for name in masks):
        return dict(masks)
    in_memory = names_in_memory(module)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, mask in masks.items():
        if name not in in_memory:
            raise ValueError(
                f"Expected masks of weights of {type(module).__name__}, but it has no `{name}`; "
                f"{closest_names(name, in_memory or parameters)}"
            )
        by_parameter.setdefault(in_memory[name], {})[name] = mask
    fused = {name for name, parameter in parameters.items() if len(full_shape(parameter)) == 3}
    return {
        name: join_on_disk(module, name, pieces) if name in fused else next(iter(pieces.values()))
        for name, pieces in by_parameter.items()
    }
