"""Directory of a pruned model that holds the progress of its pruning until the model is complete."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from wandazeta.models.checkpoint import read_headers
from wandazeta.models.pretrained import names_in_memory
from wandazeta.models.safetensors_io import open_safetensors
from wandazeta.models.streaming import StoredTensor
from wandazeta.pruning.export.card import REPORT_FILE
from wandazeta.pruning.export.masks import MASKS_FILE
from wandazeta.pruning.export.packed import PACKED_FILE, write_packed
from wandazeta.pruning.export.pretrained import export_pretrained
from wandazeta.pruning.progress.folder import ProgressFolder
from wandazeta.pruning.progress.key import PruneKey
from wandazeta.pruning.records import PruneReport
from wandazeta.utilities.files import check_writable, write_json

__all__ = ["DISCARDED", "OutputFolder", "publish"]

_PROGRESS = "progress"
_KEY_FILE = Path(MASKS_FILE).with_name("key.json")
# renamed before it is deleted, so that a killed process leaves the progress whole or not at all
DISCARDED = ".progress.old"
# last of all: transformers reads no directory without it
_LAST = "config.json"


class OutputFolder(ProgressFolder):
    """Hugging Face directory of a pruned model, which is made, continued or loaded.

    Until the model is complete, its pruning is in the subfolder `progress`, which is then removed. The complete
    directory keeps the key of the pruning, by which a later call recognises it.

    Args:
        directory: The directory.
        model: The transformers model that is pruned.
    """

    def __init__(self, directory: str | os.PathLike[str], model: nn.Module) -> None:
        self.output = Path(directory).absolute()
        self._model = model
        super().__init__(self.output / _PROGRESS)

    @property
    @override
    def place(self) -> Path:
        return self.output

    @property
    def is_exported(self) -> bool:
        """Whether the directory holds the complete model."""
        return (self.output / _KEY_FILE).exists() and not self._key_path.exists()

    def check(self) -> None:
        """Check that the directory can be used, before anything is written.

        Raises:
            ValueError: If it holds other files than a pruned model or the progress of one, or cannot be written to, or
                the disk has too little space for the model.
        """
        if self.is_exported:
            shutil.rmtree(self.output / DISCARDED, ignore_errors=True)
            return
        if self.output.is_dir() and any(self.output.iterdir()) and not self.directory.is_dir():
            what = "another pruned model" if (self.output / REPORT_FILE).exists() else "other files"
            raise ValueError(
                f"Expected argument `output_dir` to be a new or empty folder, but '{self.output}' holds {what}; choose "
                "another one or delete it"
            )
        check_writable(self.output, needed_bytes=sum(weight.nbytes for weight in self._model.parameters()))

    def export(self, tokenizer: Any, report: PruneReport, *, pack: bool = False) -> None:
        """Write the model of a finished pruning, unless the directory holds it, and remove the progress.

        Args:
            tokenizer: Tokenizer of the model, or None.
            report: The report of the pruning.
            pack: Write the 2:4 packed file too.

        Raises:
            OSError: If a file cannot be written, for example on a full disk; the progress is kept.
        """
        if self.is_exported:
            if pack and not (self.output / PACKED_FILE).exists():
                write_packed(self.output)
            return
        new = self.directory / "export"
        masks = self.stored_masks(report)
        export_pretrained(self._model, tokenizer, new, report, masks, key=self.key_digest, pack=pack)
        key = self.read_key()
        assert key is not None
        write_json(new / _KEY_FILE, key.to_dict())
        publish(new, self.output, self.directory)

    @override
    def reserve(self, num_bytes: int) -> None:
        if not self.is_exported:
            super().reserve(num_bytes)

    @override
    def open(self, key: PruneKey) -> None:
        if not self.is_exported:
            super().open(key)
            return
        try:
            found = PruneKey.from_dict(json.loads((self.output / _KEY_FILE).read_bytes()))
            self.read_report()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected argument `output_dir` to hold a complete pruned model, but a file in '{self.output}' is "
                "damaged; delete the folder to prune anew"
            ) from error
        self._require_same(key, found, ["options", "model", "calibration"])
        self._key_digest = found.digest

    @override
    def read_report(self) -> PruneReport:
        if not self.is_exported:
            return super().read_report()
        return PruneReport.from_dict(json.loads((self.output / REPORT_FILE).read_bytes()))

    @override
    def load_into(self, blocks: nn.ModuleList) -> bool:
        if not self.is_exported:
            return super().load_into(blocks)
        parameters, names = dict(self._model.named_parameters()), names_in_memory(self._model)
        files = read_headers(self.output)
        with open_safetensors(self.output / MASKS_FILE) as masks, torch.no_grad():
            for name in masks.keys():  # noqa: SIM118 (not a dict)
                parameters[names[name]].copy_(StoredTensor(files[name].path, name).read())
        return True


def publish(new: Path, output: Path, progress: Path) -> None:
    """Move finished files into the output directory and remove the progress, which stays whole until then.

    A process that is killed at any instant leaves the progress or the complete directory.

    Args:
        new: Directory with the finished files, inside `progress`.
        output: The output directory.
        progress: Directory of the progress, inside `output`.
    """
    for path in sorted(new.iterdir(), key=lambda path: path.name == _LAST):
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    progress.replace(output / DISCARDED)
    shutil.rmtree(output / DISCARDED)
