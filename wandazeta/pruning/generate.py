"""More calibration samples of the model's own: windows that the dense model writes.

A block that is optimised for many steps on few windows learns these by heart, which more text would prevent. Where
there is no more, text that the dense model writes does most of it.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.models.streaming import is_file_backed
from wandazeta.pruning.calibration import isolated_rng

# of the sample, to begin with; no more than a quarter of it
PROMPT_TOKENS = 32
# at a time: wide enough to keep a processor busy, and its keys and values still fit
ROWS_AT_ONCE = 64
# no token: what is written has the length of the sample
_NEVER = 2**30


def find_writer(model: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """The causal language model of transformers that blocks belong to.

    Args:
        model: A model that holds it, or is it.
        blocks: The blocks.

    Raises:
        ValueError: If there is none, or its weights are not in memory.
    """
    for module in model.modules():
        if callable(getattr(module, "generate", None)) and blocks[0] in module.modules():
            if any(is_file_backed(parameter) for parameter in module.parameters()):
                raise ValueError(
                    "Expected a model that is whole in memory for `generated_copies`, but its weights are streamed "
                    "from their files; set `generated_copies` to 0"
                )
            return module
    raise ValueError(
        "Expected a causal language model of transformers, which writes text, for `generated_copies`, but "
        f"{type(model).__name__} has none; set `generated_copies` to 0"
    )


def write_copies(
    writer: nn.Module,
    rows: Sequence[Any],
    masks: Sequence[Tensor | None],
    copies: int,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Samples as the model would have written them: from some tokens of theirs on, drawn one after the other.

    Each copy begins at another place of the sample, so that no two have the same beginning.

    Args:
        writer: The dense model; left as it is.
        rows: Samples, batches of one row: tokens of shape (1, tokens), bare, first in a tuple or as `input_ids`.
        masks: For each sample the positions that are not padding, bool of shape (1, tokens), None for all.
        copies: Copies of each sample.
        seed: Seed of the draws.
        device: Where the model writes; it has to fit there.
        dtype: What it computes in, by default its own.

    Returns:
        Tokens like those of the samples, padding included: the first copy of each, the second of each, and so on.

    Raises:
        ValueError: If the samples are not tokens.
    """
    texts = [_tokens(row) for row in rows]
    kept = [
        text[0] if mask is None else text[0][mask[0].to(text.device)] for text, mask in zip(texts, masks, strict=True)
    ]
    written = [text.clone() for _ in range(copies) for text in texts]
    # those of one length are written together
    groups: dict[int, list[int]] = {}
    for place in range(len(written)):
        groups.setdefault(len(kept[place % len(texts)]), []).append(place)
    moves = next(writer.parameters()).device != device or dtype not in (None, next(writer.parameters()).dtype)
    model = copy.deepcopy(writer).to(device=device, dtype=dtype) if moves else writer
    with isolated_rng(seed), torch.inference_mode():
        for length, places in groups.items():
            prompt = min(PROMPT_TOKENS, length // 4)
            if prompt == 0:
                continue  # nothing to go on from
            for start in range(0, len(places), ROWS_AT_ONCE):
                batch = places[start : start + ROWS_AT_ONCE]
                begun = torch.stack([_beginning(kept[p % len(texts)], p // len(texts), copies, prompt) for p in batch])
                for place, tokens in zip(batch, _continue(model, begun.to(device), length), strict=True):
                    mask = masks[place % len(texts)]
                    where = torch.ones_like(written[place], dtype=torch.bool) if mask is None else mask
                    written[place][where.to(written[place].device)] = tokens.to(written[place])
    return written


def with_tokens(row: Any, tokens: Tensor) -> Any:
    """A sample like another, with other tokens.

    Args:
        row: The other.
        tokens: Shape (1, tokens).
    """
    if isinstance(row, Mapping):
        changed = copy.copy(row)  # keeps what a BatchEncoding or an ordered dict adds
        changed["input_ids"] = tokens  # type: ignore[index]
        return changed
    return type(row)([tokens, *row[1:]]) if type(row) in (list, tuple) else tokens


def _beginning(text: Tensor, number: int, copies: int, prompt: int) -> Tensor:
    start = (len(text) - prompt) * number // copies
    return text[start : start + prompt]


def _continue(model: nn.Module, begun: Tensor, length: int) -> Tensor:
    from transformers import GenerationConfig  # not at import: the core needs torch alone

    # what the model predicts, no more and no less: settings of its own, which may sharpen it or end it early, fill in
    # what is not given
    config = GenerationConfig(
        max_new_tokens=length - begun.shape[1],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=_NEVER,
        pad_token_id=0,
        use_cache=True,
    )
    written: Tensor = model.generate(  # type: ignore[operator]
        begun, attention_mask=torch.ones_like(begun), generation_config=config
    )
    return written


def _tokens(row: Any) -> Tensor:
    tokens = row.get("input_ids") if isinstance(row, Mapping) else row[0] if type(row) in (list, tuple) else row
    if isinstance(tokens, Tensor) and tokens.ndim == 2 and not tokens.is_floating_point():
        return tokens
    raise ValueError(
        "Expected calibration batches of tokens, bare, first in a tuple or as `input_ids`, for `generated_copies`, but "
        f"got {type(row).__name__}; set `generated_copies` to 0"
    )
