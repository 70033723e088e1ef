"""One call to prune a causal language model and one to measure it, in plain torch.

The commands `wandazeta prune` and `wandazeta evaluate` are these functions: options and their help come from here.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wandazeta.data.prompts import adds_bos
from wandazeta.data.tasks import FOLDER
from wandazeta.data.windows import collate_windows, cut_windows, shuffle_windows
from wandazeta.models.loading import LoadingOptions, load_backbone, load_tokenizer, stored_dtype
from wandazeta.pruning.calibration import check_shares, split_rows
from wandazeta.pruning.export.card import REPORT_FILE
from wandazeta.pruning.export.output import OutputFolder
from wandazeta.pruning.export.pretrained import check_exportable
from wandazeta.pruning.methods import PruningMethod, make_method
from wandazeta.pruning.options import PruneOptions
from wandazeta.pruning.pattern import SparsityPattern
from wandazeta.pruning.records import PruneReport
from wandazeta.pruning.report.evaluation import EVALUATION_FILE
from wandazeta.pruning.report.page import page_of_file
from wandazeta.pruning.session import PruningSession, prune_model
from wandazeta.scoring.evaluation import (
    Evaluation,
    SampleText,
    block_sparsity,
    continue_text,
    mean_nll,
    size_on_disk,
)
from wandazeta.scoring.harness import load_tasks, run_tasks
from wandazeta.utilities.arguments import check_at_least, existing_device
from wandazeta.utilities.files import check_writable, write_json
from wandazeta.utilities.ranks import Ranks
from wandazeta.utilities.rng import isolated_rng, preserve_generators
from wandazeta.utilities.signals import STOP_SIGNALS, DeferredSignals

__all__ = ["Evaluation", "evaluate", "prune"]

_logger = logging.getLogger(__name__)
_NO_TOKENIZER = "Expected argument `tokenizer` to be a tokenizer, but got None for a model without a name"
# of the sample text
_NUM_PROMPT_TOKENS = 24
_NUM_NEW_TOKENS = 40


def prune(
    model: nn.Module | str,
    tokenizer: Any = None,
    texts: Iterable[Any] = (),
    *,
    output_dir: str | Path | None = None,
    sparsity: float | None = None,
    pattern: str = "auto",
    method: PruningMethod | str = "tuned-ro",
    num_samples: int = 128,
    sequence_length: int = 512,
    exclude_modules: Iterable[str] = (),
    compute_dtype: Literal["auto", "model", "bfloat16"] = "auto",
    device: str | torch.device = "auto",
    pack: bool = False,
    seed: int = 0,
) -> PruneReport:
    """Prune a causal language model of transformers.

    Texts are cut into windows of equal length, of which a random sample is used for calibration. One block at a time is
    moved to the device; the model stays where it is. In a process group of torch, the ranks share the samples and all
    end with the same weights; rank 0 writes.

    Args:
        model: The model, pruned in place; or its Hugging Face name or directory, which is then loaded in the precision
            of its files.
        tokenizer: Tokenizer of the model; None to load it by the name of the model.
        texts: Calibration texts; or samples that are ready, of which the first `num_samples` are used: sequences of
            token ids, or batches with `input_ids` and possibly `attention_mask`, as a dataloader yields them.
        output_dir: Directory to write: weights, tokenizer, masks, report and model card. It keeps every finished
            block, so that a call that was interrupted continues, and a call that finds the complete model loads it.
            None to prune the model in memory only.
        sparsity: Fraction of each row that is set to zero, for the pattern `unstructured`.
        pattern: `N:M`, of every M consecutive inputs of a row N are kept, or `unstructured`; `auto` is `unstructured`
            if `sparsity` is given, else `2:4`.
        method: Pruning method: `magnitude`, `wanda`, `rgs`, `ro`, `wanda++`, `sparsegpt` or `tuned-ro`; in Python
            also an object such as `TunedRO(rounds=2)`.
        num_samples: Calibration samples to use; all if there are fewer.
        sequence_length: Tokens per window.
        exclude_modules: Names of modules inside the blocks that stay dense, or regular expressions.
        compute_dtype: Precision of matrix products: the `model`'s, or `bfloat16` by autocast; `auto` is `bfloat16` for
            a float32 model on a GPU that has it, else the model's.
        device: Device of the block that is pruned; `auto` is a GPU if there is one.
        pack: Write the 2:4 packed file too, smaller to ship, with the same weights.
        seed: Seed of the sample of windows and of all draws.

    Returns:
        The report.

    Raises:
        ValueError: If an argument is out of range, or the model, the texts or the directory do not fit; before any
            work.
        KeyboardInterrupt: If Ctrl+C or another signal stopped it; finished blocks are in `output_dir`.
    """
    check_at_least("num_samples", num_samples, 1)
    place = _device(device)
    method, found_pattern = make_method(method), _pattern(pattern, sparsity)
    if pack and found_pattern.sparsity_pattern != "2:4":
        raise ValueError(
            "Expected argument `pack` to be False unless the pattern is 2:4, the only one with a packed form, but got "
            f"True with {found_pattern.label}; leave it out"
        )
    options = PruneOptions(
        method,
        found_pattern,
        exclude_modules=tuple(exclude_modules),
        # `auto` is decided when the model is there
        compute_dtype="model" if compute_dtype == "auto" else compute_dtype,
        seed=seed,
    )
    if isinstance(model, str) and output_dir is None:
        raise ValueError("Expected argument `output_dir` to be a directory for a model given by name, but got None")
    _refuse_string(texts)
    tokenizer, rows = _tokenizer(tokenizer, model), []
    ranks = Ranks.of_process_group(place)
    if method.uses_calibration:
        rows = _calibration_rows(texts, tokenizer, num_samples, sequence_length, seed)
        found = len(rows)
        if found < num_samples and ranks.rank == 0:
            _logger.warning("The texts hold %d samples, fewer than num_samples=%d; all are used", found, num_samples)
        # before the model is loaded
        check_shares(found, ranks.size)
    model, folder = _loaded(model), None
    if output_dir is not None:
        folder = OutputFolder(output_dir, model)
        ranks.run_on_all(lambda: folder.check() if ranks.rank == 0 else None)
        check_exportable(model, tokenizer)
    options = options.for_samples(len(rows))
    if compute_dtype == "auto":
        options = replace(options, compute_dtype=_automatic_dtype(model, place))

    def forward(batch: Mapping[str, Tensor]) -> object:
        home = next(model.parameters()).device
        return model(**{name: values.to(home) for name, values in batch.items()}, use_cache=False)

    if folder is None:
        return prune_model(model, forward, rows, options, token_mask=_token_mask, device=place, ranks=ranks)
    session = PruningSession(model, options, folder, forward, _token_mask, len(rows))
    with DeferredSignals(STOP_SIGNALS, deliver=False) as signals:
        report = session.run(
            lambda: rows,
            device=place,
            ranks=ranks,
            should_stop=lambda: signals.received is not None,
            show_progress=True,
        )
    # a signal during the last block, or to one rank only, stops all ranks
    stopped = ranks.sum(float(signals.received is not None))
    if report is None or stopped:
        raise KeyboardInterrupt(
            f"stopped while pruning: finished blocks are in '{output_dir}'; start the same again to go on"
        )
    ranks.run_on_all(lambda: folder.export(tokenizer, report, pack=pack) if ranks.rank == 0 else None)
    return report


def evaluate(
    model: nn.Module | str,
    tokenizer: Any = None,
    texts: Iterable[str] = (),
    *,
    baseline: nn.Module | str | None = None,
    tasks: Iterable[str] = (),
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    sequence_length: int = 512,
    batch_size: int = 8,
    device: str | torch.device = "auto",
    output_file: str | Path | None = None,
) -> Evaluation:
    """Measure a causal language model: perplexity and a sample text, tasks, sparsity and size.

    The perplexity is measured on windows of text that do not overlap. The sample text is the greedy continuation of the
    beginning of the text.

    Args:
        model: The model; or its Hugging Face name or directory, which is then loaded in the precision of its files.
        tokenizer: Tokenizer of the model; None to load it by the name of the model.
        texts: The texts; none to run tasks only.
        baseline: Model to compare with, measured in the same way and with the same tokenizer, such as the dense one.
        tasks: Tasks of lm-evaluation-harness to run (`pip install "wandazeta[eval]"`), or `sample_reviews` and
            `sample_wikipedia`, which need no hub.
        include_path: Folder with YAML files of further tasks.
        num_fewshot: Examples in the context of a task; by default as the task says.
        limit: Examples of each task, or a fraction of them; by default all.
        sequence_length: Tokens per window.
        batch_size: Windows, or requests of a task, per batch.
        device: Device to run on, to which the models are moved; `auto` is a GPU if there is one.
        output_file: JSON file to write; by default `evaluation.json` in the directory of a pruned model.

    Returns:
        What was measured, with that of the baseline.

    Raises:
        ValueError: If a model, the texts or the tasks do not fit.
    """
    check_at_least("batch_size", batch_size, 1)
    place, tasks = _device(device), list(tasks)
    _refuse_string(texts)
    texts = list(texts)
    if not texts and not tasks:
        raise ValueError("Expected texts or `tasks`, but got neither; give some text to measure on")
    if isinstance(baseline, str):
        # the other model is measured first, for minutes
        stored_dtype(baseline)
    manager = load_tasks(tasks, [FOLDER, *([] if include_path is None else [include_path])]) if tasks else None
    report_file = Path(model if isinstance(model, str) else "") / REPORT_FILE
    beside_report = output_file is None and isinstance(model, str) and report_file.exists()
    if beside_report:
        output_file = report_file.with_name(EVALUATION_FILE)
    if output_file is not None:
        check_writable(Path(output_file).absolute().parent, "output_file")
    tokenizer = _tokenizer(tokenizer, model)
    if tokenizer is None:
        raise ValueError(_NO_TOKENIZER)
    windows = cut_windows(tokenizer, texts, sequence_length) if texts else []

    def measure(model: nn.Module | str) -> Evaluation:
        # one model at a time is in memory
        loaded = _loaded(model).to(place)
        nll, num_tokens, sample = None, 0, None
        name = model if isinstance(model, str) else _name(model) or type(model).__name__
        if windows:
            nll, num_tokens = mean_nll(loaded, windows, batch_size, place, name)
            sample = _sample_text(loaded, tokenizer, windows[0])
        options: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
        return Evaluation(
            model=name,
            num_parameters=sum(parameter.numel() for parameter in loaded.parameters()),
            sparsity=block_sparsity(loaded),
            num_bytes=size_on_disk(model) if isinstance(model, str) else None,
            # a float64 tensor overflows to infinity, where math.exp raises
            perplexity=None if nll is None else float(torch.tensor(nll, dtype=torch.float64).exp()),
            num_tokens=num_tokens,
            sequence_length=sequence_length if windows else None,
            starts_with_bos=adds_bos(tokenizer) if windows else None,
            sample=sample,
            tasks=run_tasks(loaded, tokenizer, tasks, manager, **options) if tasks else {},
        )

    found = measure(model)
    if baseline is not None:
        found = replace(found, baseline=measure(baseline))
    if output_file is not None:
        write_json(Path(output_file).absolute(), found.to_dict())
    if beside_report:
        with suppress(ModuleNotFoundError):
            # matplotlib and jinja2 are an extra
            page_of_file(report_file)
    return found


def _sample_text(model: nn.Module, tokenizer: Any, window: Tensor) -> SampleText | None:
    if not hasattr(model, "generate"):
        return None
    return continue_text(model, tokenizer, window[:_NUM_PROMPT_TOKENS], _NUM_NEW_TOKENS)


def _pattern(pattern: str, sparsity: float | None) -> SparsityPattern:
    try:
        return SparsityPattern(pattern, sparsity)
    except ValueError as error:
        # the argument has a shorter name here
        raise ValueError(str(error).replace("sparsity_pattern", "pattern")) from None


def _calibration_rows(
    texts: Iterable[Any], tokenizer: Any, num_samples: int, sequence_length: int, seed: int
) -> list[dict[str, Tensor]]:
    """Return calibration samples, each as a batch of one row; fewer than `num_samples` if there are no more."""
    # the same samples in every process, of a loader that shuffles
    with isolated_rng(seed), preserve_generators(texts):
        items = iter(texts)
        first = next(items, None)
        if first is None:
            raise ValueError("Expected calibration texts, but got none; give some text")
        if isinstance(first, str):
            if tokenizer is None:
                raise ValueError(_NO_TOKENIZER)
            windows = cut_windows(tokenizer, [first, *items], sequence_length)
            return [collate_windows([window]) for window in shuffle_windows(windows, seed)[:num_samples]]
        rows: list[dict[str, Tensor]] = []
        for item in chain([first], items):
            rows += split_rows(_as_batch(item))
            if len(rows) >= num_samples:
                break
    return rows[:num_samples]


def _as_batch(item: Any) -> dict[str, Tensor]:
    """Return a batch from a sequence of token ids, or from what a dataloader yields."""
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], Tensor):
        # of a TensorDataset
        item = item[0]
    if isinstance(item, Mapping) and "input_ids" in item:
        # a dataset may have further columns, which the model would refuse
        batch = {name: torch.as_tensor(item[name]) for name in ("input_ids", "attention_mask") if name in item}
    elif isinstance(item, Tensor) or (isinstance(item, (list, tuple)) and item and isinstance(item[0], int)):
        batch = {"input_ids": torch.as_tensor(item)}
    else:
        raise ValueError(
            "Expected argument `texts` to hold texts, sequences of token ids or batches with `input_ids`, but got "
            f"{type(item).__name__}"
        )
    return {name: values[None] if values.ndim == 1 else values for name, values in batch.items()}


def _token_mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()


def _refuse_string(texts: Any) -> None:
    if isinstance(texts, (str, os.PathLike)):
        raise ValueError(
            f"Expected argument `texts` to be a list of texts, but got {str(texts)[:40]!r}; put it into a list, or "
            "read a file by `wandazeta.data.sources.read_documents`"
        )


def _name(model: nn.Module | str) -> str:
    return model if isinstance(model, str) else str(getattr(getattr(model, "config", None), "name_or_path", ""))


def _tokenizer(tokenizer: Any, model: nn.Module | str) -> Any:
    """Load the tokenizer by the name of the model unless it is given; None for a model without a name."""
    return load_tokenizer(_name(model)) if tokenizer is None and _name(model) else tokenizer


def _loaded(model: nn.Module | str) -> nn.Module:
    return load_backbone(model, LoadingOptions(stored_dtype(model))) if isinstance(model, str) else model


def _automatic_dtype(model: nn.Module, place: torch.device) -> Literal["model", "bfloat16"]:
    is_float32 = next(model.parameters()).dtype == torch.float32
    has_bfloat16 = place.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if is_float32 and has_bfloat16 else "model"


def _device(device: str | torch.device) -> torch.device:
    return existing_device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
