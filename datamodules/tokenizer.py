"""Tokenizer of a data module: its own, or that of the trained module."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from wandazeta.models.loading import load_tokenizer
from wandazeta.protocols import HasTokenizer


def find_tokenizer(tokenizer: str | PreTrainedTokenizerBase | None, trainer: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a data module.

    Args:
        tokenizer: The tokenizer, a name to load it by, or None for that of the module in the trainer.
        trainer: The trainer, or None.

    Raises:
        ValueError: If there is none, or it cannot be loaded.
    """
    if isinstance(tokenizer, str):
        return load_tokenizer(tokenizer, argument="tokenizer")
    if tokenizer is None:
        module = getattr(trainer, "lightning_module", None)
        tokenizer = module.tokenizer if isinstance(module, HasTokenizer) else None
    if tokenizer is None:
        raise ValueError(
            "Expected argument `tokenizer` to be given, but got None, and the module has no attribute `tokenizer`; "
            "give the directory or the hub name of the model"
        )
    return tokenizer
