"""The evaluation of a pruned model beside others, as `wandazeta evaluate` leaves it for the report."""

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

__all__ = ["EVALUATION_FILE", "EvaluatedModel", "Evaluation", "read_evaluation"]

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
class Evaluation:
    """Models that were measured on the same text. The fields are those of `evaluation.json`.

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


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Read an `evaluation.json`: an object with the fields of `Evaluation`; unknown fields are ignored.

    Args:
        path: The file.

    Raises:
        ValueError: If the file cannot be read, or a field is missing.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        models = tuple(
            EvaluatedModel(**{field.name: model[field.name] for field in fields(EvaluatedModel)})
            for model in content["models"]
        )
        evaluation = Evaluation(models, *(content[field.name] for field in fields(Evaluation)[1:]))
    except OSError as error:
        raise ValueError(f"Expected '{path}' to be a file that can be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected '{path}' to hold an evaluation, but it does not ({error!r}); run `wandazeta evaluate` again or "
            "delete the file."
        ) from error
    return evaluation
