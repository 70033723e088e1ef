"""LightningDataModules: windows of running text, and labelled text for a classification head or as prompts."""

from wandazeta.datamodules.classification import ClassificationDataModule
from wandazeta.datamodules.prompted import PromptedClassificationDataModule
from wandazeta.datamodules.text import TextDataModule

__all__ = ["ClassificationDataModule", "PromptedClassificationDataModule", "TextDataModule"]


def __dir__() -> list[str]:
    return __all__
