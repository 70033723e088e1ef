import pytest
import torch
from helpers.tokenizer import byte_tokenizer

from wandazeta.data.windows import collate_windows, cut_windows, shuffle_windows


def test_windows_hold_the_joined_texts_without_overlap():
    tokenizer, texts = byte_tokenizer(), ["first text", "second one", "third"]
    expected = tokenizer("".join(text + "\n\n" for text in texts), add_special_tokens=False)["input_ids"]
    windows = cut_windows(tokenizer, texts, 7)
    assert [len(window) for window in windows] == [7] * (len(expected) // 7)
    assert torch.cat(windows).tolist() == expected[: 7 * len(windows)]
    with_bos = cut_windows(tokenizer, texts, 8, add_bos=True)
    assert [window[0].item() for window in with_bos] == [tokenizer.bos_token_id] * len(with_bos)
    assert torch.cat([window[1:] for window in with_bos]).tolist() == expected[: 7 * len(with_bos)]


@pytest.mark.parametrize("bos", [True, False])
def test_windows_start_as_the_tokenizer_starts_a_text(bos):
    tokenizer = byte_tokenizer(bos=bos)
    windows = cut_windows(tokenizer, ["some text"], 5)
    assert windows[0][0].item() == tokenizer("some text")["input_ids"][0]
    assert [w.tolist() for w in windows] == [w.tolist() for w in cut_windows(tokenizer, ["some text"], 5, add_bos=bos)]
    other = cut_windows(tokenizer, ["some text"], 5, add_bos=not bos)
    assert (other[0][0] == tokenizer.bos_token_id) == (not bos)


def test_a_token_that_the_tokenizer_lacks_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    assert cut_windows(tokenizer, ["some text"], 5)[0].tolist() == tokenizer("some ", verbose=False)["input_ids"]
    with pytest.raises(ValueError, match="`add_bos` to be False or null"):
        cut_windows(tokenizer, ["some text"], 5, add_bos=True)
    with pytest.raises(ValueError, match="`sequence_length` to be at least 2"):
        cut_windows(byte_tokenizer(bos=True), ["some text"], 1)


@pytest.mark.parametrize("texts", [[], ["short"]])
def test_too_little_text_is_refused(texts):
    with pytest.raises(ValueError, match="fills a window of `sequence_length` 100 tokens"):
        cut_windows(byte_tokenizer(), texts, 100)


def test_the_order_is_decided_by_the_seed_alone():
    windows = [torch.tensor([index]) for index in range(20)]
    first, again, other = (torch.cat(shuffle_windows(windows, seed)).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == list(range(20))


def test_batches_have_a_mask_of_ones():
    batch = collate_windows([torch.tensor([1, 2]), torch.tensor([3, 4])])
    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 1]]
