"""What is trained of a model: adapters in one flat vector, or its own weights. Plain torch."""

from .bank import AdapterBank, FlatBank, Site
from .factorise import factorise
from .inject import AdaptedModule, inject_adapters, remove_adapters, train_linears
from .layout import AdapterLayout
from .lora import LoRABank, LoRASite, inject_lora
from .tensor_train import TTLinear, TTShape, tt_matrices
from .trainables import LoRAAdapters, TensorTrainAdapters, Trainable, Weights
from .weights import WeightBank

__all__ = [
    "AdaptedModule",
    "AdapterBank",
    "AdapterLayout",
    "FlatBank",
    "LoRAAdapters",
    "LoRABank",
    "LoRASite",
    "Site",
    "TTLinear",
    "TTShape",
    "TensorTrainAdapters",
    "Trainable",
    "WeightBank",
    "Weights",
    "factorise",
    "inject_adapters",
    "inject_lora",
    "remove_adapters",
    "train_linears",
    "tt_matrices",
]
