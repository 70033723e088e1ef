"""Calibration samples as hidden states and block arguments, and the batches in which they run through a block."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.models.blocks import BlockCall, CallCapture
from wandazeta.pruning.calibration import num_rows

# tokens of a batch: enough to keep a processor busy, and few enough to be small beside the rest of a pruning
_MIN_TOKENS, _GPU_TOKENS = 2048, 8192
# bytes that the forward of a block takes for each token and unit of width, most of them in the MLP, of up to four times
# the width: its activations, and their squares in float32
_BYTES_OF_FORWARD = 100


def max_tokens(device: torch.device, width: int) -> int:
    """Return how many tokens may run through a block together.

    The number decides how sums are rounded. So it depends on the device and the model alone, not on the memory that
    happens to be free, and a pruning that is started again on the same device goes on with the same bits.

    Args:
        device: The compute device.
        width: Width of the hidden states.
    """
    if device.type != "cuda":
        return _MIN_TOKENS
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(_MIN_TOKENS, min(_GPU_TOKENS, memory // 8 // (_BYTES_OF_FORWARD * width)))


@dataclass
class Samples:
    """The calibration samples of one rank.

    Args:
        hidden: Hidden states at the input of the current block, one tensor of shape (1, tokens, width) per sample.
        calls: For each sample, the other arguments of each block.
        masks: For each sample, which positions are no padding, bool of shape (1, tokens); None if all are.
    """

    hidden: list[Tensor]
    calls: list[list[BlockCall]]
    masks: list[Tensor | None]

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, without padding."""
        whole = sum(h.shape[:-1].numel() for h, m in zip(self.hidden, self.masks, strict=True) if m is None)
        padded = [m.sum() for m in self.masks if m is not None]
        return whole + (int(torch.stack(padded).sum()) if padded else 0)

    def batches(self, block_index: int) -> "Batches":
        """Find the samples that can run through a block in one batch: those with equal keys.

        Args:
            block_index: Position of the block.
        """
        if not self.hidden:
            return Batches(())
        num_tokens = [states.shape[:-1].numel() for states in self.hidden]
        first = self.hidden[0]
        return Batches(self.masks, self.keys(block_index), num_tokens, max_tokens(first.device, first.shape[-1]))

    def keys(self, block_index: int) -> list[Hashable]:
        """Return a key for each sample that is equal for those without padding of equal shape and arguments.

        Equal tensors of different samples were captured as one object, so their identities are compared. The key of a
        sample with padding is None.

        Args:
            block_index: Position of the block.
        """
        keys: list[Hashable] = []
        for states, calls, mask in zip(self.hidden, self.calls, self.masks, strict=True):
            call = calls[block_index]
            keys.append(None if mask is not None else (states.shape, _key(_parts(call), id)))
        return keys

    def call_signature(self, sample: int, block_index: int) -> Hashable:
        """Return a key that is equal for calls whose tensors have equal shapes.

        Args:
            sample: Index of the sample.
            block_index: Position of the block.
        """
        return _key(_parts(self.calls[sample][block_index]), lambda tensor: tuple(tensor.shape))


class Batches:
    """Groups samples into batches that run through a block in one forward.

    Args:
        masks: For each sample, which positions are no padding; None if all are.
        keys: Samples with equal keys can share a batch; None for a sample that needs a batch of its own.
        num_tokens: Length of each sample.
        max_tokens: Total length of a batch of several samples, at most.
    """

    def __init__(
        self,
        masks: Sequence[Tensor | None],
        keys: Sequence[Hashable] = (),
        num_tokens: Sequence[int] = (),
        max_tokens: int = _MIN_TOKENS,
    ) -> None:
        self._masks = masks
        self._keys = keys or [None] * len(masks)
        self._num_tokens = num_tokens or [0] * len(masks)
        self._max_tokens = max_tokens

    def split(self, indices: Sequence[int]) -> list[list[int]]:
        """Group neighbouring samples into batches.

        Args:
            indices: Indices of the samples, in the order in which they run.
        """
        batches: list[list[int]] = []
        for index in indices:
            last = batches[-1] if batches else []
            fits = bool(last) and self._keys[index] is not None and self._keys[last[0]] == self._keys[index]
            if fits and self._num_tokens[index] * (len(last) + 1) <= self._max_tokens:
                last.append(index)
            else:
                batches.append([index])
        return batches

    def mask(self, batch: Sequence[int]) -> Tensor | None:
        """Return the positions of a batch that are no padding, bool of shape (samples, tokens); None if all are.

        Args:
            batch: Indices of its samples.
        """
        return self._masks[batch[0]] if len(batch) == 1 else None

    def one_by_one(self) -> "Batches":
        """Return the same samples, each in a batch of its own."""
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


def capture_samples(
    blocks: nn.ModuleList,
    forward: Callable[[Any], object],
    rows: Sequence[Any],
    token_mask: Callable[[Any], Tensor | None] | None,
    device: torch.device,
) -> Samples:
    """Run the model on every row up to its last block, and record the arguments of every block.

    Args:
        blocks: The blocks.
        forward: Runs the model on one row.
        rows: Batches of one row.
        token_mask: Returns the positions of a row that are no padding, or None if all are.
        device: Device that the samples are kept on.

    Raises:
        ValueError: If the model does not run its blocks one after another, or a mask does not fit.
    """
    capture = CallCapture(blocks, device)
    samples = Samples([], [], [])
    for row in rows:
        hidden, calls = capture(lambda row=row: forward(row))  # type: ignore[misc]
        if num_rows(row) is None and hidden.ndim > 2 and min(hidden.shape[:2]) > 1:
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
