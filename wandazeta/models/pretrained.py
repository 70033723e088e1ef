"""Find a transformers model in a module, and the names that its tensors have in its files."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.models.peft_layers import without_adapters
from wandazeta.models.streaming import is_file_backed, materialize
from wandazeta.models.zero3 import full_shape

__all__ = [
    "find_pretrained",
    "has_save_pretrained",
    "is_streamed",
    "join_on_disk",
    "names_in_memory",
    "names_on_disk",
]


def has_save_pretrained(thing: Any) -> bool:
    """Whether an object can write itself as part of a Hugging Face directory, as models and tokenizers do."""
    return callable(getattr(thing, "save_pretrained", None))


def is_streamed(model: nn.Module) -> bool:
    """Whether weights of a model are stored in files and not in memory (`wandazeta.models.streaming`)."""
    return any(is_file_backed(parameter) for parameter in model.parameters())


def find_pretrained(module: nn.Module) -> tuple[str, nn.Module]:
    """Find the transformers model that a module holds.

    Args:
        module: A transformers model, or a module that holds one.

    Returns:
        The dotted name of the model with a trailing dot (empty for the module itself), and the model.

    Raises:
        ValueError: If there is none.
    """
    for name, child in module.named_modules():
        # wrappers of peft hold the model that they seem to be
        is_wrapper = any(hasattr(type(child), name) for name in ("get_base_model", "inject_adapter"))
        if has_save_pretrained(child) and hasattr(child, "config") and not is_wrapper:
            return f"{name}." if name else "", child
    raise ValueError(
        f"Expected {type(module).__name__} to hold a transformers model, which can be written as a Hugging Face "
        "directory, but found none; use `fit` with the callback for other modules."
    )


def names_on_disk(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from the parameter names in memory to the names in the model's files.

    The two differ where transformers has changed the structure of a model and keeps the original names in files, and
    where peft has put adapters around layers. Tensors of adapters are left out.

    Args:
        model: The model.
        tensors: A tensor of the weight's shape for each weight, by parameter name in `model`.

    Returns:
        The same tensors by name on disk, sorted by name.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    tensors = without_adapters(model, tensors)
    # the names of a streamed model are those of its files
    if isinstance(model, PreTrainedModel) and not is_streamed(model):
        tensors = revert_weight_conversion(model, {name: materialize(tensor) for name, tensor in tensors.items()})
    return {name: tensors[name] for name in sorted(tensors)}


def names_in_memory(module: nn.Module) -> dict[str, str]:
    """Map the names of weights in a model's files to parameter names of the module that holds the model.

    Several names may have one parameter, such as those of the weights of experts that are fused in memory.

    Args:
        module: A transformers model, or a module that holds one; the result is empty for any other.
    """
    try:
        prefix, model = find_pretrained(module)
    except ValueError:
        return {}
    shapes = {name: full_shape(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    own = without_adapters(model, {name: name for name, shape in shapes.items() if len(shape) == 2})
    names = list(own.values())
    # the numbers show under which name each one comes out
    numbered = {name: torch.tensor([index]) for index, name in enumerate(names)}
    found = {on_disk: names[int(number)] for on_disk, number in names_on_disk(model, numbered).items()}
    for name, shape in shapes.items():
        if len(shape) == 3:
            found |= dict.fromkeys(names_on_disk(model, {name: torch.empty(shape, device="meta")}), name)
    return {on_disk: f"{prefix}{name}" for on_disk, name in found.items()}


def join_on_disk(module: nn.Module, name: str, pieces: Mapping[str, Tensor]) -> Tensor:
    """Put together what belongs to one fused parameter from the tensors that it is stored as.

    Args:
        module: A module that holds a transformers model.
        name: Name of the parameter in `module`.
        pieces: Tensors in the shapes of those in the model's files, by name on disk.

    Returns:
        A tensor in the shape of the parameter.

    Raises:
        ValueError: If a piece is missing or has another shape.
    """
    prefix, model = find_pretrained(module)
    shape = full_shape(module.get_parameter(name))
    # for every element of the files its place in the parameter, whatever transformers does when it saves
    places = names_on_disk(model, {name.removeprefix(prefix): torch.arange(shape.numel()).view(shape)})
    found, wanted = ({key: tuple(t.shape) for key, t in tensors.items()} for tensors in (pieces, places))
    if found != wanted:
        key = min(key for key in found.keys() | wanted if found.get(key) != wanted.get(key))
        raise ValueError(
            f"Expected `{key}` of shape {wanted.get(key)} for `{name}`, but got {found.get(key)}; use the file that "
            "was written with this model"
        )
    joined = next(iter(pieces.values())).new_empty(shape.numel())
    for key, place in places.items():
        joined[place.flatten()] = pieces[key].flatten()
    return joined.view(shape)
