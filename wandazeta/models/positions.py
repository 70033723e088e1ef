"""Number of positions that a model has learned, which no sequence can exceed."""

import re

from torch import nn

# names of the tables in transformers (GPT-2's `wpe`, OPT's `embed_positions`, BERT's `position_embeddings`, GPT's
# `positions_embed`), and usual ones elsewhere; relative positions have other names
_TABLE = re.compile(r"(?:^|\.)(wpe|embed_positions|positions_embed|pos(ition(al)?)?_?emb(ed(ding)?s?)?)$")


def max_positions(model: nn.Module) -> int | None:
    """Return the largest number of tokens that the learned positions of a model have room for.

    Rotary, relative and computed positions have no such limit, whatever the configuration says.

    Args:
        model: The model, or a module that holds it.

    Returns:
        The number of tokens, or None if there is no table of positions. Of several tables, such as those of the text
        and the images of one model, the largest decides.
    """
    found = [
        table.num_embeddings - _first_position(table)
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and _TABLE.search(name)
    ]
    return max(found, default=None)


def _first_position(table: nn.Embedding) -> int:
    """Return the position of the first token: OPT starts at an offset, RoBERTa after the padding index."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1


def check_positions(num_tokens: int, limit: int | None) -> None:
    """Check that a sequence fits into the learned positions of a model.

    Args:
        num_tokens: Number of its tokens.
        limit: Number of learned positions, or None if there is no limit.

    Raises:
        ValueError: If the sequence is too long.
    """
    if limit is not None and num_tokens > limit:
        raise ValueError(
            f"Expected sequences of at most {limit} tokens, the number of positions that the model has learned, but "
            f"got {num_tokens}; give shorter ones"
        )
