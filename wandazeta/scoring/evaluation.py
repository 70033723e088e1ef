"""Measurements of a causal language model, and of a pruned one beside the dense one."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wandazeta.models.blocks import find_blocks
from wandazeta.models.modes import evaluation_mode
from wandazeta.scoring.scorer import Scorer

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Evaluation", "SampleText", "block_sparsity", "continue_text", "evaluation_table", "mean_nll"]

_WIDTH = 80


@dataclass(frozen=True)
class SampleText:
    """A greedy continuation.

    Args:
        prompt: The text that is continued.
        continuation: What the model adds.
    """

    prompt: str
    continuation: str


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model.

    Args:
        model: Name or directory of the model.
        num_parameters: Number of parameters.
        sparsity: Fraction of zeros in the weight matrices of the blocks.
        num_bytes: Size of the weights on disk, of a model in a directory.
        perplexity: Exponential of the mean negative log-likelihood of a token; None without text.
        num_tokens: Number of predicted tokens.
        sequence_length: Tokens per window, on which a perplexity depends.
        starts_with_bos: Whether every window starts with the beginning-of-sequence token, as the tokenizer does it.
        sample: Continuation of the beginning of the text.
        tasks: Metrics of lm-evaluation-harness by task.
        baseline: The same of the model that this one is compared with.
    """

    model: str
    num_parameters: int
    sparsity: float
    num_bytes: int | None = None
    perplexity: float | None = None
    num_tokens: int = 0
    sequence_length: int | None = None
    starts_with_bos: bool | None = None
    sample: SampleText | None = None
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    baseline: "Evaluation | None" = None

    def to_dict(self) -> dict[str, Any]:
        """The measurements as nested dictionaries of plain values, for JSON."""
        return asdict(self)


def mean_nll(
    model: nn.Module, windows: Sequence[Tensor], batch_size: int, device: torch.device, name: str
) -> tuple[float, int]:
    """Measure the mean negative log-likelihood of the tokens of windows that do not overlap, with a progress bar.

    Args:
        model: The model, on the device.
        windows: Windows of equal length, each `(T,)` int64.
        batch_size: Windows per batch.
        device: The device.
        name: Name of the model, for the progress bar.

    Returns:
        The mean, and the number of tokens: all but the first of each window.
    """
    from rich.console import Console  # not at import: this package needs torch only
    from rich.progress import track

    scorer = Scorer(model)
    total, num_tokens = 0.0, 0
    starts = range(0, len(windows), batch_size)
    console = Console(stderr=True)
    with evaluation_mode(model.modules()), torch.inference_mode():
        # in a notebook a bar that is gone leaves an empty output
        for start in track(starts, f"Evaluating {name}", console=console, transient=True, disable=console.is_jupyter):
            ids = torch.stack(list(windows[start : start + batch_size])).to(device)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            total += float(scorer.token_nll(scorer.prepare(batch)).double().sum())
            num_tokens += ids[:, 1:].numel()
    return total / num_tokens, num_tokens


def continue_text(model: Any, tokenizer: Any, prompt: Tensor, num_tokens: int) -> SampleText:
    """Let a model continue a text, always with the most probable token.

    Args:
        model: The model of transformers.
        tokenizer: Its tokenizer.
        prompt: Tokens of the text, `(T,)`.
        num_tokens: Number of tokens to add at most.
    """
    from transformers import GenerationConfig

    ids = prompt[None].to(next(model.parameters()).device)
    eos = model.generation_config.eos_token_id
    pad = eos[0] if isinstance(eos, list) else eos
    greedy = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, eos_token_id=eos, pad_token_id=pad)
    with evaluation_mode(model.modules()), torch.inference_mode():
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)[0]
    text, added = (
        tokenizer.decode(part, skip_special_tokens=True) for part in (tokens[: len(prompt)], tokens[len(prompt) :])
    )
    return SampleText(text, added)


def block_sparsity(model: nn.Module) -> float:
    """Return the fraction of zeros in the weight matrices of the blocks, or of the model if it has no single list."""
    try:
        _, blocks = find_blocks(model)
    except ValueError:
        blocks = model  # type: ignore[assignment]
    matrices = [weight for weight in blocks.parameters() if weight.ndim >= 2]
    nonzero = sum(int(torch.count_nonzero(weight.detach())) for weight in matrices)
    return 1 - nonzero / max(1, sum(weight.numel() for weight in matrices))


def size_on_disk(model: str) -> int | None:
    """Return the size of the weights of a model in bytes, or None if it is not in a directory.

    Args:
        model: Directory or name of the model.
    """
    files = list(Path(model).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else None


def evaluation_table(evaluation: Evaluation) -> "RenderableType":
    """Format measurements for the terminal, in 80 columns: a column for the model and one for its baseline.

    Args:
        evaluation: The measurements.

    Returns:
        A table, with the sample texts below, to print with rich.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    found = [evaluation, *([evaluation.baseline] if evaluation.baseline is not None else [])]
    table = Table(width=_WIDTH if len(found) > 1 else None)
    table.add_column("", overflow="fold")
    for each in found:
        # wide enough for every figure; names go on in a second line
        table.add_column(_short(each.model), justify="right", overflow="fold", min_width=16)
    for name, cells in _rows(found):
        table.add_row(name, *cells)
    parts: list[Any] = [table]
    if evaluation.sample is not None:
        parts.append(Text(_wrapped(f"{evaluation.sample.prompt!r} continued by")))
        parts += [
            Text(_wrapped(f"- {_short(each.model)}: {each.sample.continuation!r}")) for each in found if each.sample
        ]
    return Group(*parts)


def _rows(found: Sequence[Evaluation]) -> list[tuple[str, list[str]]]:
    rows = []
    if found[0].perplexity is not None:
        words = f"perplexity ({found[0].num_tokens:,} tokens)"
        rows.append((words, [f"{each.perplexity:.2f}" for each in found]))
    rows.append(("sparsity of the blocks", [f"{each.sparsity:.1%}" for each in found]))
    rows.append(("parameters", [f"{each.num_parameters:,}" for each in found]))
    rows.append(("size on disk", ["" if each.num_bytes is None else _size(each.num_bytes) for each in found]))
    for task, metrics in found[0].tasks.items():
        for name in metrics:
            metric, _, kind = name.partition(",")
            # without a filter are notes such as the number of examples
            if not kind or metric.endswith("_stderr") or not isinstance(metrics[name], (int, float)):
                continue
            words = f"{task}, {metric}" + ("" if kind == "none" else f" ({kind})")
            error = f"{metric}_stderr,{kind}"
            rows.append((words, [_value(each.tasks[task][name], each.tasks[task].get(error)) for each in found]))
    return rows


def _value(value: float, error: Any) -> str:
    return f"{value:.4g}" + (f" ± {error:.2g}" if isinstance(error, float) else "")


def _size(num_bytes: int) -> str:
    unit, power = ("GiB", 30) if num_bytes >= 2**30 else ("MiB", 20)
    return f"{num_bytes / 2**power:.2f} {unit}"


def _short(model: str) -> str:
    return Path(model).name if Path(model).is_dir() else model


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ")
