"""The evaluation of a pruned model beside others, as `wandazeta evaluate` leaves it for the report."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["EVALUATION_FILE", "EvaluatedModel", "EvaluationSummary", "read_evaluation"]

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class EvaluatedModel:
    """One model of an evaluation.

    Args:
        name: Name of the model, such as `dense`.
        perplexity: Its perplexity, infinity if the loss overflowed; None if it was measured by tasks only.
        size_bytes: Size of its weight files in bytes; None for a model without files.
        sparsity: Fraction of zeros among the weights of its blocks.
        continuation: What it writes after the prompt; None if it was not asked to.
    """

    name: str
    perplexity: float | None
    size_bytes: int | None
    sparsity: float
    continuation: str | None


@dataclass(frozen=True)
class EvaluationSummary:
    """Models that were measured on the same text.

    Args:
        models: The models in the order in which they are shown, the baseline first.
        text: The prompt that all models continue, from the text that they were measured on; None without text.
        sequence_length: Tokens per window of the measurement; None without text.
        num_tokens: Number of tokens predicted by each model.
    """

    models: tuple[EvaluatedModel, ...]
    text: str | None
    sequence_length: int | None
    num_tokens: int


def read_evaluation(path: str | os.PathLike[str]) -> EvaluationSummary:
    """Read the `evaluation.json` that `wandazeta.evaluate` writes; unknown fields are ignored.

    Args:
        path: The file.

    Raises:
        ValueError: If the file cannot be read, or a field is missing.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        measured = [content] if content["baseline"] is None else [content["baseline"], content]
        sample = content["sample"] or {}
        summary = EvaluationSummary(
            tuple(_model(one) for one in measured),
            sample.get("prompt"),
            content["sequence_length"],
            content["num_tokens"],
        )
    except OSError as error:
        raise ValueError(f"Expected '{path}' to be a file that can be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected '{path}' to hold an evaluation, but it does not ({error!r}); run `wandazeta evaluate` again or "
            "delete the file."
        ) from error
    return summary


def _model(content: dict[str, Any]) -> EvaluatedModel:
    sample = content["sample"] or {}
    return EvaluatedModel(
        content["model"], content["perplexity"], content["num_bytes"], content["sparsity"], sample.get("continuation")
    )
