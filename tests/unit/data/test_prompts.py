import pytest
import torch
from helpers.tokenizer import byte_tokenizer

from wandazeta.data.prompts import encode_options, encode_prompt

TEMPLATE = "Review: {text} It was"


def test_single_and_multi_token_options():
    tokenizer = byte_tokenizer((" good",))
    option_ids, option_mask = encode_options(tokenizer, TEMPLATE, [" good", " bad"])
    assert option_ids.shape == option_mask.shape == (2, 4)
    assert option_mask.sum(dim=1).tolist() == [1, 4]
    for row, option in enumerate([" good", " bad"]):
        assert tokenizer.decode(option_ids[row][option_mask[row]]) == option
    assert option_ids.dtype == torch.int64
    assert option_mask.dtype == torch.bool


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_and_option_follow_each_other_as_in_one_text(bos):
    tokenizer = byte_tokenizer((" good",), bos=bos)
    prompt = encode_prompt(tokenizer, TEMPLATE, "fine {braces}", None, False)
    option_ids, option_mask = encode_options(tokenizer, TEMPLATE, [" good", " bad"])
    for row, option in enumerate([" good", " bad"]):
        whole = tokenizer(f"Review: fine {{braces}} It was{option}")["input_ids"]
        assert prompt + option_ids[row][option_mask[row]].tolist() == whole
    assert (prompt[0] == tokenizer.bos_token_id) == bos


def test_options_without_tokens_of_their_own():
    tokenizer = byte_tokenizer((" good", "was good"))
    with pytest.raises(ValueError, match="'' tokenises to nothing"):
        encode_options(tokenizer, TEMPLATE, ["", " bad"])
    with pytest.raises(ValueError, match="merges with the end of the template"):
        encode_options(tokenizer, TEMPLATE, [" good", " bad"])


def test_truncation_shortens_the_text_only():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"at most `max_length` 30 tokens, but got \d+"):
        encode_prompt(tokenizer, TEMPLATE, "x" * 50, 30, False)
    prompt = encode_prompt(tokenizer, TEMPLATE, "x" * 50, 30, True)
    assert len(prompt) == 30
    assert tokenizer.decode(prompt) == f"Review: {'x' * 15} It was"
    with pytest.raises(ValueError, match="leave room for text"):
        encode_prompt(tokenizer, TEMPLATE, "x" * 50, 10, True)
