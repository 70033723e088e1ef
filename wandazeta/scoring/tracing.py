"""Trace a forward to find the submodules of a block that finish before its first adapter starts.

Their outputs do not depend on the adapters, so every query of a zeroth-order step can share them.

Shapes: R rows, T tokens, D hidden size.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.models.blocks import StopForward, override_forward

__all__ = [
    "FrozenSubmodule",
    "find_unused_outputs",
    "hidden_of",
    "pack_hidden",
    "recording_forwards",
    "trace_frozen_submodules",
]

Forward = Callable[..., Any]


@dataclass(frozen=True)
class FrozenSubmodule:
    """A submodule whose output does not depend on the adapters.

    Args:
        module: The submodule.
        has_matrix: Whether it holds a matrix, as attention does and a norm does not: only then is its output worth the
            memory at every position.
        tuple_length: Length of the tuple that it returns, or 0 for a tensor.
    """

    module: nn.Module
    has_matrix: bool
    tuple_length: int

    def returning(self, hidden: Tensor) -> Forward:
        """Return a forward that ignores its arguments and returns these hidden states."""
        output = pack_hidden(hidden, self.tuple_length)
        return lambda *args, **kwargs: output


def hidden_of(output: Any) -> Any:
    """Return the hidden states in the output of a module: its first element, if it is a tuple."""
    return output[0] if isinstance(output, tuple) else output


def pack_hidden(hidden: Tensor, tuple_length: int) -> Any:
    """Return hidden states as a module returns them: first in a tuple of this length, or (0) alone."""
    return (hidden, *([None] * (tuple_length - 1))) if tuple_length else hidden


def trace_frozen_submodules(
    block: nn.Module, sites: set[nn.Module], run: Callable[[], object], include_adapted: bool = True
) -> list[FrozenSubmodule]:
    """Find the outermost submodules of a block that finish before its first adapter starts, by one forward.

    Args:
        block: The block.
        sites: The modules with adapters.
        run: Runs a forward of the model.
        include_adapted: Whether the module itself counts as frozen if its adapter comes after it.

    Returns:
        The submodules in the order of their calls.
    """
    started = False
    finished: dict[nn.Module, Any] = {}
    calls: Counter[nn.Module] = Counter()

    def trace(module: nn.Module, forward: Forward) -> Forward:
        def traced(*args: Any, **kwargs: Any) -> Any:
            nonlocal started
            adapted = module in sites
            comes_after = include_adapted and getattr(module, "position", None) == "after"
            started = started or (adapted and not comes_after)
            calls[module] += 1
            output = forward(*args, **kwargs)
            started = started or adapted
            if not started:
                for inner in module.modules():
                    finished.pop(inner, None)
                finished[module] = output
            return output

        return traced

    submodules = [module for module in block.modules() if module is not block]
    with override_forward({module: trace(module, module.forward) for module in submodules}):
        run()
    frozen = []
    for module, output in finished.items():
        rest = output[1:] if isinstance(output, tuple) else ()
        hidden = hidden_of(output)
        # anything else, such as a rotary table or a dropout that is called twice, runs again
        if calls[module] == 1 and isinstance(hidden, Tensor) and hidden.dim() == 3 and all(x is None for x in rest):
            has_matrix = any(p.dim() > 1 or hasattr(p, "ds_shape") for p in module.parameters())
            frozen.append(FrozenSubmodule(module, has_matrix, len(output) if isinstance(output, tuple) else 0))
    return frozen


def recording_forwards(
    submodules: Sequence[FrozenSubmodule], outputs: list[Tensor], stop: bool = False
) -> dict[nn.Module, Forward]:
    """Return forwards of the submodules that also append their hidden states to a list.

    Args:
        submodules: The submodules.
        outputs: Receives the hidden states in the order of the calls.
        stop: Whether to raise `StopForward(outputs)` after the last call.
    """

    def record(forward: Forward) -> Forward:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            outputs.append(hidden_of(output))
            if stop and len(outputs) == len(submodules):
                raise StopForward(outputs)
            return output

        return recorded

    return {submodule.module: record(submodule.module.forward) for submodule in submodules}


def find_unused_outputs(
    block: nn.Module,
    frozen: Sequence[FrozenSubmodule],
    replayed: Iterable[FrozenSubmodule],
    run: Callable[[], object],
) -> list[FrozenSubmodule]:
    """Find the frozen submodules whose outputs only feed replayed ones, and do not matter in a replay.

    Each one in turn returns a column of nan. If the output of the block stays the same, nothing else uses it.

    Args:
        block: The block.
        frozen: Its frozen submodules.
        replayed: Those whose outputs are kept and replayed.
        run: Runs a forward of the model; all other blocks may be skipped.
    """
    forward = block.forward
    block_outputs: list[Tensor] = []

    def observed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        block_outputs.append(hidden_of(output))
        return output

    outputs: list[Tensor] = []
    with override_forward({block: observed, **recording_forwards(frozen, outputs)}):
        run()
    output_of = dict(zip(frozen, outputs, strict=True))
    stubs = {submodule.module: submodule.returning(output_of[submodule]) for submodule in replayed}
    unused: list[FrozenSubmodule] = []
    # from the last to the first: the inputs of an unused submodule may be unused themselves
    for submodule in reversed(frozen):
        probe = submodule.returning(torch.full_like(output_of[submodule][..., :1], torch.nan))
        with override_forward({block: observed, **stubs, submodule.module: probe}):
            try:
                run()
            except (RuntimeError, ValueError, IndexError, TypeError):
                continue  # a column instead of the full width raised an error, so the output is used
        if block_outputs[-1].shape == block_outputs[0].shape and torch.equal(block_outputs[-1], block_outputs[0]):
            unused.append(submodule)
            stubs[submodule.module] = probe
    return unused
