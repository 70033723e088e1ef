"""Tokenize texts, prompts and answer options."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a tokenizer starts every text with the beginning-of-sequence token by itself.

    Args:
        tokenizer: The tokenizer.
    """
    tokens: list[int] = tokenizer("a", verbose=False)["input_ids"]
    return tokenizer.bos_token_id is not None and tokens[:1] == [tokenizer.bos_token_id]


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the tokens of a text, with the beginning-of-sequence token if the tokenizer adds one, and no other."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [tokenizer.bos_token_id, *tokens] if adds_bos(tokenizer) else tokens


def _too_long(what: str, num_tokens: int, max_length: int, text: str) -> ValueError:
    return ValueError(
        f"Expected every {what} to have at most `max_length` {max_length} tokens, but got {num_tokens} for "
        f"{text[:40]!r}…; set `truncate`, or raise `max_length` if the model has learned as many positions"
    )


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, max_length: int, truncate: bool) -> list[int]:
    """Return the tokens of a text with the special tokens that the tokenizer adds.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        max_length: Maximum number of tokens, including the special ones.
        truncate: Shorten a longer text at its end.

    Raises:
        ValueError: If the text is longer than `max_length` and may not be shortened.
    """
    tokens: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if len(tokens) <= max_length:
        return tokens
    if not truncate:
        raise _too_long("text", len(tokens), max_length, text)
    return tokenizer(text, truncation=True, max_length=max_length, verbose=False)["input_ids"]


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase", template: str, text: str, max_length: int | None, truncate: bool
) -> list[int]:
    """Return the tokens of a prompt: the template with the text filled in.

    Args:
        tokenizer: The tokenizer.
        template: Prompt with {text} in it.
        text: The text.
        max_length: Maximum number of tokens; None for no limit.
        truncate: Shorten the text of a longer prompt at its end.

    Raises:
        ValueError: If the prompt is longer than `max_length` and may not, or cannot, be shortened.
    """
    tokens = _encode(tokenizer, template.replace("{text}", text))
    if max_length is None or len(tokens) <= max_length:
        return tokens
    if not truncate:
        raise _too_long("prompt", len(tokens), max_length, text)
    text_tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    keep = len(text_tokens) - (len(tokens) - max_length)
    # encoding the shortened text again can give one token more, so that it has to be cut again
    while keep > 0:
        shorter = str(tokenizer.decode(text_tokens[:keep]))
        tokens = _encode(tokenizer, template.replace("{text}", shorter))
        if len(tokens) <= max_length:
            return tokens
        keep -= 1
    raise ValueError(f"Expected argument `max_length` to leave room for text in the template, but got {max_length}")


def encode_options(
    tokenizer: "PreTrainedTokenizerBase", template: str, options: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens that each answer option adds to the prompt.

    Args:
        tokenizer: The tokenizer.
        template: Prompt with {text} in it.
        options: The answers of the C classes.

    Returns:
        The tokens `(C, L)` int64, with 0 after shorter options, and the mask `(C, L)` of real tokens.

    Raises:
        ValueError: If an option adds no token, changes the prompt's last token, or is tokenised like another.
    """
    prompt = template.replace("{text}", "text")
    start = _encode(tokenizer, prompt)
    rows: list[list[int]] = []
    for option in options:
        whole = _encode(tokenizer, prompt + option)
        if whole == start:
            raise ValueError(f"Expected every one of `options` to have a token, but {option!r} tokenises to nothing")
        if whole[: len(start)] != start:
            raise ValueError(
                f"Expected every one of `options` to start a token of its own, but {option!r} merges with the end of "
                f"the template {template!r}; start the option, not end the template, with a space"
            )
        rows.append(whole[len(start) :])
    for index, row in enumerate(rows):
        if row in rows[:index]:
            raise ValueError(f"Expected `options` to differ in tokens, but {options[index]!r} equals another")
    length = max(map(len, rows))
    option_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    option_mask = torch.tensor([[place < len(row) for place in range(length)] for row in rows])
    return option_ids, option_mask
