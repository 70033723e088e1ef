"""The head of an adapted block: what runs in it before its first adapter, the same for every query. Plain torch."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.models.blocks import override_forward

Forward = Callable[..., Any]


class StopForward(Exception):  # noqa: N818  (a signal, as StopIteration is)
    """Ends a block's forward once everything asked for is known."""


@dataclass(frozen=True)
class Part:
    """One of the largest sub-modules that finish before the first adapter starts.

    Args:
        module: The sub-module.
        wide: Whether it holds a matrix (attention, not a norm) and so is worth memory at every position.
        length: Length of the tuple that it returns, 0 for a plain tensor.
    """

    module: nn.Module
    wide: bool
    length: int

    def returning(self, hidden: Tensor) -> Forward:
        """Return a forward that gives these hidden states, whatever it is called with."""
        output = shaped(hidden, self.length)
        return lambda *args, **kwargs: output


def first_of(output: Any) -> Any:
    """Return the hidden states in what a module returned."""
    return output[0] if isinstance(output, tuple) else output


def shaped(hidden: Tensor, length: int) -> Any:
    """Return hidden states as a module gives them: the first of a tuple of this length, or (0) plain."""
    return (hidden, *([None] * (length - 1))) if length else hidden


def trace_head(block: nn.Module, sites: set[nn.Module], run: Callable[[], object], inside: bool = True) -> list[Part]:
    """Find the head of a block by watching one forward.

    Args:
        block: The block.
        sites: The adapted modules.
        run: Runs a forward of the model.
        inside: Whether a module with an adapter behind it belongs to the head, too.

    Returns:
        The head's parts in the order of their calls.
    """
    started = False
    finished: dict[nn.Module, Any] = {}
    calls: Counter[nn.Module] = Counter()

    def watch(module: nn.Module, forward: Forward) -> Forward:
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal started
            adapted = module in sites
            started = started or (adapted and not (inside and getattr(module, "position", None) == "after"))
            calls[module] += 1
            output = forward(*args, **kwargs)
            started = started or adapted
            if not started:
                for inner in module.modules():
                    finished.pop(inner, None)
                finished[module] = output
            return output

        return watched

    members = [module for module in block.modules() if module is not block]
    with override_forward({module: watch(module, module.forward) for module in members}):
        run()
    head = []
    for module, output in finished.items():
        rest = output[1:] if isinstance(output, tuple) else ()
        first = first_of(output)
        # anything else (a rotary table, a dropout called twice) runs as it is
        if calls[module] == 1 and isinstance(first, Tensor) and first.dim() == 3 and all(x is None for x in rest):
            wide = any(p.dim() > 1 or hasattr(p, "ds_shape") for p in module.parameters())
            head.append(Part(module, wide, len(output) if isinstance(output, tuple) else 0))
    return head


def recorders(head: Sequence[Part], outputs: list[Tensor], stop: bool = False) -> dict[nn.Module, Forward]:
    """Return forwards of the parts that also note down what they give.

    Args:
        head: The parts.
        outputs: Gets their hidden states, in the order of their calls.
        stop: Whether to raise `StopForward` after the last.
    """

    def record(forward: Forward) -> Forward:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            outputs.append(first_of(output))
            if stop and len(outputs) == len(head):
                raise StopForward
            return output

        return recorded

    return {part.module: record(part.module.forward) for part in head}


def find_spare(
    block: nn.Module, head: Sequence[Part], replayed: Iterable[Part], run: Callable[[], object]
) -> list[Part]:
    """Find the parts that only replayed parts look at, so that their output does not matter in a replay.

    Each part in turn gives a column of nan; where the block's output stays the same, nobody looks.

    Args:
        block: The block.
        head: Its head.
        replayed: Those parts whose outputs are kept and replayed.
        run: Runs a forward of the model; no other block has to do anything.
    """
    forward = block.forward
    seen: list[Tensor] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append(first_of(output))
        return output

    outputs: list[Tensor] = []
    with override_forward({block: watched, **recorders(head, outputs)}):
        run()
    output_of = dict(zip(head, outputs, strict=True))
    stubs = {part.module: part.returning(output_of[part]) for part in replayed}
    spare: list[Part] = []
    # the last first: what feeds a spare part may be spare itself
    for part in reversed(head):
        probe = part.returning(torch.full_like(output_of[part][..., :1], torch.nan))
        with override_forward({block: watched, **stubs, part.module: probe}):
            try:
                run()
            except (RuntimeError, ValueError, IndexError, TypeError):
                continue  # needs its full width, so somebody looks
        if seen[-1].shape == seen[0].shape and torch.equal(seen[-1], seen[0]):
            spare.append(part)
            stubs[part.module] = probe
    return spare
