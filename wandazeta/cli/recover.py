"""The command `wandazeta recover`: train a pruned model on the predictions of the dense one, and export it."""

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from typing_extensions import override

from wandazeta.adapters import PeftLoRA, Weights
from wandazeta.adapters.files import backbone_fingerprint
from wandazeta.callbacks import AtomicCheckpointIO, KeepSparsity, RunProgressBar
from wandazeta.cli.lightning_cli import started_processes
from wandazeta.data.windows import collate_windows, cut_windows
from wandazeta.datamodules.step_sampler import BatchDataset, StepSampler
from wandazeta.models.loading import load_tokenizer, stored_dtype
from wandazeta.modules import FirstOrderModule
from wandazeta.modules.step_cost import duration
from wandazeta.pruning.export.card import REPORT_FILE
from wandazeta.pruning.export.masks import MASKS_FILE, match_masks, read_masks
from wandazeta.pruning.export.output import DISCARDED, publish
from wandazeta.pruning.export.pretrained import check_exportable, export_pretrained
from wandazeta.pruning.records import PruneReport
from wandazeta.scoring.evaluation import block_sparsity, mean_nll
from wandazeta.utilities.arguments import check_at_least, check_range
from wandazeta.utilities.files import check_writable, write_json

__all__ = [
    "LEARNING_RATES",
    "RECORD_FILE",
    "distillation_trainer",
    "one_cycle",
    "recover",
    "training_precision",
    "window_loader",
]

RECORD_FILE = "recovery.json"
LEARNING_RATES = {"weights": 1e-4, "lora": 5e-4}
"""Learning rates after the warm-up."""

_PROGRESS = "progress"
_NUM_CHECKPOINTS = 20
# of the text, for the perplexity before and after
_HELD_OUT_EVERY, _MAX_HELD_OUT = 20, 32
_WARM_UP = 0.05


def recover(
    model: str | Path,
    teacher: str | Path,
    texts: Sequence[str],
    output_dir: str | Path,
    *,
    tokens: int = 2_000_000,
    sequence_length: int = 512,
    batch_size: int = 8,
    learning_rate: float | None = None,
    lora_rank: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a pruned model on the predictions of the dense one, with its masks held, and write it.

    All weights are trained by AdamW, whose learning rate rises for a twentieth of the steps and then falls to zero by a
    cosine. The text is cut into windows; every 20th, 32 at most, is held out to measure the perplexity before and
    after. Checkpoints and the teacher's predictions are in the folder `progress` of the output directory until the
    model is complete, so that a call that was interrupted continues, to the same bits.

    Args:
        model: Directory that `wandazeta prune` wrote.
        teacher: The dense model: a Hugging Face name or a directory.
        texts: The texts.
        output_dir: Directory to write, new or empty, or with the progress of the same call.
        tokens: Tokens to train on; the text is repeated if it holds fewer.
        sequence_length: Tokens per window.
        batch_size: Windows per step.
        learning_rate: Highest learning rate; by default 1e-4, and 5e-4 for LoRA.
        lora_rank: Train LoRA adapters of this rank beside the frozen weights, and write the adapters alone.
        seed: Seed of the order of the windows and of the adapters.

    Returns:
        The record that is in `recovery.json` of the directory: settings, perplexities and sparsity.

    Raises:
        ValueError: If an argument is out of range, or model, teacher, texts or directory do not fit; before any work.
    """
    num_processes, _ = started_processes()
    if num_processes > 1:
        raise ValueError(
            f"Expected one process to recover a model, but got {num_processes}; on several GPUs use `wandazeta fit -c "
            "configs/recovery/masked.yaml --model.teacher NAME`"
        )
    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        check_at_least(name, value, 1)
    check_at_least("tokens", tokens, batch_size * sequence_length)
    if lora_rank is not None:
        check_at_least("lora_rank", lora_rank, 1)
    rate = learning_rate if learning_rate is not None else LEARNING_RATES["weights" if lora_rank is None else "lora"]
    check_range("learning_rate", rate, rate > 0, "above 0")
    source, output = Path(model), Path(output_dir).absolute()
    _require_pruned(source)
    windows = cut_windows(load_tokenizer(str(model)), texts, sequence_length)
    held_out, train = _split(windows, batch_size, sequence_length)
    num_steps = round(tokens / (batch_size * sequence_length))
    progress = output / _PROGRESS
    settings = {
        "teacher": Path(teacher).name,
        "tokens": num_steps * batch_size * sequence_length,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "learning_rate": rate,
        "lora_rank": lora_rank,
        "seed": seed,
        "text": sha256(torch.stack(windows).numpy().tobytes()).hexdigest()[:16],
    }
    record = _opened(output, settings)
    module = FirstOrderModule(
        str(model),
        trainable=Weights() if lora_rank is None else PeftLoRA(lora_rank, 2 * lora_rank),
        learning_rate=rate,
        lr_scheduler=one_cycle(rate, num_steps),
        seed=seed,
        teacher=str(teacher),
    )
    backbone: Any = module.backbone
    weights = sum(weight.nbytes for weight in backbone.parameters())
    settings["model"] = backbone_fingerprint(backbone)
    if record is not None:
        _require_same(record["settings"], settings, output)
        if not progress.exists():
            shutil.rmtree(output / DISCARDED, ignore_errors=True)
            return record
    # the model, and a checkpoint beside the one that it replaces, each with two moments of every weight
    check_writable(progress, needed_bytes=weights * (7 if lora_rank is None else 1))
    check_exportable(backbone, module.tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if record is None:
        record = {"settings": settings, "perplexity_before": _perplexity(backbone, held_out, device, source.name)}
        write_json(progress / RECORD_FILE, record)
    start = perf_counter()
    trainer = distillation_trainer(None if lora_rank is not None else str(model), num_steps, batch_size, progress)
    epochs = num_steps * batch_size / len(train)
    rank_zero_info(
        f"{num_steps:,} steps of {batch_size} x {sequence_length} tokens: {settings['tokens']:,} tokens, "
        f"{epochs:.3g} times the text of {len(train) * sequence_length:,}."
    )
    loader = window_loader(train, batch_size, seed, trainer)
    checkpoint = progress / "checkpoints" / "last.ckpt"
    with warnings.catch_warnings():
        # the perplexity is measured before and after
        warnings.filterwarnings("ignore", r"You defined a `validation_step` but have no `val_dataloader`")
        trainer.fit(module, loader, ckpt_path=str(checkpoint) if checkpoint.exists() else None)
    assert module.teacher_targets is not None
    # trained in float32
    module.backbone.to(getattr(torch, stored_dtype(str(model))))
    record |= {
        "perplexity_after": _perplexity(module.backbone, held_out, device, "the recovered model"),
        "perplexity_teacher": _perplexity(module.teacher_targets.model, held_out, device, Path(teacher).name),
        "held_out_tokens": len(held_out) * sequence_length,
        "sparsity": block_sparsity(module.backbone) if lora_rank is None else None,
        "seconds_since_start": perf_counter() - start,
    }
    _export(module, source, progress / "export", record)
    publish(progress / "export", output, progress)
    return record


def one_cycle(learning_rate: float, num_steps: int) -> Any:
    """Return what makes the schedule of the learning rate: it rises for a twentieth of the steps and falls by a cosine.

    Args:
        learning_rate: Highest learning rate.
        num_steps: Number of steps.
    """
    # it is zero after the last step, not in it
    steps = num_steps + 1
    return partial(OneCycleLR, max_lr=learning_rate, total_steps=steps, pct_start=_WARM_UP, cycle_momentum=False)


def training_precision() -> str:
    """Return `bf16-mixed` if matrix products are faster in bfloat16 on this machine, else `32-true`."""
    if torch.cuda.is_available():
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if is_fast else "32-true"


def _require_pruned(model: Path) -> None:
    missing = [name for name in (MASKS_FILE, REPORT_FILE) if not (model / name).is_file()]
    if missing:
        raise ValueError(
            f"Expected argument `model` to be a directory that `wandazeta prune` wrote, but '{model}' has no "
            f"{missing[0]}; prune the model first, and give the dense one as `--teacher`"
        )


def _split(windows: list[Tensor], batch_size: int, sequence_length: int) -> tuple[list[Tensor], list[Tensor]]:
    """Divide the windows into those that are held out, evenly over the text, and whole steps of training."""
    places = range(0, len(windows), max(_HELD_OUT_EVERY, -(-len(windows) // _MAX_HELD_OUT)))
    train = [window for place, window in enumerate(windows) if place not in places]
    if len(train) < batch_size:
        raise ValueError(
            f"Expected text for a step of `batch_size` {batch_size} windows, and one more to measure the perplexity, "
            f"but got {len(windows)} of {sequence_length} tokens; give more text, or fewer or shorter windows"
        )
    return [windows[place] for place in places], train[: len(train) // batch_size * batch_size]


def _opened(output: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of the same call, complete or not, from the output directory; None if that is new."""
    for path in (output / RECORD_FILE, output / _PROGRESS / RECORD_FILE):
        if path.is_file():
            record: dict[str, Any] = json.loads(path.read_bytes())
            _require_same(record["settings"], settings, output)
            return record
    if output.exists() and not (output.is_dir() and set(os.listdir(output)) <= {_PROGRESS}):
        raise ValueError(
            f"Expected argument `output_dir` to be a new or empty folder, but '{output}' holds other files; choose "
            "another one or delete it"
        )
    return None


def _require_same(saved: Mapping[str, Any], here: Mapping[str, Any], output: Path) -> None:
    for name, value in here.items():
        if saved.get(name) != value:
            raise ValueError(
                f"Expected argument `output_dir` to be new or of the same call, but `{name}` was {saved.get(name)} in "
                f"'{output}' and is {value} now; choose another folder or delete it"
            )


def distillation_trainer(
    masks: str | None, num_steps: int, batch_size: int, folder: Path, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """Return the trainer of a recovery, which writes twenty checkpoints to the folder `checkpoints`.

    Args:
        masks: Directory with the masks to keep; None to keep none.
        num_steps: Number of steps.
        batch_size: Windows per step.
        folder: Folder of checkpoints and targets.
        callbacks: Further callbacks.
    """
    # one window at a time is as fast on a CPU, and takes less memory
    accumulated = 1 if torch.cuda.is_available() else batch_size
    every = max(1, num_steps // _NUM_CHECKPOINTS)
    checkpoints = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=every, save_top_k=0, save_last=True)
    keeps = [KeepSparsity(masks)] if masks is not None else []
    return Trainer(
        accelerator="auto",
        devices=1,
        precision=training_precision(),  # type: ignore[arg-type]
        max_steps=num_steps,
        max_epochs=-1,
        limit_val_batches=0,
        accumulate_grad_batches=accumulated,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        logger=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[*keeps, _Pace(), RunProgressBar(), *callbacks, checkpoints],
    )


def window_loader(train: list[Tensor], batch_size: int, seed: int, trainer: Trainer) -> DataLoader[Any]:
    """Return the loader of the training windows, in the order of the seed.

    Args:
        train: Windows of token ids, each of shape (T,).
        batch_size: Windows per step.
        seed: Seed of the order.
        trainer: The trainer of `distillation_trainer`.
    """
    sampler = StepSampler(train, batch_size // trainer.accumulate_grad_batches, seed, trainer)
    return DataLoader(BatchDataset(train, collate_windows), sampler=sampler, batch_size=None)


class _Pace(Callback):
    """Reports, once a step is through, how long a step takes and how long all others will take."""

    def __init__(self) -> None:
        self._start: tuple[int, float] | None = None
        self._is_reported = False

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_reported:
            return
        step = trainer.global_step
        if self._start is None:
            # the first batch also warms up
            self._start = step, perf_counter()
        elif step > self._start[0]:
            batches = max(1, trainer.accumulate_grad_batches - 1)
            seconds = (perf_counter() - self._start[1]) / batches * trainer.accumulate_grad_batches
            left = trainer.max_steps - step
            rank_zero_info(f"A step takes {duration(seconds)}; {left:,} more take about {duration(left * seconds)}.")
            self._is_reported = True


def _perplexity(model: nn.Module, windows: list[Tensor], device: torch.device, name: str) -> float:
    nll, _ = mean_nll(model.to(device), windows, 1, device, name)
    return float(torch.tensor(nll, dtype=torch.float64).exp())


def _export(module: FirstOrderModule, source: Path, directory: Path, record: dict[str, Any]) -> None:
    """Write the trained model as `wandazeta prune` does, or the adapters, and beside them the record."""
    shutil.rmtree(directory, ignore_errors=True)
    if record["settings"]["lora_rank"] is not None:
        directory.mkdir()
        module.save_adapters(directory)
    else:
        report = PruneReport.from_dict(json.loads((source / REPORT_FILE).read_bytes()))
        masks = match_masks(module.backbone, read_masks(source))
        export_pretrained(module.backbone.cpu(), module.tokenizer, directory, report, masks)
        with (directory / "README.md").open("a", encoding="utf-8") as card:
            card.write(
                "\n## Trained after the pruning\n\n"
                f"Trained on the predictions of `{Path(str(module.teacher)).name}` for "
                f"{record['settings']['tokens']:,} tokens of text with the pruned weights held at zero (`wandazeta "
                f"recover`). Perplexity on {record['held_out_tokens']:,} tokens of the text that were held out: "
                f"{record['perplexity_before']:.2f} before, {record['perplexity_after']:.2f} after, "
                f"{record['perplexity_teacher']:.2f} of the teacher. `{RECORD_FILE}` has the settings.\n"
            )
    write_json(directory / RECORD_FILE, record)
