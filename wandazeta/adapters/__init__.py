"""What is trained of a model: adapters in one flat vector, or its own weights. Plain torch."""

from wandazeta.adapters.factorise import factorise
from wandazeta.adapters.flat_vector import AdapterVector, Site, TensorTrainVector
from wandazeta.adapters.inject import AdaptedModule, inject_adapters, remove_adapters, train_linears
from wandazeta.adapters.layout import AdapterLayout
from wandazeta.adapters.lora import LoRASite, LoRAVector, inject_lora
from wandazeta.adapters.tensor_train import TTLinear, TTShape, tt_matrices
from wandazeta.adapters.trainables import LoRAAdapters, PeftLoRA, TensorTrainAdapters, Trainable, Weights
from wandazeta.adapters.weights import InPlaceWeights

__all__ = [
    "AdaptedModule",
    "AdapterLayout",
    "AdapterVector",
    "InPlaceWeights",
    "LoRAAdapters",
    "LoRASite",
    "LoRAVector",
    "PeftLoRA",
    "Site",
    "TTLinear",
    "TTShape",
    "TensorTrainAdapters",
    "TensorTrainVector",
    "Trainable",
    "Weights",
    "factorise",
    "inject_adapters",
    "inject_lora",
    "remove_adapters",
    "train_linears",
    "tt_matrices",
]
