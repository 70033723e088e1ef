"""The progress of a pruning on disk: one file a block, keyed by everything that decides the result.

A folder holds `key.json` (what was pruned, how and with what), `block_0000.safetensors` and so on (weights, masks and
the record of one block each), `block_0000.cost.json` (seconds and memory, the only figures that vary between runs),
and at the end `report.json` and `complete.json`. Every file is written whole or not at all (`files`). No file is a
pickle.
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
from safetensors.torch import save
from torch import Tensor, nn

from wandazeta.models.streaming import Stored, is_stored, store
from wandazeta.pruning.progress.key import PruneKey
from wandazeta.pruning.pruner import BlockResult
from wandazeta.pruning.records import BlockRecord, PruneReport
from wandazeta.utilities import files
from wandazeta.utilities.hashing import digest_tensor

_COSTS = ("seconds", "peak_memory")
_REMEDY = "; choose another `output_dir`, restore what changed, or delete the folder to prune anew."


class ProgressFolder:
    """Keeps finished blocks in a folder; the `Progress` of `prune_model`.

    Args:
        directory: The folder.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._chain: dict[int, str] = {}
        self._key = ""

    # -- the key ----------------------------------------------------------------------------------------------------

    def read_key(self) -> PruneKey | None:
        """Returns the key the folder was made with, or `None` if it holds no pruning.

        Raises:
            ValueError: If there is a key file that is not one.
        """
        try:
            return PruneKey.from_dict(json.loads((self.directory / "key.json").read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected '{self.directory / 'key.json'}' to be the key of a pruning, but it cannot be read{_REMEDY}"
            ) from error

    def open(self, key: PruneKey) -> None:
        """Claims the folder for a pruning, or goes on with the one it holds.

        The software and the device may differ from those of a finished pruning, which they can no longer change; an
        unfinished one is continued only by what it was begun with.

        Args:
            key: The key of this run.

        Raises:
            ValueError: If the folder holds another pruning; the message names the difference.
        """
        files.check_writable(self.directory)
        found = self.read_key()
        blocks = any(self.directory.glob("block_*.safetensors"))
        # one that failed before its first block, for a wrong option say, leaves nothing to protect
        if found is None or not (blocks or (self.directory / "complete.json").exists()):
            if blocks:
                raise ValueError(
                    f"Expected argument `output_dir` to hold a pruning with its key, but '{self.directory}' has block "
                    f"files and no key.json{_REMEDY}"
                )
            files.write_json(self.directory / "key.json", key.to_dict())
            found = key
        (self.directory / files.WRITING).unlink(missing_ok=True)
        parts = ["options", "model", "calibration"]
        if not (self.directory / "complete.json").exists():
            parts.append("environment")
        self._refuse(key.difference(found, parts))
        self._key = found.digest

    def open_finished(self, key: PruneKey) -> None:
        """Opens a finished pruning for reading, by its options and its model.

        Args:
            key: The key of this run; calibration and environment are not compared, for they cannot change what is
                finished and need not be at hand when a model is only evaluated.

        Raises:
            ValueError: If the folder holds no finished pruning, or another one.
        """
        found = self.read_key()
        if found is None or not (self.directory / "complete.json").exists():
            state = "no pruning" if found is None else "an unfinished pruning"
            raise ValueError(
                f"Expected argument `output_dir` to hold a finished pruning of this model, but '{self.directory}' "
                f"holds {state}; run `fit` or `prune` first."
            )
        self._refuse(key.difference(found, ["options", "model"]))
        self._key = found.digest

    def open_again(self) -> PruneKey:
        """Opens the folder for reading, whatever pruning it holds.

        Returns:
            The key that it holds.

        Raises:
            ValueError: If it holds none.
        """
        found = self.read_key()
        if found is None:
            raise ValueError(f"Expected '{self.directory}' to hold a pruning, but it has no key.json.")
        self._key = found.digest
        return found

    def _refuse(self, difference: str | None) -> None:
        if difference:
            raise ValueError(
                f"Expected argument `output_dir` to hold the pruning of this run, but '{self.directory}' holds another "
                f"one: it differs in {difference}{_REMEDY}"
            )

    @property
    def key_digest(self) -> str:
        """The hash of the key the folder was made with (once opened)."""
        return self._key

    # -- blocks -----------------------------------------------------------------------------------------------------

    def _path(self, block_index: int) -> Path:
        return self.directory / f"block_{block_index:04d}.safetensors"

    def num_saved(self) -> int:
        """Number of block files, from the first block on, without reading them."""
        return next(index for index in itertools.count() if not self._path(index).exists())

    def load(self, block_index: int) -> BlockResult | None:
        """Reads a finished block.

        Args:
            block_index: The position of the block.

        Returns:
            The block, or `None` if it is missing, damaged, of another pruning, or made from another previous block:
            it is then to be done again.
        """
        try:
            with safe_open(self._path(block_index), framework="pt") as file:
                note = json.loads(file.metadata()["wandazeta"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            previous = self._chain.get(block_index - 1, "")
            if note["key"] != self._key or note["previous"] != previous or note["digest"] != _digest(tensors, note):
                return None
            costs = self._read_costs(block_index)
            record = BlockRecord.from_dict({**note["record"], **costs})
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        self._chain[block_index] = note["digest"]
        weights = {name[len("weight:") :]: tensor for name, tensor in tensors.items() if name.startswith("weight:")}
        masks = {name[len("mask:") :]: tensor for name, tensor in tensors.items() if name.startswith("mask:")}
        return BlockResult(weights=weights, masks=masks, record=record)

    def save(self, block_index: int, result: BlockResult) -> None:
        """Writes a finished block.

        Args:
            block_index: The position of the block.
            result: Its weights, masks and record.
        """
        tensors = {f"weight:{name}": tensor for name, tensor in result.weights.items()}
        tensors |= {f"mask:{name}": tensor for name, tensor in result.masks.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        record = result.record.to_dict()
        costs = {name: record.pop(name) for name in _COSTS if name in record}
        note: dict[str, Any] = {"key": self._key, "previous": self._chain.get(block_index - 1, ""), "record": record}
        note["digest"] = _digest(tensors, note)
        files.write_json(self.directory / f"block_{block_index:04d}.cost.json", costs)
        # a single metadata entry: safetensors does not keep the order of several
        files.write_atomically(self._path(block_index), save(tensors, metadata={"wandazeta": json.dumps(note)}))
        self._chain[block_index] = note["digest"]

    def _read_costs(self, block_index: int) -> dict[str, Any]:
        costs = json.loads((self.directory / f"block_{block_index:04d}.cost.json").read_bytes())
        return {name: costs[name] for name in _COSTS if name in costs}

    # -- the whole --------------------------------------------------------------------------------------------------

    def finish(self, report: PruneReport) -> None:
        """Marks the pruning as complete.

        Args:
            report: The report of all blocks.
        """
        files.write_json(self.directory / "report.json", report.to_dict())
        last = self._chain[len(report.blocks) - 1]
        complete = {"key": self._key, "num_blocks": len(report.blocks), "last": last}
        files.write_json(self.directory / "complete.json", complete)

    def read_report(self) -> PruneReport:
        """Reads the report of a complete pruning."""
        return PruneReport.from_dict(json.loads((self.directory / "report.json").read_bytes()))

    def results(self, num_blocks: int) -> Iterator[BlockResult]:
        """Reads block after block.

        Args:
            num_blocks: How many there are.

        Raises:
            ValueError: If one is missing or damaged.
        """
        self._chain.clear()
        for index in range(num_blocks):
            result = self.load(index)
            if result is None:
                raise ValueError(f"Expected a whole block in '{self._path(index)}', but it is missing or damaged.")
            yield result

    def stored_masks(self, block_index: int, result: BlockResult) -> dict[str, Tensor]:
        """The masks of a block, left in its file.

        Args:
            block_index: The position of the block.
            result: The block.

        Returns:
            Stored tensors, by parameter name relative to the block.
        """
        path = self._path(block_index)
        return {
            name: store(torch.empty_like(mask, device="meta"), Stored(path, f"mask:{name}"))
            for name, mask in result.masks.items()
        }

    def lend_weights(self, blocks: nn.ModuleList, report: PruneReport) -> None:
        """Lets the stored weights of a model be read from a complete pruning, no longer from the dense model's files.

        Args:
            blocks: The decoder blocks; weights in memory are left alone.
            report: The report of all blocks.
        """
        for block, record in zip(blocks, report.blocks, strict=True):
            parameters = dict(block.named_parameters())
            for layer in record.layers:
                if is_stored(parameters[layer.name]):
                    store(parameters[layer.name], Stored(self._path(record.index), f"weight:{layer.name}"))

    def load_into(self, blocks: nn.ModuleList) -> bool:
        """Puts a complete pruning into a model; stored weights are left to `lend_weights`.

        Args:
            blocks: The decoder blocks of the dense model.

        Returns:
            False, with the model untouched, if the pruning is not complete and whole.
        """
        try:
            marker = json.loads((self.directory / "complete.json").read_bytes())
            # twice over the files, so that a damaged one is found before the first weight is changed
            for _ in self.results(len(blocks)):
                pass
        except (OSError, ValueError):
            return False
        if marker != {"key": self._key, "num_blocks": len(blocks), "last": self._chain[len(blocks) - 1]}:
            return False
        if all(is_stored(parameter) for parameter in blocks.parameters()):
            return True
        for block, result in zip(blocks, self.results(len(blocks)), strict=True):
            parameters = dict(block.named_parameters())
            with torch.no_grad():
                for name, weight in result.weights.items():
                    parameters[name].copy_(weight)
        return True


def _digest(tensors: dict[str, Tensor], note: dict[str, Any]) -> str:
    """Hashes the contents of a block file and what it was made from."""
    digest = hashlib.sha256(json.dumps([note["key"], note["previous"], note["record"]], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name}={digest_tensor(tensors[name])};".encode())
    return digest.hexdigest()[:32]
