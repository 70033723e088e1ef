"""LightningModules: a language model to evaluate, and its fine-tuning by forward passes alone or back-propagation."""

from wandazeta.modules.first_order import FirstOrderModule
from wandazeta.modules.language_model import LanguageModel
from wandazeta.modules.zeroth_order import ZerothOrderModule

__all__ = ["FirstOrderModule", "LanguageModel", "ZerothOrderModule"]


def __dir__() -> list[str]:
    return __all__
