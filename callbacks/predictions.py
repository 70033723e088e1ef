"""Write predictions to a JSON Lines file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from wandazeta.utilities.files import check_writable, write_atomically
from wandazeta.utilities.ranks import Ranks

# position of a row: data loader, example in its data set (or batch where the data set has no positions), rank, row
_Place = tuple[int, int, int, int]


class PredictionWriter(BasePredictionWriter):
    """Writes what `predict` returns to `predictions.jsonl`: one line for each example, in the order of the data.

    A line holds the `index` of the example in its data (and its `dataloader` if there are several), the `text` and the
    `label` if the batch has them, and every entry of the prediction, such as `prediction` and `scores`. For prompts
    with answer options, `answer` is the text of the predicted option. Predictions that are no dictionary are in the
    entry `prediction`.

    With several ranks, rank 0 collects the lines and writes the file; examples that several ranks predicted are written
    once. The file appears once it is complete.

    Args:
        output_dir: Folder of the file.

    Examples:
        >>> from wandazeta.callbacks import PredictionWriter
        >>> PredictionWriter("runs/topics").path.name
        'predictions.jsonl'
    """

    def __init__(self, output_dir: str = ".") -> None:
        super().__init__("batch")
        self.output_dir = output_dir
        self._lines: dict[_Place, dict[str, Any]] = {}

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.output_dir).absolute() / "predictions.jsonl"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._lines.clear()
        if stage == "predict" and trainer.is_global_zero:
            check_writable(self.path.parent)

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the lines of a batch until all of them are written."""
        rows = _rows(prediction)
        inputs = _inputs(batch, rows, getattr(pl_module, "tokenizer", None))
        has_indices = batch_indices is not None and len(batch_indices) == len(rows)
        for row, (values, given) in enumerate(zip(rows, inputs, strict=True)):
            line: dict[str, Any] = {}
            if isinstance(trainer.predict_dataloaders, (list, tuple, dict)) and len(trainer.predict_dataloaders) > 1:
                line["dataloader"] = dataloader_idx
            if has_indices:
                assert batch_indices is not None
                line["index"] = int(batch_indices[row])
                place = (dataloader_idx, line["index"], 0, 0)
            else:
                place = (dataloader_idx, batch_idx, trainer.global_rank, row)
            self._lines[place] = line | given | values

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_predict_epoch_end(trainer, pl_module)
        ranks = Ranks.of_process_group(trainer.strategy.root_device)
        lines = {place: line for part in ranks.gather_objects(self._lines) for place, line in part.items()}
        self._lines.clear()
        content = "".join(json.dumps(lines[place], ensure_ascii=False) + "\n" for place in sorted(lines))
        ranks.run_on_all(lambda: write_atomically(self.path, content.encode()) if ranks.rank == 0 else None)
        rank_zero_info(f"Predictions of {len(lines):,} examples: {self.path}")


def _rows(prediction: Any) -> list[dict[str, Any]]:
    """Split the prediction of a batch into one dictionary of plain values for each example."""
    entries = dict(prediction) if isinstance(prediction, Mapping) else {"prediction": prediction}
    entries = {name: _plain(value) for name, value in entries.items() if value is not None}
    lengths = {len(value) if isinstance(value, list) else -1 for value in entries.values()}
    if len(lengths) != 1 or -1 in lengths:
        # not one value for each example
        return [entries] if entries else []
    return [{name: value[row] for name, value in entries.items()} for row in range(lengths.pop())]


def _inputs(batch: Any, rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Return what a batch says of its examples: text and label; and the answers by the predicted options."""
    found: list[dict[str, Any]] = [{} for _ in rows]
    if not isinstance(batch, Mapping):
        return found
    ids, mask, options = (batch.get(name) for name in ("input_ids", "attention_mask", "option_ids"))
    if tokenizer is not None and isinstance(ids, Tensor) and len(ids) == len(rows):
        for row, line in enumerate(found):
            tokens = ids[row] if mask is None else ids[row][mask[row].bool()]
            line["text"] = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    label = batch.get("label")
    if isinstance(label, Tensor) and len(label) == len(rows):
        for line, value in zip(found, label.tolist(), strict=True):
            line["label"] = value
    if tokenizer is not None and isinstance(options, Tensor):
        masks = batch.get("option_mask", torch.ones_like(options)).bool()
        answers = [tokenizer.decode(tokens[kept].tolist()) for tokens, kept in zip(options, masks, strict=True)]
        for line, values in zip(found, rows, strict=True):
            if isinstance(values.get("prediction"), int):
                line["answer"] = answers[values["prediction"]]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
