"""Find a transformers model in a module, and the names that its tensors have in its files."""

from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.models.peft_layers import without_adapters
from wandazeta.models.streaming import is_file_backed, materialize
from wandazeta.models.zero3 import full_shape

__all__ = ["find_pretrained", "has_save_pretrained", "is_streamed", "names_in_memory", "names_on_disk"]


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
    """Map the names of weight matrices in a model's files to parameter names of the module that holds the model.

    Args:
        module: A transformers model, or a module that holds one; the result is empty for any other.
    """
    try:
        prefix, model = find_pretrained(module)
    except ValueError:
        return {}
    parameters = model.named_parameters(remove_duplicate=False)
    matrices = {name: None for name, parameter in parameters if len(full_shape(parameter)) == 2}
    own = without_adapters(model, {name: name for name in matrices})
    names = list(own.values())
    # the numbers show under which name each one comes out
    numbered = {name: torch.tensor([index]) for index, name in enumerate(names)}
    return {on_disk: f"{prefix}{names[int(number)]}" for on_disk, number in names_on_disk(model, numbered).items()}
