"""Checkpoint plugin that writes every file atomically."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from wandazeta.utilities.files import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically: a full disk or a killed process leaves the previous checkpoint complete.

    Lightning writes a checkpoint to the system's temporary directory and moves it. Across file systems, such as from
    `/tmp` of a node to a shared directory, a move is a copy over the previous checkpoint, which a full disk or a kill
    cuts short. This plugin writes beside the target, flushes to the disk and renames. Checkpoints on remote file
    systems (`s3://…`) are left to Lightning.

    The command line uses this plugin unless the trainer is given another one; elsewhere pass it as
    `Trainer(plugins=[AtomicCheckpointIO()])`.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # to memory first: on a full disk torch's writer raises errors that do not say so
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), buffer.getvalue())
