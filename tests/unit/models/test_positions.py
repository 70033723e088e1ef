import pytest
import torch
from helpers.causal_lms import tiny_lm
from helpers.encoders import tiny_encoder
from torch import nn

from wandazeta.models.positions import check_positions, max_positions


def longest_that_runs(model, few, many):
    for length in range(few, many):
        try:
            with torch.no_grad():
                model(input_ids=torch.full((1, length), 5), attention_mask=torch.ones(1, length, dtype=torch.int64))
        except (IndexError, RuntimeError):
            return length - 1
    return None


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert", "roberta", "mpnet"])
def test_the_limit_is_the_longest_sequence_that_runs(kind):
    model = tiny_lm(kind) if kind in ("gpt2", "opt") else tiny_encoder(kind)
    assert max_positions(model) == longest_that_runs(model, 60, 80)
    assert max_positions(nn.ModuleDict({"inner": model})) == max_positions(model)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox", "phi"])
def test_rotary_positions_have_no_limit(kind):
    assert max_positions(tiny_lm(kind, max_position_embeddings=16)) is None
    check_positions(10**9, None)


def test_other_tables_are_no_positions():
    tables = nn.ModuleDict({"part_of_speech": nn.Embedding(3, 2), "relative_attention_bias": nn.Embedding(4, 2)})
    assert max_positions(tables) is None
    tables["pos_emb"] = nn.Embedding(5, 2)
    assert max_positions(tables) == 5
