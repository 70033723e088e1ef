"""Checkpoints that are written whole or not at all."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from wandazeta.utilities.files import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its place, flushes it to the disk and renames it.

    Lightning's own makes it in the system's temporary folder and moves it. To another file system, as from `/tmp` of a
    node to a shared folder, a move is a copy over the checkpoint before: a full disk or a kill leaves part of one.
    Where checkpoints go to a URL, nothing is changed. `wandazeta` uses it unless a run has another.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), buffer.getvalue())
