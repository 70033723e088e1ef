"""Frozen-prefix reuse: what no query perturbs is computed once per token sequence and replayed.

Below the first adapter a zeroth-order step is the same for every query, and the same in every epoch. The hidden states
that enter the first adapted block, and the outputs of those of its sub-modules that run before its first adapter (its
attention, in a LLaMA-like block), are therefore kept. The model's own forward then runs with the lower blocks stubbed
to the identity; nothing of the decoder is written again here.

Where the only adapted block is the last one, the rest of the model works position by position, so only the scored
positions are kept: rows of a token instead of rows of a prompt.

Shapes: R rows, P perturbed adapters, T tokens, S scored positions, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.models.blocks import override_forward
from wandazeta.scoring.block_head import Part, StopForward, find_spare, first_of, recorders, shaped, trace_head


@dataclass(frozen=True)
class Rows:
    """Right-padded token sequences and the places in each whose outputs are scored.

    Args:
        input_ids: Tokens `[R, T]`.
        attention_mask: One for tokens, zero for padding, `[R, T]`.
        positions: Places `[R, S]`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor

    def repeat(self, repeats: int) -> "Rows":
        """Return the rows `repeats` times, one whole copy after the other."""
        if repeats == 1:
            return self
        return Rows(*(x.repeat(repeats, 1) for x in (self.input_ids, self.attention_mask, self.positions)))


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Callable[[Tensor], tuple[tuple, dict]]]:
    """Return the hidden states of a block's call, and a function that puts others in their place."""
    if args:
        return args[0], lambda hidden: ((hidden, *args[1:]), kwargs)
    return kwargs["hidden_states"], lambda hidden: ((), {**kwargs, "hidden_states": hidden})


@dataclass(frozen=True)
class Prefix:
    """The kept states of a batch of rows.

    Args:
        states: The input of the first adapted block, then the outputs of its head; each `[R, T or S, D]`.
        narrow: Whether only the scored positions are kept.
    """

    states: list[Tensor]
    narrow: bool


class FrozenPrefix:
    """Keeps the frozen prefix of token sequences, on the CPU, and replays it in the model's own forward.

    Every sequence is computed alone and without padding, so what is kept never depends on the batch that it was first
    seen in: a resumed run rebuilds the same bits.

    Args:
        model: Causal language model.
        blocks: Its decoder blocks.
        sites: The adapted modules.
        max_bytes: Memory to use; sequences beyond it are computed anew each time.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, sites: set[nn.Module], max_bytes: int) -> None:
        self.model = model
        self.blocks = list(blocks)
        self.sites = sites
        self.max_bytes = max_bytes
        self.first = next(i for i, block in enumerate(self.blocks) if any(m in sites for m in block.modules()))
        self.narrow = self.first == len(self.blocks) - 1
        self.num_bytes = 0
        self._kept: dict[tuple[bytes, bytes], list[Tensor]] = {}
        self._head: list[Part] | None = None
        self._replayed: list[Part] = []
        self._spare: list[Part] = []
        self._tail: list[Part] = []
        self._lengths: list[int] = []

    @property
    def narrow_tail(self) -> bool:
        """Whether the last block goes on with the scored positions only, once its attention is done."""
        return self._narrow_tail and self.first < len(self.blocks) - 1

    _narrow_tail = True

    def widen(self) -> None:
        """Keep and run every position from now on: for models whose last block mixes positions after its head."""
        self.narrow = self._narrow_tail = False
        self._head = None
        self.clear()

    def clear(self) -> None:
        """Forget everything kept."""
        self._kept.clear()
        self.num_bytes = 0

    def lookup(self, rows: Rows) -> Prefix:
        """Return the states of the rows, computing those that are not kept."""
        ids, positions = rows.input_ids.cpu(), rows.positions.cpu()
        lengths = rows.attention_mask.sum(1).tolist()
        id_rows, position_rows = ids.numpy(), positions.numpy()
        found: list[list[Tensor]] = []
        for row, length in enumerate(lengths):
            # only the narrow states depend on the positions
            key = (id_rows[row, :length].tobytes(), position_rows[row].tobytes() if self.narrow else b"")
            state = self._kept.get(key)
            if state is None:
                state = self._compute(rows.input_ids[row, :length], rows.positions[row])
                size = sum(x.numel() * x.element_size() for x in state)
                if self.num_bytes + size <= self.max_bytes:
                    self._kept[key] = state
                    self.num_bytes += size
            found.append(state)
        width = ids.shape[1]
        states = [torch.stack(x) if self.narrow else _pad(x, width) for x in zip(*found, strict=True)]
        return Prefix([x.to(rows.input_ids.device, non_blocking=True) for x in states], self.narrow)

    @contextmanager
    def replay(self, prefix: Prefix, rows: Rows, repeats: int) -> Iterator[tuple[dict[str, Any], bool]]:
        """Let the model's forward continue from the kept states.

        Args:
            prefix: The states of the rows.
            rows: The rows, not yet repeated.
            repeats: How many perturbed adapters share them, P.

        Yields:
            The keyword arguments to call the model with, and whether its outputs are `[P·R, S, …]` (the scored
            positions) rather than `[P·R, T, …]`.
        """
        states = [x.repeat(repeats, 1, 1) if repeats > 1 else x for x in prefix.states]
        first = self.blocks[self.first]
        forwards: dict[nn.Module, Callable[..., Any]] = {
            block: self._skip(length) for block, length in zip(self.blocks[: self.first], self._lengths, strict=False)
        }
        forwards[first] = self._continue(first.forward, states[0])
        forwards |= {part.module: part.returning(x) for part, x in zip(self._replayed, states[1:], strict=True)}
        forwards |= {part.module: part.returning(states[0][..., :1]) for part in self._spare}
        repeated = rows.repeat(repeats)
        if self.narrow_tail and self._tail:
            forwards[self.blocks[-1]] = self._narrowed(self.blocks[-1].forward, self._tail, repeated.positions)
        if prefix.narrow:
            # the tokens and their mask no longer matter: everything that mixes positions is stubbed
            call = {"input_ids": repeated.input_ids.new_zeros(states[0].shape[:2])}
        else:
            call = {"input_ids": repeated.input_ids, "attention_mask": repeated.attention_mask}
        with override_forward(forwards):
            yield call, prefix.narrow

    @staticmethod
    def _skip(length: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: shaped(split_hidden(args, kwargs)[0], length)

    @staticmethod
    def _continue(forward: Callable[..., Any], hidden: Tensor) -> Callable[..., Any]:
        def continued(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = split_hidden(args, kwargs)[1](hidden)
            return forward(*args, **kwargs)

        return continued

    def _narrowed(self, forward: Callable[..., Any], head: Sequence[Part], positions: Tensor) -> Callable[..., Any]:
        """Run a block's head on every position and what follows on the scored ones."""

        def narrowed(*args: Any, **kwargs: Any) -> Any:
            hidden, place = split_hidden(args, kwargs)
            outputs: list[Tensor] = []
            with override_forward(recorders(head, outputs, stop=True)), suppress(StopForward):
                forward(*args, **kwargs)
            args, kwargs = place(at_positions(hidden, positions))
            stubs = {
                part.module: part.returning(at_positions(output, positions))
                for part, output in zip(head, outputs, strict=True)
            }
            with override_forward(stubs):
                output = forward(*args, **kwargs)
            first = first_of(output)
            # back in place, as some models look at the number of positions; one that is scored twice holds one value,
            # whose gradient autograd would count twice: replays are for forward passes alone
            spread = hidden.new_zeros(hidden.shape, dtype=first.dtype)
            spread[torch.arange(len(spread), device=spread.device)[:, None], positions] = first
            return (spread, *output[1:]) if isinstance(output, tuple) else spread

        return narrowed

    def _compute(self, input_ids: Tensor, positions: Tensor) -> list[Tensor]:
        """Return the states of one sequence, each `[T or S, D]`, on the CPU."""
        call = {"input_ids": input_ids[None], "attention_mask": torch.ones_like(input_ids[None]), "use_cache": False}
        if self._head is None:
            self._trace(call)
        entered: list[Tensor] = []
        outputs: list[Tensor] = []
        first = self.blocks[self.first]
        enter = first.forward

        def entering(*args: Any, **kwargs: Any) -> Any:
            entered.append(split_hidden(args, kwargs)[0])
            return enter(*args, **kwargs)

        later = zip(self.blocks[self.first + 1 :], self._lengths[self.first + 1 :], strict=True)
        # the recorders stand on the head's sub-modules, `entering` on the block itself
        forwards: dict[nn.Module, Callable[..., Any]] = {first: entering}
        forwards |= {block: self._skip(length) for block, length in later}
        output_embeddings = self.model.get_output_embeddings()  # type: ignore[operator]
        forwards[output_embeddings] = lambda hidden: hidden[..., :1]
        with torch.no_grad(), override_forward(forwards | recorders(self._replayed, outputs)):
            self.model(**call)
        # a copy, or a view would keep every position alive
        return [(x[0, positions] if self.narrow else x[0]).to("cpu").clone() for x in (entered[0], *outputs)]

    def _trace(self, call: dict[str, Any]) -> None:
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
            self._head = trace_head(first, self.sites, run)
        self._lengths = [lengths[block] for block in self.blocks]
        worth_keeping = [part for part in self._head if part.wide or self.narrow]
        others = zip(self.blocks, self._lengths, strict=True)
        with override_forward({block: self._skip(length) for block, length in others if block is not first}):
            self._spare = find_spare(first, self._head, worth_keeping, run)
        self._replayed = [part for part in worth_keeping if part not in self._spare]
        last = self.blocks[-1]
        if self.narrow_tail and any(module in self.sites for module in last.modules()):
            self._tail = trace_head(last, self.sites, run, inside=False)
        if not any(part.wide for part in self._tail):
            self._narrow_tail = False


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return `[R, S, D]`, the hidden states `[R, T, D]` at the positions `[R, S]`."""
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    return hidden[rows, positions]


def _pad(states: Sequence[Tensor], width: int) -> Tensor:
    """Return states `[T_r, D]` of rows with zeros up to `width` tokens: `[R, width, D]`."""
    padded = states[0].new_zeros(len(states), width, states[0].shape[1])
    for row, state in zip(padded, states, strict=True):
        row[: len(state)] = state
    return padded
