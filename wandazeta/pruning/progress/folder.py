"""Progress of a pruning on disk: one file per block, and a key of everything that decides the result.

| file | contents |
|---|---|
| `key.json` | what is pruned, how and with what (`PruneKey`) |
| `block_0000.safetensors`, … | pruned weights, masks and record of one block |
| `block_0000.cost.json`, … | seconds and memory of the block, the only figures that differ between equal runs |
| `report.json` | the report of all blocks, once the pruning is complete |
| `complete.json` | marks the pruning as complete |

All files are written atomically (`wandazeta.utilities.files`); none is a pickle. A block file holds the digest of the
block before it, so that blocks of two different runs are never mixed.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wandazeta.models.safetensors_io import LazyTensor, write_streamed
from wandazeta.models.streaming import StoredTensor, back_by_file, is_file_backed
from wandazeta.pruning.progress.key import PruneKey
from wandazeta.pruning.pruner import BlockResult
from wandazeta.pruning.records import BlockRecord, PruneReport
from wandazeta.utilities import files
from wandazeta.utilities.hashing import digest_tensor

__all__ = ["ProgressFolder"]

_COSTS = ("seconds", "peak_memory")
_REMEDY = "; choose another `output_dir`, restore what changed, or delete the folder to prune anew."


class ProgressFolder:
    """Saves finished blocks of a pruning and loads them again.

    Open it with `open` to prune, `open_finished` to load a finished pruning for a model, or `open_existing` to read
    whatever it holds.

    Args:
        directory: The folder.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._key_path = self.directory / "key.json"
        self._report_path = self.directory / "report.json"
        self._complete_path = self.directory / "complete.json"
        self._key_digest = ""
        # digests of the blocks that were saved or loaded, by index
        self._block_digests: dict[int, str] = {}

    @property
    def place(self) -> Path:
        """The folder that the user has named."""
        return self.directory

    # -- the key ----------------------------------------------------------------------------------------------------

    @property
    def key_digest(self) -> str:
        """Digest of the key that the folder was made with; empty before the folder is opened."""
        return self._key_digest

    @property
    def is_complete(self) -> bool:
        """Whether the folder is marked as complete."""
        return self._complete_path.exists()

    def read_key(self) -> PruneKey | None:
        """Read the key that the folder was made with.

        Returns:
            The key, or None if the folder has none.

        Raises:
            ValueError: If the key file is damaged.
        """
        try:
            return PruneKey.from_dict(json.loads(self._key_path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected '{self._key_path}' to be the key of a pruning, but it cannot be read{_REMEDY}"
            ) from error

    def reserve(self, num_bytes: int) -> None:
        """Check that the folder can be written to, and has room for the blocks unless it holds some.

        Args:
            num_bytes: Size of all block files.

        Raises:
            ValueError: If it cannot be written to, or the disk has too little space.
        """
        files.check_writable(self.directory, needed_bytes=0 if self._key_path.exists() else num_bytes)

    def open(self, key: PruneKey) -> None:
        """Open the folder to prune: start a pruning in it, or continue the one it holds.

        An unfinished pruning is continued only in the software environment it was started in; for a finished one the
        environment does not matter any more.

        Args:
            key: The key of this run.

        Raises:
            ValueError: If the folder holds another pruning (the message names the difference), or cannot be written.
        """
        files.check_writable(self.directory)
        found = self.read_key()
        has_blocks = any(self.directory.glob("block_*.safetensors"))
        if found is None and has_blocks:
            raise ValueError(
                f"Expected argument `output_dir` to hold a pruning with its key, but '{self.directory}' has block "
                f"files and no key.json{_REMEDY}"
            )
        # a run that failed before its first block, for a wrong option say, leaves a key that protects nothing
        if found is None or not (has_blocks or self.is_complete):
            files.write_json(self._key_path, key.to_dict())
            found = key
        (self.directory / files.TEMPORARY_NAME).unlink(missing_ok=True)
        environment = [] if self.is_complete else ["environment"]
        self._require_same(key, found, ["options", "model", "calibration", *environment])
        self._key_digest = found.digest

    def open_finished(self, key: PruneKey) -> None:
        """Open a finished pruning for reading.

        Args:
            key: The key of this run. Calibration and environment are not compared: they cannot change a finished
                pruning, and the calibration data need not be available where a model is only evaluated.

        Raises:
            ValueError: If the folder holds no finished pruning, or one of another model or with other options.
        """
        found = self.read_key()
        if found is None or not self.is_complete:
            state = "no pruning" if found is None else "an unfinished pruning"
            raise ValueError(
                f"Expected argument `output_dir` to hold a finished pruning of this model, but '{self.directory}' "
                f"holds {state}; run `fit` or `prune` first."
            )
        self._require_same(key, found, ["options", "model"])
        self._key_digest = found.digest

    def open_existing(self) -> PruneKey:
        """Open the folder for reading, whichever pruning it holds.

        Returns:
            The key of that pruning.

        Raises:
            ValueError: If the folder holds no pruning.
        """
        found = self.read_key()
        if found is None:
            raise ValueError(f"Expected '{self.directory}' to hold a pruning, but it has no key.json.")
        self._key_digest = found.digest
        return found

    def _require_same(self, key: PruneKey, found: PruneKey, parts: list[str]) -> None:
        difference = key.difference(found, parts)
        if difference:
            raise ValueError(
                f"Expected argument `output_dir` to hold the pruning of this run, but '{self.place}' holds another "
                f"one: it differs in {difference}{_REMEDY}"
            )

    # -- single blocks ----------------------------------------------------------------------------------------------

    def num_saved(self) -> int:
        """Number of block files, from the first block on, without reading them."""
        return next(index for index in itertools.count() if not self._block_path(index).exists())

    def save(self, block_index: int, result: BlockResult) -> None:
        """Save a finished block.

        Args:
            block_index: Position of the block, from 0.
            result: Its weights, masks and record.

        Raises:
            OSError: If the file cannot be written, for example on a full disk.
        """
        tensors = {f"weight:{name}": tensor for name, tensor in result.weights.items()}
        tensors |= {f"mask:{name}": tensor for name, tensor in result.masks.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        record = result.record.to_dict()
        costs = {name: record.pop(name) for name in _COSTS if name in record}
        previous = self._block_digests.get(block_index - 1, "")
        note: dict[str, Any] = {"key": self._key_digest, "previous": previous, "record": record}
        note["digest"] = _digest(tensors, note)
        files.write_json(self._cost_path(block_index), costs)
        lazy = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
        write_streamed(self._block_path(block_index), lazy, {"wandazeta": json.dumps(note)})
        self._block_digests[block_index] = note["digest"]

    def load(self, block_index: int) -> BlockResult | None:
        """Load a finished block.

        Args:
            block_index: Position of the block, from 0.

        Returns:
            The block, or None if it has to be pruned again: its file is missing or damaged, belongs to another
            pruning, or was made from another previous block.
        """
        try:
            with safe_open(self._block_path(block_index), framework="pt") as file:
                note = json.loads(file.metadata()["wandazeta"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            expected = (self._key_digest, self._block_digests.get(block_index - 1, ""), _digest(tensors, note))
            if (note["key"], note["previous"], note["digest"]) != expected:
                return None
            costs = json.loads(self._cost_path(block_index).read_bytes())
            costs = {name: costs[name] for name in _COSTS if name in costs}
            record = BlockRecord.from_dict({**note["record"], **costs})
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        self._block_digests[block_index] = note["digest"]
        weights = {name.removeprefix("weight:"): t for name, t in tensors.items() if name.startswith("weight:")}
        masks = {name.removeprefix("mask:"): t for name, t in tensors.items() if name.startswith("mask:")}
        return BlockResult(weights=weights, masks=masks, record=record)

    def _block_path(self, block_index: int) -> Path:
        return self.directory / f"block_{block_index:04d}.safetensors"

    def _cost_path(self, block_index: int) -> Path:
        return self.directory / f"block_{block_index:04d}.cost.json"

    # -- a complete pruning -----------------------------------------------------------------------------------------

    def finish(self, report: PruneReport) -> None:
        """Mark the pruning as complete.

        Args:
            report: The report of all blocks.

        Raises:
            OSError: If a file cannot be written, for example on a full disk.
        """
        files.write_json(self._report_path, report.to_dict())
        files.write_json(self._complete_path, self._completion_mark(len(report.blocks)))

    def _completion_mark(self, num_blocks: int) -> dict[str, Any]:
        return {"key": self._key_digest, "num_blocks": num_blocks, "last": self._block_digests[num_blocks - 1]}

    def read_report(self) -> PruneReport:
        """Read the report of a complete pruning.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is not JSON.
            KeyError: If it is not a report.
            TypeError: If it is not a report.
        """
        return PruneReport.from_dict(json.loads(self._report_path.read_bytes()))

    def results(self, num_blocks: int) -> Iterator[BlockResult]:
        """Load all blocks, one after the other.

        Args:
            num_blocks: Number of blocks.

        Yields:
            The blocks in order.

        Raises:
            ValueError: If a block is missing or damaged.
        """
        self._block_digests.clear()
        for index in range(num_blocks):
            result = self.load(index)
            if result is None:
                raise ValueError(
                    f"Expected a complete block in '{self._block_path(index)}', but it is missing or damaged."
                )
            yield result

    def stored_masks(self, report: PruneReport) -> dict[str, Tensor]:
        """List the masks of a complete pruning without keeping them in memory.

        Args:
            report: The report of all blocks.

        Returns:
            Masks by full parameter name, True where a weight is kept, as tensors that are read from the block files
            when they are needed (`wandazeta.models.streaming`).

        Raises:
            ValueError: If a block is missing or damaged.
        """
        return {
            f"{record.name}.{name}": back_by_file(
                torch.empty_like(mask, device="meta"), StoredTensor(self._block_path(record.index), f"mask:{name}")
            )
            for record, result in zip(report.blocks, self.results(len(report.blocks)), strict=True)
            for name, mask in result.masks.items()
        }

    def redirect_stored_weights(self, blocks: nn.ModuleList, report: PruneReport) -> None:
        """Make the weights of a streamed model be read from the block files instead of the dense model's files.

        Args:
            blocks: The blocks of the model; weights in memory are left alone.
            report: The report of all blocks.
        """
        for block, record in zip(blocks, report.blocks, strict=True):
            parameters = dict(block.named_parameters())
            for layer in record.layers:
                if is_file_backed(parameters[layer.name]):
                    stored = StoredTensor(self._block_path(record.index), f"weight:{layer.name}")
                    back_by_file(parameters[layer.name], stored)

    def load_into(self, blocks: nn.ModuleList) -> bool:
        """Load a complete pruning into the weights of a dense model.

        Args:
            blocks: The blocks of the model. Weights of a streamed model are left alone; see
                `redirect_stored_weights`.

        Returns:
            False if the pruning is incomplete or damaged; the model is unchanged then.
        """
        try:
            mark = json.loads(self._complete_path.read_bytes())
            # all files are read twice, so that a damaged one is found before the first weight is changed
            for _ in self.results(len(blocks)):
                pass
        except (OSError, ValueError):
            return False
        if mark != self._completion_mark(len(blocks)):
            return False
        if all(is_file_backed(parameter) for parameter in blocks.parameters()):
            return True
        for block, result in zip(blocks, self.results(len(blocks)), strict=True):
            parameters = dict(block.named_parameters())
            with torch.no_grad():
                for name, weight in result.weights.items():
                    parameters[name].copy_(weight)
        return True


def _digest(tensors: dict[str, Tensor], note: dict[str, Any]) -> str:
    """Hash the tensors of a block file, its record, its key and the digest of the block before it."""
    digest = hashlib.sha256(json.dumps([note["key"], note["previous"], note["record"]], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name}={digest_tensor(tensors[name])};".encode())
    return digest.hexdigest()[:32]
