"""Graphs on a CPU: what CUDA graphs do, by recording operations, so that what would break one gives wrong numbers."""

import weakref

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

NOT_CAPTURABLE = ("aten._local_scalar_dense", "aten.equal", "aten.nonzero", "aten.bincount", "aten.masked_select")
GARBAGE = 255  # NaN in all floating-point types


def key(tensor):
    return tensor.untyped_storage()._cdata


class Outside:
    """A tensor made outside a graph: its address only, so that it is not kept alive."""

    def __init__(self, tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype = tensor.dtype
        self.layout = (tensor.storage_offset(), tensor.shape, tensor.stride())

    def tensor(self):
        assert not self.storage.expired(), "a graph uses memory that was freed"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class Recording(TorchDispatchMode):
    """The operations of one capture. What they have changed is undone at its end, as a capture computes nothing."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.made = {}
        self.saved = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(func).startswith(NOT_CAPTURABLE):
            raise RuntimeError("operation not permitted when stream is capturing")
        given = {key(t): t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        if func._schema.is_mutable:
            for storage, tensor in given.items():
                if storage not in self.made and storage not in self.saved:
                    self.saved[storage] = tensor.untyped_storage(), tensor.untyped_storage().clone()
        arguments = tree_map(self.remember, (args, kwargs))
        result = func(*args, **kwargs)
        returned = [t for t in tree_iter(result) if isinstance(t, torch.Tensor)]
        for tensor in returned:
            if key(tensor) not in given:
                self.made[key(tensor)] = tensor.untyped_storage()
        self.operations.append((func, arguments, [None if key(t) in given else t.detach() for t in returned]))
        return result

    def remember(self, value):
        is_outside = isinstance(value, torch.Tensor) and key(value) not in self.made
        return Outside(value) if is_outside else value.detach() if isinstance(value, torch.Tensor) else value

    def undo(self):
        for storage, values in self.saved.values():
            storage.copy_(values)
        self.saved.clear()
        self.spoil()

    def spoil(self):
        for storage in self.made.values():
            storage.fill_(GARBAGE)

    def replay(self):
        for func, arguments, results in self.operations:
            args, kwargs = tree_map(lambda v: v.tensor() if isinstance(v, Outside) else v, arguments)
            # a view made at the capture still has its memory
            if func._schema.is_mutable or any(result is not None for result in results):
                found = [t for t in tree_iter(func(*args, **kwargs)) if isinstance(t, torch.Tensor)]
                for own, new in zip(results, found, strict=True):
                    if own is not None:
                        own.copy_(new)


class RecordedGraphs:
    """A backend of `GraphedCall`, whose graphs share their memory as those of CUDA do."""

    def __init__(self):
        self.num_captures = self.num_failures = self.num_replays = 0
        self.recordings = weakref.WeakSet()

    def run(self, function):
        return function()

    def capture(self, function):
        self.num_captures += 1
        recording = Recording()
        try:
            with recording:
                result = function()
        except RuntimeError:
            self.num_failures += 1
            raise
        finally:
            recording.undo()
        self.recordings.add(recording)

        def replay():
            self.num_replays += 1
            for other in self.recordings:
                other.spoil()
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                recording.replay()

        return result, replay


class FailingGraphs(RecordedGraphs):
    """A backend whose captures fail at their end."""

    def capture(self, function):
        def fails():
            function()
            raise RuntimeError("out of memory")

        return super().capture(fails)
