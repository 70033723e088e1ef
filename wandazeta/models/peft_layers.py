"""Tell the adapters that peft has added to a model from the model's own layers."""

from torch import nn

__all__ = ["adapter_modules", "is_adapted"]

_BASE_LAYER = "base_layer"


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer of peft that holds a base layer and its adapters (LoRA and others)."""
    # without an import of peft, of whose tuner layers all have the attribute
    return _BASE_LAYER in module._modules and hasattr(type(module), "adapter_layer_names")


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
        elif "original_module" in layer._modules and "modules_to_save" in layer._modules:
            added |= {layer, *layer._modules["modules_to_save"].modules()}  # type: ignore[union-attr]
    return added
