"""Calibration samples: one row of a batch each, as hidden states and calls of the blocks."""

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.models.blocks import BlockCall, CallCapture

# of a batch: enough to keep a processor busy, little beside the block's own activations
_MAX_TOKENS = 2048


@dataclass
class Samples:
    """All calibration samples.

    Args:
        hidden: Hidden states at the input of the current block, each of shape (1, tokens, width).
        calls: For each sample the other arguments of each block.
        masks: For each sample the positions that count, None where all do.
    """

    hidden: list[Tensor]
    calls: list[list[BlockCall]]
    masks: list[Tensor | None]

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def num_tokens(self) -> int:
        """Positions that count."""
        counts = (
            h.shape[:-1].numel() if m is None else int(m.sum()) for h, m in zip(self.hidden, self.masks, strict=True)
        )
        return sum(counts)

    def batches(self, block_index: int) -> "Batches":
        """Which samples a block can run together: those without padding for which it is called alike.

        Tensors that are equal were captured as one, so comparing identities is enough.

        Args:
            block_index: The block.
        """
        keys: list[Hashable] = []
        for states, calls, mask in zip(self.hidden, self.calls, self.masks, strict=True):
            call = calls[block_index]
            keys.append(None if mask is not None else (states.shape, _key(_parts(call), id)))
        return Batches(self.masks, keys, [states.shape[:-1].numel() for states in self.hidden])

    def form(self, sample: int, block_index: int) -> Hashable:
        """Equal for calls whose tensors have the same shapes."""
        return _key(_parts(self.calls[sample][block_index]), lambda tensor: tuple(tensor.shape))


class Batches:
    """Cuts lists of samples into batches that go through a block together.

    Args:
        masks: For each sample the positions that count, None where all do.
        keys: Samples of one key can share a batch; None for a sample that shares with none.
        num_tokens: Length of each sample; a batch has no more than a few thousand.
    """

    def __init__(
        self, masks: Sequence[Tensor | None], keys: Sequence[Hashable] = (), num_tokens: Sequence[int] = ()
    ) -> None:
        self._masks = masks
        self._keys = keys or [None] * len(masks)
        self._num_tokens = num_tokens or [0] * len(masks)

    def split(self, indices: Sequence[int]) -> list[list[int]]:
        """Cut samples into batches of neighbours.

        Args:
            indices: The samples, in the order in which they run.
        """
        batches: list[list[int]] = []
        for index in indices:
            last = batches[-1] if batches else []
            fits = bool(last) and self._keys[index] is not None and self._keys[last[0]] == self._keys[index]
            if fits and self._num_tokens[index] * (len(last) + 1) <= _MAX_TOKENS:
                last.append(index)
            else:
                batches.append([index])
        return batches

    def mask(self, batch: Sequence[int]) -> Tensor | None:
        """The positions of a batch that count, bool of shape (samples, tokens), None where all do."""
        return self._masks[batch[0]] if len(batch) == 1 else None

    def apart(self) -> "Batches":
        """The same samples, each in a batch of its own."""
        return Batches(self._masks)


def _parts(call: BlockCall) -> tuple[Any, ...]:
    return call.args, call.kwargs, call.hidden_name


def _key(value: Any, of_tensor: Callable[[Tensor], Hashable]) -> Hashable:
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, Mapping):
        return tuple((name, _key(item, of_tensor)) for name, item in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(_key(item, of_tensor) for item in value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def split_rows(batch: Any) -> list[Any]:
    """Split a batch into batches of one row.

    Args:
        batch: Tensors in any nesting of mappings, lists and tuples; the length of the first one is the number of
            rows, and everything of that length is split. Anything else is one row.

    Returns:
        The rows, each a batch of the same kind.

    Example:
        >>> split_rows({"x": torch.tensor([[1], [2]]), "name": ["a", "b"]})
        [{'x': tensor([[1]]), 'name': ['a']}, {'x': tensor([[2]]), 'name': ['b']}]
    """
    num_rows = _first_length(batch)
    return [batch] if num_rows in (None, 1) else [_row(batch, i, num_rows) for i in range(num_rows)]


def _first_length(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((length for item in items if (length := _first_length(item)) is not None), None)


def _row(batch: Any, index: int, num_rows: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.ndim and batch.shape[0] == num_rows else batch
    if isinstance(batch, Mapping):
        row = copy.copy(batch)  # keeps what a BatchEncoding or an ordered dict adds
        for key, value in batch.items():
            row[key] = _row(value, index, num_rows)  # type: ignore[index]
        return row
    if isinstance(batch, (list, tuple)):
        if all(isinstance(item, (str, int, float)) for item in batch):
            return batch[index : index + 1] if len(batch) == num_rows else batch
        items = [_row(item, index, num_rows) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def capture_samples(
    blocks: nn.ModuleList,
    forward: Callable[[Any], object],
    rows: Sequence[Any],
    token_mask: Callable[[Any], Tensor | None] | None,
    device: torch.device,
) -> Samples:
    """Run the real model on every row, up to the blocks' end, and keep what the blocks are called with.

    Args:
        blocks: The blocks.
        forward: Runs the model on a row.
        rows: Batches of one row.
        token_mask: Gives the positions of a row that are not padding.
        device: Where the samples are kept.

    Raises:
        ValueError: If the model does not run its blocks one after another, or a mask does not fit.
    """
    capture = CallCapture(blocks, device)
    samples = Samples([], [], [])
    for row in rows:
        hidden, calls = capture(lambda row=row: forward(row))  # type: ignore[misc]
        if _first_length(row) is None and hidden.ndim > 2 and min(hidden.shape[:2]) > 1:
            raise ValueError(
                f"Expected calibration batches of tensors, mappings or lists, but got {type(row).__name__} with "
                f"{hidden.shape[0]} samples, which cannot be split; use batches of one sample"
            )
        if hidden.ndim > 2 and hidden.shape[0] != 1:
            raise ValueError(
                f"Expected hidden states of shape (rows, tokens, width), but a batch of one row has "
                f"{tuple(hidden.shape)}; build the model with `batch_first=True`, and give batches whose first tensor "
                "has a row for each sample"
            )
        samples.hidden.append(hidden)
        samples.calls.append(calls)
        samples.masks.append(_mask(row, hidden, token_mask))
    return samples


def _mask(row: Any, hidden: Tensor, token_mask: Callable[[Any], Tensor | None] | None) -> Tensor | None:
    mask = token_mask(row) if token_mask is not None else None
    if mask is None:
        return None
    mask = mask.to(device=hidden.device, dtype=torch.bool)
    if mask.shape != hidden.shape[:-1]:
        raise ValueError(
            f"Expected `token_mask` to give a mask of shape {tuple(hidden.shape[:-1])}, but got {tuple(mask.shape)}"
        )
    if not mask.any():
        raise ValueError("Expected calibration samples with text, but one is all padding; leave it out")
    return None if mask.all() else mask
