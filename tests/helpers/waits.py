"""Count where the host would wait for a GPU.

Reading a value (`.item()`, `bool(tensor)`) and a boolean index make the host wait. On a CPU they are operations, too,
and counted here. Copies to the host are no operations there: the methods that make them are counted by their calls.
"""

from collections import Counter
from contextlib import ExitStack
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")
COPIES = ("cpu", "numpy", "tolist")


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if str(func).startswith(("aten.index.", "aten.index_put")) else ()
        if str(func).startswith(WAITS):
            self.counts[str(func)] += 1
        elif any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices):
            self.counts[f"{func} with a mask"] += 1
        return func(*args, **(kwargs or {}))


class WaitsAndCopies(Waits):
    """Counts the operations that make the host wait, and copies to the host."""

    def __enter__(self):
        self.patches = ExitStack()
        for name in COPIES:
            self.patches.enter_context(mock.patch.object(torch.Tensor, name, self._counting(name)))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    def _counting(self, name):
        copy = getattr(torch.Tensor, name)

        def counted(tensor, *args, **kwargs):
            self.counts[name] += 1
            return copy(tensor, *args, **kwargs)

        return counted
