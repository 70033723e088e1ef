"""LightningModules: a language model to evaluate, fine-tuned by forward passes alone or by back-propagation."""

from wandazeta.modules.first_order import FirstOrderModule
from wandazeta.modules.language_model import LanguageModel
from wandazeta.modules.zeroth_order import ZerothOrderModule

__all__ = ["FirstOrderModule", "LanguageModel", "ZerothOrderModule"]


def __dir__() -> list[str]:
    return __all__
