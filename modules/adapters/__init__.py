"""Tensor-train adapters that live in one flat vector: plain torch."""

from .bank import AdapterBank, AdapterLayout, Site
from .factorise import factorise
from .inject import AdaptedModule, inject_adapters, remove_adapters
from .tensor_train import TTLinear, TTShape, tt_matrices

__all__ = [
    "AdaptedModule",
    "AdapterBank",
    "AdapterLayout",
    "Site",
    "TTLinear",
    "TTShape",
    "factorise",
    "inject_adapters",
    "remove_adapters",
    "tt_matrices",
]
