"""CUDA graphs of calls that recur, where a GPU waits for the host, which launches the kernels one by one."""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_ATEN = torch.ops.aten

# with fewer samples that can share a graph, its capture does not pay
_MIN_SAMPLES = 4
# a capture cannot use memory that is cached; with less than this part of all memory free, the cache is emptied before
_FREE_PART = 8


class GraphBackend(Protocol):
    """Captures and replays what a function does on the device."""

    def run(self, function: Callable[[], T]) -> T:
        """Run a function as usual, but on the stream of the captures.

        Its first run prepares libraries for this stream; and autograd, which remembers the stream that a weight was
        used on, is not led out of a capture.

        Args:
            function: The function.
        """

    def capture(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record the work of a function without doing it.

        Args:
            function: The function; what it does in Python is done.

        Returns:
            The result, whose tensors have no values yet, and a function that does the work, writing into these tensors.
            Their values are lost when another graph of this backend runs.

        Raises:
            RuntimeError: If the function does what cannot be captured.
        """


def graph_backend(device: torch.device) -> GraphBackend | None:
    """Return what captures graphs on a device; None if nothing does.

    Args:
        device: The device.
    """
    return CUDAGraphBackend(device) if device.type == "cuda" else None


class CUDAGraphBackend:
    """CUDA graphs, which take turns in one pool of memory.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # the default stream cannot be captured
        self._stream = torch.cuda.Stream(device)
        # keeps the pool alive between the blocks, so that no memory is allocated anew for each of them
        self._last: torch.cuda.CUDAGraph | None = None
        self._failed: list[torch.cuda.CUDAGraph] = []

    def run(self, function: Callable[[], T]) -> T:
        """Run a function on the stream of the captures; see `GraphBackend.run`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Capture a function; see `GraphBackend.capture`."""
        if self._failed:
            raise RuntimeError("an earlier capture has failed")
        free, total = torch.cuda.mem_get_info(self._device)
        if free < total / _FREE_PART:
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        pool = None if self._last is None else self._last.pool()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # not `torch.cuda.graph`, which always empties the caches, also that of pinned memory
        with torch.cuda.stream(self._stream):
            try:
                # other threads may allocate and copy meanwhile
                graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    result = function()
                finally:
                    graph.capture_end()
            except RuntimeError:
                # torch's allocator still refers to the graph, and would be misled by another capture
                self._failed.append(graph)
                # else the random numbers of later code would be refused, as if they were captured
                generator = torch.cuda.default_generators[self._stream.device_index]
                generator.graphsafe_set_state(generator.clone_state())
                raise
        self._last = graph
        return result, graph.replay


class _Graph(NamedTuple):
    """A captured call.

    Args:
        inputs: The tensors that it reads its inputs from.
        result: What the function has returned.
        replay: Computes the result.
    """

    inputs: list[Tensor]
    result: Any
    replay: Callable[[], None]


class GraphedCall(Generic[T]):
    """Function of a sample that is captured as a graph, and replayed for all samples with an equal key.

    For each key and shapes of the inputs, the first call runs the function as usual, the second one captures it, and
    this and all later ones replay the graph with their inputs. The function runs as usual where there is no backend,
    for keys of few samples, and where it cannot be captured.

    A replay repeats what the function has done on the device, with tensors at the same addresses, and nothing of what
    it has done in Python. So the function changes tensors in place only, makes none that outlive it but those that it
    returns, and begins by undoing what a failed capture may have left in Python.

    Args:
        function: Called with a sample and tensors; returns tensors and other values.
        keys: For each sample, which is its index, a key that is equal for samples for which the function does the same
            with inputs of equal shapes; None for a sample that is like no other. Without `keys`, a sample is its own
            key, and recurs often enough.
        backend: Captures graphs; None if nothing does.
        copies: Return copies of the tensors that a graph has written. Without, they last until it, or another graph of
            the backend, runs again.

    Examples:
        >>> call = GraphedCall(lambda sample, x: 2 * x)
        >>> call(0, torch.ones(1))
        tensor([2.])
    """

    def __init__(
        self,
        function: Callable[..., T],
        keys: Sequence[Hashable] | None = None,
        backend: GraphBackend | None = None,
        copies: bool = True,
    ) -> None:
        self._function = function
        self._backend = backend
        self._copies = copies
        counts = Counter(keys or ())
        self._keys = None if keys is None else [key if counts[key] >= _MIN_SAMPLES else None for key in keys]
        # None after the first call
        self._graphs: dict[Hashable, _Graph | None] = {}

    def __call__(self, sample: Any, *inputs: Tensor) -> T:
        """Return the result of the function.

        Args:
            sample: The sample: its index, or its key if there are no `keys`.
            inputs: Tensors.
        """
        if self._backend is None:
            return self._function(sample, *inputs)
        alike = sample if self._keys is None else self._keys[sample]
        if alike is None:
            return self._backend.run(lambda: self._function(sample, *inputs))
        key = (alike, *(given.shape for given in inputs))
        if key not in self._graphs:
            self._graphs[key] = None
            with _HostReads() as reads:
                result = self._backend.run(lambda: self._function(sample, *inputs))
            if reads.found:
                self.give_up(f"the host reads values ({reads.found})")
            return result
        graph = self._graphs[key]
        if graph is None:
            try:
                graph = self._graphs[key] = self._capture(self._backend, sample, inputs)
            except RuntimeError as error:
                self.give_up(f"{type(error).__name__}: {error}")
                return self._function(sample, *inputs)
        for own, given in zip(graph.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        graph.replay()
        result = graph.result
        return tree_map_only(Tensor, Tensor.clone, result) if self._copies else result

    def _capture(self, backend: GraphBackend, sample: Any, inputs: Sequence[Tensor]) -> _Graph:
        own = [given.clone() for given in inputs]
        # weights that autocast has cast before, or casts now, do not outlive the contexts around the calls
        torch.clear_autocast_cache()
        try:
            result, replay = backend.capture(lambda: self._function(sample, *own))
        finally:
            torch.clear_autocast_cache()
        return _Graph(own, result, replay)

    @property
    def is_graphed(self) -> bool:
        """Whether calls are captured, or would be if they recur."""
        return self._backend is not None

    def give_up(self, reason: str) -> None:
        """Run the function as usual from now on, and log why.

        Args:
            reason: Why it cannot be captured.
        """
        self._backend = None
        _log(reason)

    def close(self) -> None:
        """Drop the graphs and the function, whoever still refers to this object; it can no longer be called."""
        self._graphs.clear()
        # often a method of an object that refers to this one
        del self._function


Graphed = Callable[..., GraphedCall[Any]]
"""Makes a `GraphedCall` of a function for the samples of a block; `copies` can be given, too."""


@functools.cache
def _log(reason: str) -> None:
    """Log a reason once, not for every function."""
    _logger.warning("CUDA graphs are not used, so that the GPU waits for the host where its work is small: %s", reason)


class _HostReads(TorchDispatchMode):
    """Finds operations whose result the host has to wait for, which cannot be captured.

    An attempt would fail, but leave torch's allocator and generator in the state of a capture.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if reads_host(func, args, result):
            self.found = str(func)
        return result


def reads_host(func: Any, args: Sequence[Any], result: Any) -> bool:
    """Whether an operation makes the host wait for the device: for a value, a shape, or a copy.

    Args:
        func: The operation.
        args: Its positional arguments.
        result: Its result.
    """
    tags = getattr(func, "tags", ())
    if func in (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if func in (_ATEN._to_copy.default, _ATEN.copy_.default):
        source: Tensor = args[0] if func is _ATEN._to_copy.default else args[1]
        return bool(source.device != result.device)
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
