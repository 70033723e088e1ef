"""Tell the adapters that peft has added to a model from the model's own layers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

__all__ = ["adapter_modules", "is_adapted", "own_names", "saved_without_adapters", "without_adapters"]

T = TypeVar("T")

_BASE_LAYER = "base_layer"


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer of peft that holds a base layer and its adapters (LoRA and others)."""
    # without an import of peft, of whose tuner layers all have the attribute
    return _BASE_LAYER in module._modules and hasattr(type(module), "adapter_layer_names")


def _is_copied(module: nn.Module) -> bool:
    """Whether a module holds another one and the copies of it that `modules_to_save` of peft has made."""
    return "original_module" in module._modules and "modules_to_save" in module._modules


def adapter_modules(module: nn.Module) -> set[nn.Module]:
    """Find the modules that peft has added: its layers and everything in them but their base layers.

    Args:
        module: A model or a part of one.
    """
    added: set[nn.Module] = set()
    for layer in module.modules():
        if is_adapted(layer):
            added.add(layer)
            for name, child in layer.named_children():
                added |= set(child.modules()) if name != _BASE_LAYER else set()
        elif _is_copied(layer):
            added |= {layer, *layer._modules["modules_to_save"].modules()}  # type: ignore[union-attr]
    return added


def own_names(model: nn.Module) -> dict[str, str]:
    """Map the names of a model's own modules, including base layers, to those that they have without adapters.

    Args:
        model: A model, with or without adapters.
    """
    return dict(_own_names(model, "", ""))


def _own_names(module: nn.Module, name: str, own: str) -> Iterator[tuple[str, str]]:
    kept = _BASE_LAYER if is_adapted(module) else "original_module" if _is_copied(module) else None
    if kept is None:
        yield name, own
    for child_name, child in module._modules.items():
        if child is not None and kept in (None, child_name):
            below = own if kept is not None else f"{own}.{child_name}".removeprefix(".")
            yield from _own_names(child, f"{name}.{child_name}".removeprefix("."), below)


def without_adapters(model: nn.Module, tensors: Mapping[str, T]) -> dict[str, T]:
    """Rename the parameters of a model to the names that they have without adapters, and leave those of adapters out.

    Args:
        model: A model; without adapters in it nothing is changed.
        tensors: Tensors, or anything else, by parameter name in `model`.
    """
    if not adapter_modules(model):
        return dict(tensors)
    own = own_names(model)
    added = {name for name, _ in model.named_modules(remove_duplicate=False)} - own.keys()
    renamed = {}
    for name, tensor in tensors.items():
        owner, _, parameter = name.rpartition(".")
        if owner not in added:
            # an unknown name stays, so that an error can name it
            renamed[f"{own.get(owner, owner)}.{parameter}".removeprefix(".")] = tensor
    return renamed


@contextmanager
def saved_without_adapters(model: Any) -> Iterator[None]:
    """Temporarily let `save_pretrained` of transformers write the model itself; with adapters it writes them alone.

    Args:
        model: A transformers model.
    """
    loaded = getattr(model, "_hf_peft_config_loaded", False)
    try:
        if loaded:
            model._hf_peft_config_loaded = False
        yield
    finally:
        if loaded:
            model._hf_peft_config_loaded = True
