"""Read calibration samples from any loader, split batches into rows, and pass a batch to a model's forward."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from wandazeta.models.positions import check_positions, max_positions
from wandazeta.utilities.rng import isolated_rng, preserve_generators

DEFAULT_NUM_SAMPLES = 128
"""Number of calibration samples that are used by default, if there are as many."""


def leaves(batch: Any) -> Iterator[Any]:
    """Yield the values in a nested batch, in order.

    Args:
        batch: Any nesting of mappings, lists and tuples.
    """
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from leaves(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from leaves(value)
    else:
        yield batch


def num_rows(batch: Any) -> int | None:
    """Number of samples of a batch: the length of its first tensor, or None if it holds no tensor.

    Args:
        batch: Tensors in any nesting of mappings, lists and tuples, the samples along their first dimension.
    """
    return next((leaf.shape[0] for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim > 0), None)


def split_rows(batch: Any) -> list[Any]:
    """Split a batch into batches of one row.

    Args:
        batch: As for `num_rows`. Tensors with as many rows as the first one are split, and so are lists of as many
            plain values, such as strings; all other values are repeated in every row.

    Returns:
        The rows, each a batch of the same type. A batch without tensors is one row.

    Examples:
        >>> import torch
        >>> split_rows({"x": torch.tensor([[1], [2]]), "name": ["a", "b"]})
        [{'x': tensor([[1]]), 'name': ['a']}, {'x': tensor([[2]]), 'name': ['b']}]
    """
    count = num_rows(batch)
    return [batch] if count in (None, 1) else [_row(batch, index, count) for index in range(count or 0)]


def _row(value: Any, index: int, count: int | None) -> Any:
    if isinstance(value, Tensor):
        return value[index : index + 1] if value.ndim > 0 and value.shape[0] == count else value
    if isinstance(value, Mapping):
        row = copy.copy(value)  # keeps the attributes of a BatchEncoding or an ordered dict
        for key, item in value.items():
            row[key] = _row(item, index, count)  # type: ignore[index]
        return row
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_row(item, index, count) for item in value))
    if isinstance(value, (list, tuple)):
        is_plain = not any(isinstance(leaf, Tensor) for leaf in leaves(value))
        if is_plain and len(value) == count:
            return value[index : index + 1]
        return type(value)([_row(item, index, count) for item in value])
    return value


def collect_rows(loader: Iterable[Any], num_samples: int | None, seed: int) -> list[Any]:
    """Read calibration samples from a loader, each as a batch of one row.

    Args:
        loader: A `DataLoader`, or any other iterable of batches.
        num_samples: Number of samples (rows) to read; None for `DEFAULT_NUM_SAMPLES`, or all if there are fewer.
        seed: Seed of the global generators while the loader runs, for a loader that shuffles.

    Returns:
        The rows, on the device of their batch.

    Raises:
        ValueError: If the loader is empty or yields fewer samples than asked for.
    """
    rows: list[Any] = []
    most = num_samples or DEFAULT_NUM_SAMPLES
    with isolated_rng(seed), preserve_generators(loader):
        for batch in loader:
            rows += split_rows(batch)[: most - len(rows)]
            if len(rows) == most:
                return rows
    if not rows:
        raise ValueError(
            "Expected argument `calibration` to yield at least one sample, but got an empty loader; "
            "give it a dataset with text in it."
        )
    if num_samples is None:
        return rows
    raise ValueError(
        f"Expected argument `num_calibration_samples` to be at most {len(rows)}, the samples that the calibration data "
        f"hold, but got {num_samples}; lower it or give more data."
    )


def check_shares(num_samples: int, num_ranks: int) -> None:
    """Check that every rank gets a calibration sample.

    Args:
        num_samples: Number of samples.
        num_ranks: Number of ranks.

    Raises:
        ValueError: If there are more ranks than samples.
    """
    if num_samples < num_ranks:
        raise ValueError(
            f"Expected at least one calibration sample for each of {num_ranks} ranks, but got {num_samples}; start "
            "fewer processes or give more text"
        )


def check_lengths(model: nn.Module, rows: Iterable[Any]) -> None:
    """Check that calibration samples are not longer than the positions that a model has learned.

    Args:
        model: The model, or a module that holds it.
        rows: The samples; those without `input_ids` are not checked.

    Raises:
        ValueError: If one is longer.
    """
    limit = max_positions(model)
    for row in rows:
        ids = row.get("input_ids") if isinstance(row, Mapping) else None
        if isinstance(ids, Tensor):
            check_positions(ids.shape[-1], limit)


def call_arguments(function: Callable[..., Any], batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn a batch into the arguments of a `forward` or `training_step`.

    A mapping that holds every required argument becomes keyword arguments, without entries that the function does not
    accept, such as labels. A tuple or list fills the required positional arguments. Anything else is the first
    argument, and so is a batch for a function with one argument called `batch`, or with arguments that the mapping
    lacks.

    Args:
        function: The function to call.
        batch: The batch to pass.

    Returns:
        Positional and keyword arguments.
    """
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if isinstance(batch, Mapping):
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        accepted = {key: value for key, value in batch.items() if takes_all or key in named}
        return ((), accepted) if accepted and all(name in accepted for name in required) else ((batch,), {})
    if isinstance(batch, (list, tuple)) and required != ["batch"]:
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return tuple(batch), {}
        wanted = max(1, sum(p.default is p.empty for p in positional))
        if wanted <= len(batch):
            return tuple(batch[:wanted]), {}
    return (batch,), {}
