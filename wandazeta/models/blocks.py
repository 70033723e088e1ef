"""Find the blocks of a model, and call them one by one with the arguments that a real forward passes to them.

The only assumption about the architecture is that each block runs on the output of the one before. The other arguments
of a block (masks, rotary tables, position biases) differ between models and between blocks of one model, so they are
captured from a real forward, for every block and every sample.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wandazeta.models.zero3 import full_shape
from wandazeta.utilities.arguments import closest_names

__all__ = [
    "BlockCall",
    "CallCapture",
    "ReadTensors",
    "StopForward",
    "block_lists",
    "call_block",
    "capture_block_calls",
    "find_blocks",
    "override_forward",
    "run_until_stopped",
]

# arguments that carry a key-value cache; left out, so that every call starts without one
_CACHE_NAMES = frozenset({"past_key_values", "past_key_value", "layer_past", "past", "cache"})

_ABSENT = object()


class StopForward(Exception):  # noqa: N818 - a signal, like StopIteration
    """Signal, raised inside a forward, to end it before its last operation.

    Args:
        token: Identifies who raised it, so that a caller further out does not take the signal of an inner one for its
            own: compare it by identity and raise the signal again if it is another's.
    """

    def __init__(self, token: object = None) -> None:
        super().__init__("A forward was ended early")
        self.token = token


def run_until_stopped(forward: Callable[[], object], token: object) -> bool:
    """Run a forward that a hook may end by `raise StopForward(token)`.

    Args:
        forward: Runs the model.
        token: The token of the signal to catch; any other signal passes through.

    Returns:
        Whether the forward was ended by the signal.
    """
    try:
        forward()
    except StopForward as signal:
        if signal.token is not token:
            raise
        return True
    return False


@dataclass(frozen=True)
class BlockCall:
    """Arguments of a block's call, except the hidden states.

    Args:
        args: Positional arguments, without the hidden states.
        kwargs: Keyword arguments, without the hidden states.
        hidden_name: Keyword of the hidden states, or None if they are the first positional argument.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    hidden_name: str | None = None


def find_blocks(
    model: nn.Module, forward: Callable[[], object] | None = None, name: str | None = None
) -> tuple[str, nn.ModuleList]:
    """Find the list of blocks of a model: its only outermost list of modules with weight matrices.

    Args:
        model: The model.
        forward: Runs the model. Of several lists, only those whose modules all run in it are considered. Without it, of
            a transformers model for images and text, only those of its text decoder.
        name: Dotted name of the list, if it is known.

    Returns:
        The dotted name of the list and the blocks; an `nn.Sequential` is returned as a `ModuleList` of its modules.

    Raises:
        ValueError: If there is no such list or more than one, as in an encoder-decoder model, or the name is unknown.
    """
    candidates = block_lists(model, name)
    if len(candidates) > 1 and forward is not None:
        ran = _modules_that_run(forward, [block for blocks in candidates.values() for block in blocks])
        candidates = {n: blocks for n, blocks in candidates.items() if all(block in ran for block in blocks)}
        if not candidates:
            raise _no_list(model)
    elif len(candidates) > 1 and name is None:
        candidates = _of_text_decoder(model, candidates)
    if len(candidates) > 1:
        found = ", ".join(f"`{n}` ({len(blocks)} blocks)" for n, blocks in candidates.items())
        raise ValueError(
            f"Expected one list of blocks, but found {len(candidates)}: {found}; set `blocks` to the dotted name of "
            "one of them, the others are left as they are"
        )
    return next(iter(candidates.items()))


def block_lists(model: nn.Module, name: str | None = None) -> dict[str, nn.ModuleList]:
    """Return all lists in a model that can be its blocks, by dotted names.

    Lists inside the blocks of another list, such as experts, are not among them.

    Args:
        model: The model.
        name: Dotted name of the only list to return, if it is known.

    Raises:
        ValueError: If there is no such list.
    """
    if name is not None:
        return {name: _blocks_by_name(model, name)}
    lists = _candidates(model, nn.ModuleList) or _candidates(model, nn.Sequential)
    if not lists:
        raise _no_list(model)
    return lists


def _of_text_decoder(model: nn.Module, lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Of several lists, return those of the text decoder of a transformers model that also has a vision tower."""
    if not hasattr(model, "get_decoder") or getattr(model.config, "is_encoder_decoder", False):
        return lists
    inside = set(model.get_decoder().modules())  # type: ignore[operator]
    return {name: blocks for name, blocks in lists.items() if all(block in inside for block in blocks)} or lists


def _no_list(model: nn.Module) -> ValueError:
    lists = {n: list(m) for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and n}
    # a list whose modules have no Linears cannot be pruned, so its name is not offered
    usable = [name for name, modules in lists.items() if modules and all(map(_is_block, modules))]
    return ValueError(
        "Expected a model with a list of blocks that run one after another, but found none; "
        + (
            f"set `blocks` to the dotted name of the list (lists in this model: {', '.join(usable)})"
            if usable
            else "its blocks have to be in an `nn.ModuleList` or `nn.Sequential`"
        )
    )


def _blocks_by_name(model: nn.Module, name: str) -> nn.ModuleList:
    """Return the blocks in the list of this dotted name."""
    modules = dict(model.named_modules())
    lists = {n: m for n, m in modules.items() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)}
    if name not in lists:
        what = "a list of blocks" if name not in modules else f"a list of blocks, not a {type(modules[name]).__name__}"
        raise ValueError(f"Expected the name of {what}, but got {name!r}; {closest_names(name, lists)}")
    return nn.ModuleList(lists[name])


def _candidates(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.ModuleList]:
    """Return the lists of this class that can be the blocks of a model, by dotted names."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        blocks = list(module) if isinstance(module, kind) else []  # type: ignore[call-overload]
        if blocks and all(map(_is_block, blocks)):
            found[name] = blocks
    mixed = {name for name, blocks in found.items() if len({type(block) for block in blocks}) > 1}
    for name in mixed:
        # hybrid models alternate two or more classes of blocks; the parts of a block, or of a model, are mixed too
        inner = [len(found[other]) for other in found if _is_inside(other, name)]
        is_inner = any(_is_inside(name, other) for other in found)
        if kind is not nn.ModuleList or is_inner or max(inner, default=0) >= len(found[name]):
            del found[name]
    # lists inside the modules of another list (experts, attention heads) are parts of its blocks
    outer = [name for name, blocks in found.items() if len(blocks) > 1]
    return {
        name: nn.ModuleList(blocks)
        for name, blocks in found.items()
        if not any(_is_inside(name, other) for other in outer)
    }


def _is_inside(name: str, other: str) -> bool:
    """Whether a dotted name is that of a module inside another one."""
    return name != other and name.startswith(f"{other}." if other else "")


def _is_block(module: nn.Module) -> bool:
    """Whether a module can be a block: a module without children, such as a Linear, is a part of one."""
    return any(True for _ in module.children()) and any(map(_is_matrix, module.parameters()))


def _is_matrix(parameter: Tensor) -> bool:
    return len(full_shape(parameter)) >= 2


def _modules_that_run(forward: Callable[[], object], modules: list[nn.Module]) -> set[nn.Module]:
    """Return those of the modules that run in a forward."""
    ran: set[nn.Module] = set()
    with ExitStack() as hooks, torch.no_grad():
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(lambda module, _: ran.add(module)).remove)
        forward()
    return ran


@contextmanager
def override_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Temporarily replace the forward of modules.

    It is set on the instance. So hooks still run (ZeRO-3 gathers weights in them), attributes can be read, and no
    forward hook of ours is needed (DeepSpeed's strategy removes those in validation).

    Args:
        forwards: The new forward of each module.
    """
    saved = [(module, module.__dict__.get("forward", _ABSENT)) for module in forwards]
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in saved:
            if forward is _ABSENT:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


class ReadTensors(TorchFunctionMode):
    """Records the ids of all tensors that operations are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, Tensor):
                    self.read.add(id(item))
        return func(*args, **(kwargs or {}))


def call_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Run one block on hidden states, with the other arguments of a captured call.

    Args:
        block: The block.
        hidden: Its hidden states.
        call: Its other arguments.

    Returns:
        The hidden states that the block returns, alone or first in a tuple.

    Raises:
        ValueError: If the block does not return hidden states, or changes its input in place.
    """
    version = None if hidden.is_inference() else hidden._version
    if call.hidden_name is None:
        output = block(hidden, *call.args, **call.kwargs)
    else:
        output = block(**{call.hidden_name: hidden}, **call.kwargs)
    if version is not None and hidden._version != version:
        raise ValueError(
            f"Expected blocks that do not change their input, but {type(block).__name__} changes it in place; "
            "write `x = x + …` instead of `x += …` in its forward"
        )
    return _hidden_of_output(block, output)


def capture_block_calls(forward: Callable[[], object], blocks: nn.ModuleList) -> tuple[Tensor, list[BlockCall]]:
    """Run a real forward up to the end of the last block, and record the arguments of each block.

    Args:
        forward: Runs the model.
        blocks: The blocks, in the order in which they run.

    Returns:
        The hidden states at the input of the first block, and one call for each block, without key-value caches.

    Raises:
        ValueError: If a block does not run exactly once, in order, and on the output of the one before.
    """
    hidden, calls, _ = _capture(forward, blocks, outputs=None)
    return hidden, calls


class CallCapture:
    """Captures the blocks' calls of many samples, without running the blocks for most of them.

    If the other arguments do not depend on what the blocks compute, which is checked with the first sample, the blocks
    are skipped for all further samples. Equal tensors of different samples (masks, rotary tables) are stored once.

    Args:
        blocks: The blocks, in the order in which they run.
        device: Device that the captured tensors are moved to.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device | str = "cpu") -> None:
        self.blocks = blocks
        self.device = torch.device(device)
        self._outputs: list[Any] | None = None
        self._started = False
        self._pool: dict[tuple[Any, ...], list[Tensor]] = {}

    def __call__(self, forward: Callable[[], object]) -> tuple[Tensor, list[BlockCall]]:
        """Capture the calls of one sample, as `capture_block_calls` does.

        Args:
            forward: Runs the model on the sample.
        """
        hidden, calls, outputs = _capture(forward, self.blocks, self._outputs)
        if not self._started:
            self._started = True
            if all(_is_hidden_only(output) for output in outputs):
                _, skipped, _ = _capture(forward, self.blocks, outputs)
                self._outputs = outputs if _equal(_fields(calls), _fields(skipped)) else None
        moved: dict[int, Tensor] = {}
        keep = [
            BlockCall(_map(c.args, self._keep, moved), _map(c.kwargs, self._keep, moved), c.hidden_name) for c in calls
        ]
        return hidden.to(self.device), keep

    def _keep(self, tensor: Tensor, moved: dict[int, Tensor]) -> Tensor:
        """Return the stored copy of a tensor, which may occur several times in one sample."""
        if id(tensor) not in moved:
            moved[id(tensor)] = self._pooled(tensor)
        return moved[id(tensor)]

    def _pooled(self, tensor: Tensor) -> Tensor:
        """Return a stored tensor with the same values, or store this one."""
        checksum = tensor.double().sum().item() if not tensor.is_complex() else 0.0
        known = self._pool.setdefault((tensor.dtype, tuple(tensor.shape), str(checksum)), [])
        tensor = tensor.to(self.device)
        for other in known:
            if torch.equal(other, tensor):
                return other
        known.append(tensor)
        return tensor


def _capture(
    forward: Callable[[], object], blocks: nn.ModuleList, outputs: list[Any] | None
) -> tuple[Tensor, list[BlockCall], list[Any]]:
    """Capture the calls and outputs of the blocks.

    Args:
        forward: Runs the model.
        blocks: The blocks.
        outputs: Outputs of an earlier forward; if given, the blocks are skipped and return their inputs in this form.
    """
    if len(set(blocks)) < len(blocks):
        raise ValueError("Expected blocks that each run once, but the list holds the same block more than once")
    calls: list[BlockCall] = []
    seen: list[Any] = []
    first: list[Tensor] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = _split_call(block, args, kwargs)
        index = len(calls)
        if index >= len(blocks) or blocks[index] is not block:
            raise ValueError(
                "Expected every block to run once and in order, but "
                f"block {list(blocks).index(block)} ran as number {index}; shared or reordered blocks cannot be pruned"
            )
        if index == 0:
            first.append(hidden.detach().clone())
        elif not _same(hidden, _hidden_of_output(blocks[index - 1], seen[-1])):
            raise ValueError(
                f"Expected block {index} to run on the output of block {index - 1}, but the model changes the hidden "
                "states in between; give the name of another list of blocks"
            )
        calls.append(call)

    def after(block: nn.Module, args: Any, output: Any) -> None:
        seen.append(output)
        if len(seen) == len(blocks):
            raise StopForward(calls)

    with ExitStack() as undo, torch.no_grad():
        for block in blocks:
            undo.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(block.register_forward_hook(after).remove)
        if outputs is not None:
            skipped = {block: _identity(block, output) for block, output in zip(blocks, outputs, strict=True)}
            undo.enter_context(override_forward(skipped))
        if run_until_stopped(forward, token=calls):
            return first[0], calls, seen
    raise ValueError(
        f"Expected a forward that runs all {len(blocks)} blocks, but it ended after {len(seen)}; "
        "check that the forward reaches the model, and the name of the list of blocks"
    )


def _identity(block: nn.Module, output: Any) -> Callable[..., Any]:
    """Return a forward of a block that returns its input, in a tuple or list if `output` is one."""

    def identity(*args: Any, **kwargs: Any) -> Any:
        hidden, _ = _split_call(block, args, kwargs)
        return hidden if isinstance(output, Tensor) else type(output)([hidden, *output[1:]])

    return identity


def _split_call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Split the arguments of a block into the hidden states and the others."""
    rest = {name: _without_cache(name, value) for name, value in kwargs.items()}
    if args:
        hidden, name = args[0], None
    else:
        floats = [n for n, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()]
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(floats), None)
        hidden = rest.pop(name) if name is not None else None
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"Expected blocks that get their hidden states as the first argument, but {type(block).__name__} got "
            f"{type(hidden).__name__}"
        )
    call_args = _map(tuple(_without_cache("", value) for value in args[1:]), _detach)
    return hidden, BlockCall(call_args, _map(rest, _detach), name)


def _without_cache(name: str, value: Any) -> Any:
    """Return an argument, or None or False instead if it concerns a key-value cache."""
    if name == "use_cache":
        return False
    is_cache = any(cls.__name__ == "Cache" for cls in type(value).__mro__)
    return None if is_cache or name in _CACHE_NAMES else value


def _hidden_of_output(block: nn.Module, output: Any) -> Tensor:
    """Return the hidden states in the output of a block."""
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"Expected blocks that return hidden states, alone or first in a tuple, but {type(block).__name__} "
            f"returned {type(output).__name__}"
        )
    return hidden


def _is_hidden_only(output: Any) -> bool:
    """Whether a block returns hidden states alone; other values could be arguments of the next block."""
    return isinstance(output, Tensor) or (type(output) in (tuple, list) and all(rest is None for rest in output[1:]))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and values."""
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def _detach(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _map(value: Any, fn: Callable[..., Tensor], *extra: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return fn(value, *extra)
    if type(value) in (tuple, list):
        return type(value)(_map(item, fn, *extra) for item in value)
    if type(value) is dict:
        return {key: _map(item, fn, *extra) for key, item in value.items()}
    return value


def _fields(calls: list[BlockCall]) -> list[Any]:
    """Return the values of calls, to compare them."""
    return [(call.args, call.kwargs, call.hidden_name) for call in calls]


def _equal(a: Any, b: Any) -> bool:
    """Whether nested values are equal; of other objects, whether they have the same type."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and _same(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b if isinstance(a, (bool, int, float, str)) else type(a) is type(b)
