"""More calibration samples of the model's own: windows in which it draws some tokens anew.

A block that is optimised for many steps on few windows learns these by heart, which more text would prevent. Where
there is none, text that the dense model predicts does much of it, at the price of one forward for each window.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wandazeta.blocks import block_outputs, call_behind

# of a window's tokens, but the first and the padding
SHARE = 0.5


def with_resampled(
    rows: Sequence[Any],
    copies: int,
    blocks: nn.ModuleList,
    forward: Callable[[Any], object],
    run_blocks: Callable[[Sequence[Any]], Sequence[Tensor]],
    token_mask: Callable[[Any], Tensor | None] | None,
    *,
    seed: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> list[Any]:
    """Samples of a causal language model, and behind them copies in which tokens are replaced.

    A token is drawn from the dense model's prediction of it, given the true tokens before it: all places of a window
    at once, where a chain of draws, each given those before, would take a forward for every token.

    Args:
        rows: All samples, batches of one row: tokens of shape (1, tokens), bare, first in a tuple or as
            `input_ids`.
        copies: Copies of each sample.
        blocks: The model's blocks.
        forward: Runs the model on a sample; gives logits of shape (1, tokens, vocabulary), alone, first in a tuple, or
            called `logits`.
        run_blocks: Gives the dense model's hidden states behind the last block for samples, each of shape
            (1, tokens, width).
        token_mask: Gives the positions of a sample that are not padding, bool of shape (1, tokens), None for all.
        seed: Seed of the draws; those of a sample depend on it and on the sample's number alone.
        rank: The rank, which gets every `num_ranks`-th of the longer list, from the one with its number on.
        num_ranks: Ranks that share the samples out.

    Returns:
        The rank's samples, like those that were given.

    Raises:
        ValueError: If the samples are not tokens, or the model's output not a prediction of the next; before the blocks
            are run on all of them.
    """
    own = range(len(rows) * (1 + copies))[rank::num_ranks]
    needed = sorted({place % len(rows) for place in own if place >= len(rows)})
    outputs = block_outputs(lambda: forward(rows[0]), blocks)

    def logits(index: int, hidden: Tensor) -> Tensor:
        return _logits(call_behind(lambda: forward(rows[index]), blocks, hidden, outputs), _tokens(rows[index]))

    logits(0, outputs[-1] if isinstance(outputs[-1], Tensor) else outputs[-1][0])
    drawn = {}
    for index, hidden in zip(needed, run_blocks([rows[index] for index in needed]), strict=True):
        mask = token_mask(rows[index]) if token_mask is not None else None
        # hashed, as the CPU's generator looks at 32 bits alone
        number = int.from_bytes(hashlib.sha256(f"{seed}:resample:{index}".encode()).digest()[:4], "big")
        generator = torch.Generator().manual_seed(number)
        tokens = _draw(_tokens(rows[index]), logits(index, hidden), mask, copies, generator)
        drawn[index] = [_with_tokens(rows[index], changed) for changed in tokens.split(1)]
    return [rows[place] if place < len(rows) else drawn[place % len(rows)][place // len(rows) - 1] for place in own]


def _draw(tokens: Tensor, logits: Tensor, mask: Tensor | None, copies: int, generator: torch.Generator) -> Tensor:
    """Copies with replaced tokens, shape (copies, tokens)."""
    # on the CPU, whose generator draws the same wherever the model is
    probabilities = logits[0, :-1].float().softmax(-1).cpu()
    drawn = torch.multinomial(probabilities, copies, replacement=True, generator=generator).T
    replaced = torch.rand(drawn.shape, generator=generator) < SHARE
    if mask is not None:
        replaced &= mask[:, 1:].cpu()
    changed = tokens.repeat(copies, 1)
    changed[:, 1:] = torch.where(replaced.to(tokens.device), drawn.to(tokens), tokens[:, 1:])
    return changed


def _logits(output: Any, tokens: Tensor) -> Tensor:
    first = output[0] if isinstance(output, tuple) and output else output
    logits = first if isinstance(first, Tensor) else getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == tokens.shape:
        return logits
    found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
    raise ValueError(
        "Expected a causal language model whose forward gives logits of shape (rows, tokens, vocabulary) for "
        f"`resampled_copies`, but got {found} for tokens of shape {tuple(tokens.shape)}; set `resampled_copies` to 0"
    )


def _tokens(row: Any) -> Tensor:
    tokens = row.get("input_ids") if isinstance(row, Mapping) else row[0] if type(row) in (list, tuple) else row
    if isinstance(tokens, Tensor) and tokens.ndim == 2 and not tokens.is_floating_point():
        return tokens
    raise ValueError(
        "Expected calibration batches of tokens, bare, first in a tuple or as `input_ids`, for `resampled_copies`, but "
        f"got {type(row).__name__}; set `resampled_copies` to 0"
    )


def _with_tokens(row: Any, tokens: Tensor) -> Any:
    if isinstance(row, Mapping):
        return {**row, "input_ids": tokens}
    return type(row)([tokens, *row[1:]]) if type(row) in (list, tuple) else tokens
