"""Datasets of the tasks, which the YAML files name by `!function`."""

from typing import TYPE_CHECKING, Any

from wandazeta.data.samples import rotten_tomatoes, wikipedia_documents
from wandazeta.data.sources import split_of

if TYPE_CHECKING:
    from datasets import Dataset

_FRACTIONS = (0.8, 0.1, 0.1)
_NUM_REVIEWS = 400
_PASSAGE_CHARACTERS = 1500


def reviews(**_: Any) -> "dict[str, Dataset]":
    """Return sentences of reviews, with label 1 for positive ones.

    Args:
        **_: Settings of the harness, which are not needed.
    """
    from datasets import Dataset

    rows = [{"text": text, "label": label} for text, label in rotten_tomatoes()]
    train, test = (
        [row for row in rows if split_of(str(row["text"]), _FRACTIONS) == split] for split in ("train", "test")
    )
    return {"train": Dataset.from_list(train), "test": Dataset.from_list(test[:_NUM_REVIEWS])}


def wikipedia(**_: Any) -> "dict[str, Dataset]":
    """Return the beginnings of articles.

    Args:
        **_: Settings of the harness, which are not needed.
    """
    from datasets import Dataset

    # calibration data may come from the training split
    texts = [text for title, text in wikipedia_documents() if split_of(title, _FRACTIONS) != "train"]
    return {"test": Dataset.from_list([{"text": text[:_PASSAGE_CHARACTERS]} for text in texts])}
