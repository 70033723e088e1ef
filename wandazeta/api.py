"""One call to prune a causal language model and one to measure it, in plain torch."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.data.prompts import adds_bos
from wandazeta.data.windows import collate_windows, cut_windows, shuffle_windows
from wandazeta.models.loading import load_backbone, load_tokenizer
from wandazeta.models.modes import evaluation_mode
from wandazeta.pruning.methods import PruningMethod, make_method
from wandazeta.pruning.options import ComputeDtype, PruneOptions
from wandazeta.pruning.pattern import SparsityPattern
from wandazeta.pruning.progress.folder import ProgressFolder
from wandazeta.pruning.records import PruneReport
from wandazeta.pruning.session import PruningSession, prune_model
from wandazeta.scoring.scorer import Scorer
from wandazeta.utilities.arguments import check_at_least, existing_device
from wandazeta.utilities.ranks import Ranks
from wandazeta.utilities.signals import STOP_SIGNALS, DeferredSignals

__all__ = ["Perplexity", "evaluate", "prune"]


def prune(
    model: nn.Module | str,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    pattern: str = "2:4",
    sparsity: float | None = None,
    method: PruningMethod | str = "tuned-ro",
    compute_dtype: ComputeDtype = "model",
    exclude_modules: Iterable[str] = (),
    num_samples: int = 128,
    sequence_length: int = 512,
    folder: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
) -> tuple[nn.Module, PruneReport]:
    """Prune a causal language model of transformers.

    The texts are cut into windows of equal length, of which a random sample is used for calibration. One block at a
    time is moved to the device; the model stays where it is.

    Args:
        model: The model, pruned in place; or its Hugging Face name or directory, which is then loaded in float32.
        tokenizer: Tokenizer of the model; None to load it by the name of the model.
        texts: Calibration texts.
        pattern: `"N:M"`, of every M consecutive inputs of a row N are kept, or `"unstructured"`.
        sparsity: Fraction of each row that is set to zero, for `"unstructured"` only.
        method: Pruning method, a name such as `wanda++` or an object such as `TunedRO(rounds=2)`.
        compute_dtype: Precision of matrix products: the `model`'s, or `bfloat16` by autocast.
        exclude_modules: Names of modules inside the blocks that stay dense, or regular expressions.
        num_samples: Calibration windows to use; all if the texts fill fewer.
        sequence_length: Tokens per window.
        folder: Folder that keeps every finished block. A call that was interrupted continues there, and a call that
            finds a complete pruning loads it. None to keep nothing.
        device: Device of the block that is pruned; `auto` is a GPU if there is one.
        seed: Seed of the sample of windows and of all draws.

    Returns:
        The pruned model and the report.

    Raises:
        ValueError: If an argument is out of range, or the model, the texts or the folder do not fit; before any work.
        KeyboardInterrupt: If Ctrl+C or another signal stopped it; finished blocks are in `folder`.
    """
    check_at_least("num_samples", num_samples, 1)
    options = PruneOptions(
        make_method(method),
        SparsityPattern(pattern, sparsity),
        exclude_modules=tuple(exclude_modules),
        compute_dtype=compute_dtype,
        seed=seed,
    )
    model, tokenizer = _loaded(model, tokenizer)
    windows = shuffle_windows(cut_windows(tokenizer, list(texts), sequence_length), seed)[:num_samples]
    batches = [collate_windows([window]) for window in windows]
    options = options.for_samples(len(batches))
    place = _device(device)

    def forward(batch: dict[str, Tensor]) -> object:
        home = next(model.parameters()).device
        return model(**{name: values.to(home) for name, values in batch.items()}, use_cache=False)

    if folder is None:
        return model, prune_model(model, forward, batches, options, device=place)
    session = PruningSession(
        model, options, ProgressFolder(Path(folder).absolute()), forward, lambda batch: None, len(batches)
    )
    with DeferredSignals(STOP_SIGNALS, deliver=False) as signals:
        report = session.run(
            lambda: batches,
            device=place,
            ranks=Ranks(),
            should_stop=lambda: signals.received is not None,
            show_progress=True,
        )
    if report is None:
        raise KeyboardInterrupt(f"the pruning was stopped; call again with folder='{folder}' to continue it")
    return model, report


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on text.

    Args:
        perplexity: Exponential of the mean negative log-likelihood of a token.
        num_tokens: Number of predicted tokens.
        sequence_length: Tokens per window, on which a perplexity depends.
        starts_with_bos: Whether every window starts with the beginning-of-sequence token, as the tokenizer does it.
    """

    perplexity: float
    num_tokens: int
    sequence_length: int
    starts_with_bos: bool


def evaluate(
    model: nn.Module | str,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    sequence_length: int = 512,
    batch_size: int = 8,
    device: str | torch.device = "auto",
) -> Perplexity:
    """Measure the perplexity of a causal language model on windows of text that do not overlap.

    Args:
        model: The model; or its Hugging Face name or directory, which is then loaded in float32.
        tokenizer: Tokenizer of the model; None to load it by the name of the model.
        texts: The texts.
        sequence_length: Tokens per window.
        batch_size: Windows per batch.
        device: Device to run on, to which the model is moved; `auto` is a GPU if there is one.

    Returns:
        The perplexity.

    Raises:
        ValueError: If the model or the texts do not fit.
    """
    check_at_least("batch_size", batch_size, 1)
    model, tokenizer = _loaded(model, tokenizer)
    windows = cut_windows(tokenizer, list(texts), sequence_length)
    place = _device(device)
    scorer = Scorer(model.to(place))
    total, num_tokens = 0.0, 0
    with evaluation_mode(model.modules()), torch.inference_mode():
        for start in range(0, len(windows), batch_size):
            batch = {name: x.to(place) for name, x in collate_windows(windows[start : start + batch_size]).items()}
            total += float(scorer.token_nll(scorer.prepare(batch)).double().sum())
            num_tokens += batch["input_ids"][:, 1:].numel()
    # a float64 tensor overflows to infinity, where math.exp raises
    perplexity = float(torch.tensor(total / num_tokens, dtype=torch.float64).exp())
    return Perplexity(perplexity, num_tokens, sequence_length, adds_bos(tokenizer))


def _loaded(model: nn.Module | str, tokenizer: Any) -> tuple[nn.Module, Any]:
    """Load what is given by name."""
    name = model if isinstance(model, str) else str(getattr(getattr(model, "config", None), "name_or_path", ""))
    if tokenizer is None and not name:
        raise ValueError("Expected argument `tokenizer` to be a tokenizer, but got None for a model without a name")
    tokenizer = load_tokenizer(name) if tokenizer is None else tokenizer
    return (load_backbone(model) if isinstance(model, str) else model), tokenizer


def _device(device: str | torch.device) -> torch.device:
    return existing_device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
