"""Windows of equal length from running text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wandazeta.data.prompts import adds_bos


def cut_windows(
    tokenizer: Any, texts: Sequence[str], sequence_length: int, add_bos: bool | None = None
) -> list[Tensor]:
    """Join texts, with a blank line after each, and cut them into windows that do not overlap.

    Args:
        tokenizer: Tokenizer of transformers.
        texts: The texts, in order.
        sequence_length: Tokens per window, T.
        add_bos: Start every window with the beginning-of-sequence token; None for what the tokenizer does by itself, as
            lm-evaluation-harness has it.

    Returns:
        The windows, each `(T,)` int64; tokens at the end that do not fill a window are left out.

    Raises:
        ValueError: If the text does not fill one window, or the tokenizer has no beginning-of-sequence token and
            `add_bos` is set.
    """
    add_bos = adds_bos(tokenizer) if add_bos is None else add_bos
    if add_bos and tokenizer.bos_token_id is None:
        raise ValueError(
            "Expected argument `add_bos` to be False or null, but got True: the tokenizer has no beginning-of-sequence "
            "token"
        )
    if sequence_length <= add_bos:
        raise ValueError(
            "Expected argument `sequence_length` to be at least 2 with a beginning-of-sequence token, but got "
            f"{sequence_length}"
        )
    documents = [text + "\n\n" for text in texts]
    # `verbose=False`: whole documents may be longer than the context of the model, windows are not
    rows = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []
    tokens = [token for row in rows for token in row]
    start = [tokenizer.bos_token_id] if add_bos else []
    body = sequence_length - len(start)
    places = range(0, len(tokens) - body + 1, body)
    if not places:
        raise ValueError(
            f"Expected text that fills a window of `sequence_length` {sequence_length} tokens, but got {len(tokens)} "
            "tokens"
        )
    return [torch.tensor(start + tokens[place : place + body], dtype=torch.int64) for place in places]


def shuffle_windows(windows: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return windows in a random order, from which the first N are a sample without replacement.

    Args:
        windows: The windows.
        seed: Seed of the order; the global generators are neither used nor changed.
    """
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    return [windows[index] for index in order]


def collate_windows(windows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Stack windows into a batch.

    Args:
        windows: B windows of T tokens each.

    Returns:
        `input_ids` and `attention_mask`, both `(B, T)` int64.
    """
    input_ids = torch.stack(list(windows))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
