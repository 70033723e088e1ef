"""Cache of the frozen prefix: what lies below the first adapter is computed once per token sequence and replayed.

Below the first adapter, all queries of a zeroth-order step compute the same, and so do all epochs. Therefore the hidden
states that enter the first adapted block are kept, and the outputs of its submodules that run before its first adapter
(attention, in a LLaMA-like block). The model's own forward then runs with the lower blocks replaced by the identity, so
no decoder is implemented here.

If only the last block has adapters, the rest of the model works position by position and only the scored positions are
kept: rows of one token instead of rows of a prompt.

Shapes: R rows, P perturbed adapters, T tokens, S scored positions, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wandazeta.models.blocks import override_forward, run_until_stopped
from wandazeta.models.positions import max_positions
from wandazeta.scoring.tracing import (
    FrozenSubmodule,
    find_unused_outputs,
    hidden_of,
    pack_hidden,
    recording_forwards,
    trace_frozen_submodules,
)

__all__ = ["FrozenPrefix", "Prefix", "Rows", "at_positions"]


Forward = Callable[..., Any]
Key = tuple[bytes, bytes]

# shapes of the forwards that compute the states on a GPU: the number of rows, and what their width is a multiple of
_NUM_ROWS, _WIDTH = 16, 64
# share of the free memory of a GPU that the cache may take: the forwards of a step need the rest
_SHARE = 8


@dataclass(frozen=True)
class Rows:
    """Right-padded token sequences and the positions in each that are scored.

    Args:
        input_ids: Tokens `[R, T]`.
        attention_mask: One for tokens, zero for padding, `[R, T]`.
        positions: Scored positions `[R, S]`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor

    def repeat(self, repeats: int) -> "Rows":
        """Return `repeats` copies of the rows, one after the other."""
        if repeats == 1:
            return self
        return Rows(*(x.repeat(repeats, 1) for x in (self.input_ids, self.attention_mask, self.positions)))


@dataclass(frozen=True)
class Prefix:
    """Hidden states of a batch of rows below the first adapter.

    Args:
        states: The input of the first adapted block, then the outputs of its frozen submodules; each `[R, T or S, D]`.
        narrow: Whether only the scored positions are kept.
    """

    states: list[Tensor]
    narrow: bool


class FrozenPrefix:
    """Cache of the frozen prefix of token sequences, replayed in the model's own forward.

    On a CPU, every sequence is computed alone and without padding. On a GPU, sequences are computed in batches of fixed
    shapes: 16 rows, some of them repeated, and a width that is rounded up. So the cached values do not depend on the
    batch in which a sequence first occurred, and a resumed run computes the same bits. States stay on the GPU up to an
    eighth of the memory that was free there at the first lookup, and others in CPU memory.

    Args:
        model: Causal language model, or encoder with a classification head.
        blocks: Its blocks.
        sites: The modules with adapters.
        max_bytes: Memory of the cache, on the GPU and in CPU memory together; sequences beyond it are computed again
            each time.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, sites: set[nn.Module], max_bytes: int) -> None:
        self.model = model
        self.blocks = list(blocks)
        self.sites = sites
        self.max_bytes = max_bytes
        self.first = next(i for i, block in enumerate(self.blocks) if any(m in sites for m in block.modules()))
        self.narrow = self.first == len(self.blocks) - 1
        self.num_bytes = 0
        self._cache: dict[Key, list[Tensor]] = {}
        self._max_positions = max_positions(model)
        self._room_on_gpu: int | None = None
        self._frozen: list[FrozenSubmodule] | None = None
        self._replayed: list[FrozenSubmodule] = []
        self._unused: list[FrozenSubmodule] = []
        self._narrowed_after: list[FrozenSubmodule] = []
        self._tuple_lengths: list[int] = []

    @property
    def narrow_tail(self) -> bool:
        """Whether the last of several blocks runs on the scored positions only, after its attention."""
        return self._narrow_tail and self.first < len(self.blocks) - 1

    _narrow_tail = True

    def widen(self) -> None:
        """Keep and run every position from now on, for models whose last block mixes positions after its attention."""
        self.narrow = self._narrow_tail = False
        self._frozen = None
        self.clear()

    def clear(self) -> None:
        """Empty the cache."""
        self._cache.clear()
        self.num_bytes = 0

    def lookup(self, rows: Rows) -> Prefix:
        """Return the states of the rows; those that are not in the cache are computed.

        Args:
            rows: The rows.
        """
        # one copy to the host
        columns = [rows.input_ids, rows.positions, rows.attention_mask.sum(1, keepdim=True, dtype=torch.int64)]
        host, width = torch.cat(columns, 1).cpu().numpy(), rows.input_ids.shape[1]
        lengths = [int(length) for length in host[:, -1]]
        # states of all positions do not depend on which of them are scored
        keys = [
            (row[:length].tobytes(), row[width:-1].tobytes() if self.narrow else b"")
            for row, length in zip(host, lengths, strict=True)
        ]
        missing = {key: row for row, key in enumerate(keys) if key not in self._cache}
        computed: dict[Key, list[Tensor]] = {}
        for some in self._batches(missing, lengths, rows.input_ids.device):
            for key, states in zip(some, self._compute(rows, [missing[key] for key in some], lengths), strict=True):
                computed[key] = self._keep(key, states)
        found = [computed[key] if key in computed else self._cache[key] for key in keys]
        states = [_gather(x, None if self.narrow else width, rows.input_ids.device) for x in zip(*found, strict=True)]
        return Prefix(states, self.narrow)

    def _batches(self, missing: dict[Key, int], lengths: Sequence[int], device: torch.device) -> list[list[Key]]:
        """Divide the sequences to compute into batches: each alone on a CPU, up to 16 of similar length on a GPU."""
        if not _runs_in_batches(device):
            return [[key] for key in missing]
        by_width: dict[int, list[Key]] = {}
        for key, row in missing.items():
            by_width.setdefault(self._padded_width(lengths[row]), []).append(key)
        return [keys[i : i + _NUM_ROWS] for keys in by_width.values() for i in range(0, len(keys), _NUM_ROWS)]

    def _padded_width(self, length: int) -> int:
        width = -(-length // _WIDTH) * _WIDTH
        return width if self._max_positions is None else min(width, self._max_positions)

    def _keep(self, key: Key, states: list[Tensor]) -> list[Tensor]:
        """Keep the states of a sequence if there is room, and return them where they are kept."""
        size = sum(x.numel() * x.element_size() for x in states)
        if self._room_on_gpu is None:
            self._room_on_gpu = _free_bytes(states[0].device) // _SHARE
        on_gpu = states[0].is_cuda and self.num_bytes + size <= self._room_on_gpu
        if not on_gpu:
            states = [x.cpu() for x in states]
        if self.num_bytes + size <= self.max_bytes:
            self._cache[key] = states
            self.num_bytes += size
        return states

    @contextmanager
    def replay(self, prefix: Prefix, rows: Rows, repeats: int) -> Iterator[tuple[dict[str, Any], bool]]:
        """Temporarily let the forward of the model continue from cached states.

        Args:
            prefix: The states of the rows.
            rows: The rows, not yet repeated.
            repeats: Number of perturbed adapters that share them, P.

        Yields:
            The keyword arguments of the model's forward, and whether its outputs are `[P·R, S, …]` (the scored
            positions) instead of `[P·R, T, …]`.
        """
        states = [x.repeat(repeats, 1, 1) if repeats > 1 else x for x in prefix.states]
        first = self.blocks[self.first]
        forwards: dict[nn.Module, Callable[..., Any]] = {
            block: _skipping(length)
            for block, length in zip(self.blocks[: self.first], self._tuple_lengths, strict=False)
        }
        forwards[first] = _continuing(first.forward, states[0])
        forwards |= {
            submodule.module: submodule.returning(x) for submodule, x in zip(self._replayed, states[1:], strict=True)
        }
        forwards |= {submodule.module: submodule.returning(states[0][..., :1]) for submodule in self._unused}
        repeated = rows.repeat(repeats)
        if self.narrow_tail and self._narrowed_after:
            forwards[self.blocks[-1]] = _narrowing(self.blocks[-1].forward, self._narrowed_after, repeated.positions)
        if prefix.narrow:
            # everything that looks at other positions is replaced, so tokens and mask have no effect
            call = {"input_ids": repeated.input_ids.new_zeros(states[0].shape[:2])}
        else:
            call = {"input_ids": repeated.input_ids, "attention_mask": repeated.attention_mask}
        with override_forward(forwards):
            yield call, prefix.narrow

    def _compute(self, rows: Rows, chosen: Sequence[int], lengths: Sequence[int]) -> list[list[Tensor]]:
        """Return the states of some of the rows, each `[T or S, D]`.

        Args:
            rows: The rows.
            chosen: Indices of the rows to compute; more than one only on a GPU, where they have one padded width.
            lengths: Numbers of tokens of all rows.
        """
        ids = rows.input_ids
        if self._frozen is None:
            alone = ids[chosen[0], None, : lengths[chosen[0]]]
            self._trace({"input_ids": alone, "attention_mask": torch.ones_like(alone), "use_cache": False})
        if _runs_in_batches(ids.device):
            width = self._padded_width(lengths[chosen[0]])
            filled = [*chosen, *[chosen[0]] * (_NUM_ROWS - len(chosen))]
            sizes = torch.tensor([lengths[row] for row in filled]).to(ids.device)
            mask = (torch.arange(width, device=ids.device) < sizes[:, None]).long()
            ids = F.pad(ids[filled, :width], (0, max(0, width - ids.shape[1]))) * mask
        else:
            (row,) = chosen
            ids = ids[row, None, : lengths[row]]
            mask = torch.ones_like(ids)
        call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        entered: list[Tensor] = []
        outputs: list[Tensor] = []
        first = self.blocks[self.first]
        enter = first.forward

        def entering(*args: Any, **kwargs: Any) -> Any:
            entered.append(_split_hidden(args, kwargs)[0])
            return enter(*args, **kwargs)

        later = zip(self.blocks[self.first + 1 :], self._tuple_lengths[self.first + 1 :], strict=True)
        # submodules record their outputs, and the block itself its input
        forwards: dict[nn.Module, Callable[..., Any]] = {first: entering}
        forwards |= {block: _skipping(length) for block, length in later}
        output_embeddings = self.model.get_output_embeddings()  # type: ignore[operator]
        forwards[output_embeddings] = lambda hidden: hidden[..., :1]
        with torch.no_grad(), override_forward(forwards | recording_forwards(self._replayed, outputs)):
            self.model(**call)
        states = (entered[0], *outputs)
        places: list[Any] = [rows.positions[row] if self.narrow else slice(lengths[row]) for row in chosen]
        # cloned: a view would keep every position in memory
        return [[x[i, where].clone() for x in states] for i, where in enumerate(places)]

    def _trace(self, call: dict[str, Any]) -> None:
        """Find out by some forwards what can be replayed, and what the blocks return.

        Args:
            call: Keyword arguments of the model's forward for one sequence.
        """
        first = self.blocks[self.first]
        lengths: dict[nn.Module, int] = {}

        def measure(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def measured(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                lengths[block] = len(output) if isinstance(output, tuple) else 0
                return output

            return measured

        def run() -> None:
            with torch.no_grad():
                self.model(**call)

        with override_forward({block: measure(block, block.forward) for block in self.blocks}):
            self._frozen = trace_frozen_submodules(first, self.sites, run)
        self._tuple_lengths = [lengths[block] for block in self.blocks]
        worth_keeping = [submodule for submodule in self._frozen if submodule.has_matrix or self.narrow]
        others = zip(self.blocks, self._tuple_lengths, strict=True)
        with override_forward({block: _skipping(length) for block, length in others if block is not first}):
            self._unused = find_unused_outputs(first, self._frozen, worth_keeping, run)
        self._replayed = [submodule for submodule in worth_keeping if submodule not in self._unused]
        last = self.blocks[-1]
        if self.narrow_tail and any(module in self.sites for module in last.modules()):
            self._narrowed_after = trace_frozen_submodules(last, self.sites, run, include_adapted=False)
        if not any(submodule.has_matrix for submodule in self._narrowed_after):
            self._narrow_tail = False


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return `[R, S, D]`, the hidden states `[R, T, D]` at the positions `[R, S]`."""
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    return hidden[rows, positions]


def _runs_in_batches(device: torch.device) -> bool:
    """Whether a device computes several padded sequences faster than each alone."""
    return device.type == "cuda"


def _free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, what torch has reserved and does not use included; 0 for other devices."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _gather(states: Sequence[Tensor], width: int | None, device: torch.device) -> Tensor:
    """Stack the states `[T_r or S, D]` of rows on a device, padded to `width` tokens unless it is None."""
    if any(state.device != states[0].device for state in states):
        states = [state.to(device, non_blocking=True) for state in states]
    stacked = torch.stack(list(states)) if width is None else _pad(states, width)
    return stacked.to(device, non_blocking=True)


def _pad(states: Sequence[Tensor], width: int) -> Tensor:
    """Stack the states `[T_r, D]` of rows, padded with zeros to `width` tokens: `[R, width, D]`."""
    padded = states[0].new_zeros(len(states), width, states[0].shape[1])
    for row, state in zip(padded, states, strict=True):
        row[: len(state)] = state
    return padded


def _split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Callable[[Tensor], tuple[tuple, dict]]]:
    """Return the hidden states of a block's call, and a function that returns the call with others instead."""
    if args:
        return args[0], lambda hidden: ((hidden, *args[1:]), kwargs)
    return kwargs["hidden_states"], lambda hidden: ((), {**kwargs, "hidden_states": hidden})


def _skipping(tuple_length: int) -> Forward:
    """Return a forward of a block that returns its input."""
    return lambda *args, **kwargs: pack_hidden(_split_hidden(args, kwargs)[0], tuple_length)


def _continuing(forward: Forward, hidden: Tensor) -> Forward:
    """Return a forward of a block that ignores its input and runs on these hidden states."""

    def continued(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _split_hidden(args, kwargs)[1](hidden)
        return forward(*args, **kwargs)

    return continued


def _narrowing(forward: Forward, frozen: Sequence[FrozenSubmodule], positions: Tensor) -> Forward:
    """Return a forward of a block that runs its frozen submodules on every position and the rest on the scored ones.

    Args:
        forward: The block's own forward.
        frozen: Its frozen submodules.
        positions: Scored positions `[R, S]`.
    """

    def narrowed(*args: Any, **kwargs: Any) -> Any:
        hidden, with_hidden = _split_hidden(args, kwargs)
        outputs: list[Tensor] = []
        with override_forward(recording_forwards(frozen, outputs, stop=True)):
            run_until_stopped(lambda: forward(*args, **kwargs), token=outputs)
        narrow_args, narrow_kwargs = with_hidden(at_positions(hidden, positions))
        stubs = {
            submodule.module: submodule.returning(at_positions(output, positions))
            for submodule, output in zip(frozen, outputs, strict=True)
        }
        with override_forward(stubs):
            output = forward(*narrow_args, **narrow_kwargs)
        scored = hidden_of(output)
        # returned at their positions, as some models depend on the number of positions. A position that is scored twice
        # holds one value, whose gradient autograd would count twice: a replay is for forward passes alone
        spread = hidden.new_zeros(hidden.shape, dtype=scored.dtype)
        spread[torch.arange(len(spread), device=spread.device)[:, None], positions] = scored
        return (spread, *output[1:]) if isinstance(output, tuple) else spread

    return narrowed
