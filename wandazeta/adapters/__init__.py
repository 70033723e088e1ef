"""What is trained of a model: adapters in one flat vector, or the model's own weights, in plain torch."""

from wandazeta.adapters.factorise import factorise
from wandazeta.adapters.flat_vector import AdapterVector
from wandazeta.adapters.inject import AdaptedModule, adapted_modules, inject_adapters, remove_adapters, train_linears
from wandazeta.adapters.lora import LoRASite, LoRAVector, inject_lora
from wandazeta.adapters.tensor_train import TTLinear, TTShape, tt_matrices
from wandazeta.adapters.tensor_train_vector import AdapterLayout, Site, TensorTrainVector
from wandazeta.adapters.trainables import LoRAAdapters, PeftLoRA, TensorTrainAdapters, Trainable, Weights
from wandazeta.adapters.trained_vector import TrainedVector
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
    "TrainedVector",
    "Weights",
    "adapted_modules",
    "factorise",
    "inject_adapters",
    "inject_lora",
    "remove_adapters",
    "train_linears",
    "tt_matrices",
]
