"""Reading calibration samples from any loader, and calling a model that was written without us in mind."""

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seeds every global random generator and puts all of them back afterwards.

    A shuffled loader then yields the same samples in every process, and a run that reads calibration data trains on
    the same random numbers as one that does not.

    Args:
        seed: The seed in force inside the context.
    """
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


@contextmanager
def _generators_kept(loader: Any) -> Iterator[None]:
    """Puts back the private generators of a loader and its samplers, which iterating would advance."""
    owners = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    owners.append(getattr(owners[-1], "sampler", None))
    generators = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    states = {key: generator.get_state() for key, generator in generators.items()}
    try:
        yield
    finally:
        for key, generator in generators.items():
            generator.set_state(states[key])


def leaves(batch: Any) -> Iterator[Any]:
    """Yield the values of a batch that are no mappings, lists or tuples, in order.

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


def count_rows(batch: Any) -> int:
    """Counts the samples of a batch: the length of its first tensor, 1 if it holds none.

    Args:
        batch: Tensors in any nesting of mappings, lists and tuples, the samples along their first dimension.
    """
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    return 1


def take_rows(batch: Any, num_rows: int) -> Any:
    """Keeps the first samples of a batch; what is not per sample stays as it is.

    Args:
        batch: As for `count_rows`.
        num_rows: How many samples to keep.
    """
    rows = count_rows(batch)

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:num_rows] if value.ndim > 0 and value.shape[0] == rows else value
        if isinstance(value, Mapping):
            taken = copy.copy(value)  # keeps what a BatchEncoding or an ordered dict adds
            for key, item in value.items():
                taken[key] = take(item)  # type: ignore[index]
            return taken
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(take(item) for item in value))
        if isinstance(value, (list, tuple)):
            # strings and other plain values that come one per sample
            plain = len(value) == rows and not any(isinstance(leaf, Tensor) for leaf in leaves(value))
            return type(value)(value[:num_rows] if plain else [take(item) for item in value])
        return value

    return take(batch)


def collect_batches(loader: Iterable[Any], num_samples: int, seed: int) -> list[Any]:
    """Reads batches until they hold the wanted number of samples; the last batch is cut to fit.

    Args:
        loader: A `DataLoader`, or anything that yields batches.
        num_samples: The number of samples (rows).
        seed: Seeds the shuffling of a loader that draws from the global generators.

    Returns:
        The batches, on the device they came on.

    Raises:
        ValueError: If the loader yields nothing, or fewer samples than asked for.
    """
    batches: list[Any] = []
    found = 0
    with isolated_rng(seed), _generators_kept(loader):
        for batch in loader:
            rows = count_rows(batch)
            if rows == 0:
                continue
            batches.append(take_rows(batch, num_samples - found) if found + rows > num_samples else batch)
            found = min(found + rows, num_samples)
            if found == num_samples:
                return batches
    if found == 0:
        raise ValueError(
            "Expected argument `calibration` to yield at least one sample, but got an empty loader; "
            "give it a dataset with text in it."
        )
    raise ValueError(
        f"Expected argument `num_calibration_samples` to be at most {found}, the samples that the calibration data "
        f"hold, but got {num_samples}; lower it or give more data."
    )


def call_arguments(function: Callable[..., Any], batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Fits a batch to the signature of a `forward`.

    A mapping becomes keyword arguments if it holds every required one; what the function does not accept (labels,
    say) is left out. A tuple or list fills the required positional arguments. Anything else, and a batch that the
    function asks for whole (one argument called `batch`, or names the mapping lacks), is the first argument.

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
