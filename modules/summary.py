"""Model summaries of Lightning for modules whose trained values are no trainable parameters."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary import get_human_readable_count

__all__ = ["show_trained_values"]


def show_trained_values(callback: ModelSummary, name: str, count: Callable[[], tuple[int, int]]) -> None:
    """Let a summary show the number of trained values instead of that of trainable parameters.

    Args:
        callback: The callback that shows the summary.
        name: Name of the submodule that holds the trained values.
        count: Returns the number of trained values, and how many of them are no parameters.
    """
    summarize = type(callback).summarize

    def summarize_trained(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        *others: Any,
        **options: Any,
    ) -> None:
        num_trained, num_outside = count()
        columns = dict(summary_data)
        rows = columns.get("Name", [])
        if name in rows and num_outside:
            params = list(columns["Params"])
            params[rows.index(name)] = get_human_readable_count(num_outside)
            columns["Params"] = params
        # the anchor, which only strategies need, is neither trained nor part of the model
        total = total_parameters - trainable_parameters + num_outside
        summarize(list(columns.items()), total, num_trained, *others, **options)

    # called on the object, and documented for overriding
    callback.summarize = summarize_trained  # type: ignore[method-assign]
