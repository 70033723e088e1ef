from collections import namedtuple

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from wandazeta.pruning.calibration import (
    call_arguments,
    collect_rows,
    num_rows,
    split_rows,
)
from wandazeta.pruning.progress.key import digest_batches

Pair = namedtuple("Pair", "x y")


def test_rows_are_read_until_there_are_enough():
    data = TensorDataset(torch.arange(10))
    for number in (1, 4, 5, 8, 10):
        rows = collect_rows(DataLoader(data, batch_size=4), number, seed=0)
        assert [row[0].tolist() for row in rows] == [[value] for value in range(number)]
    with pytest.raises(ValueError, match=r"`num_calibration_samples` to be at most 10, .* but got 11"):
        collect_rows(DataLoader(data, batch_size=4), 11, seed=0)
    with pytest.raises(ValueError, match="at least one sample, but got an empty loader"):
        collect_rows([], 1, seed=0)
    empty = {"x": torch.empty(0, 3)}
    assert len(collect_rows([empty, {"x": torch.ones(2, 3)}], 2, seed=0)) == 2


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_shuffled_loader_gives_the_same_samples_and_is_not_advanced(own_generator):
    data = TensorDataset(torch.arange(100))

    def epoch(calibrate):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(6) if own_generator else None
        loader = DataLoader(data, batch_size=10, shuffle=True, generator=generator)
        seen = collect_rows(loader, 30, seed=0) if calibrate else None
        return seen, torch.cat([batch[0] for batch in loader])

    first, after = epoch(calibrate=True)
    torch.rand(7)
    second, _ = epoch(calibrate=True)
    assert digest_batches(first, lambda _: None) == digest_batches(second, lambda _: None)
    assert torch.equal(after, epoch(calibrate=False)[1])


def test_rows_of_any_nesting():
    x, y, table = torch.arange(6).view(3, 2), torch.arange(3), torch.ones(2, 5)
    nested = [y, {"names": ["a", "b", "c"]}, (x,)]
    batch = {"x": x, "nested": nested, "options": table, "k": 3, "pairs": [["a", "b", "c"]] * 3}
    assert num_rows(batch) == 3
    rows = split_rows(batch)
    assert len(rows) == 3
    assert torch.equal(rows[1]["x"], x[1:2])
    assert torch.equal(rows[1]["nested"][0], y[1:2])
    assert rows[1]["nested"][1]["names"] == ["b"]
    assert torch.equal(rows[1]["nested"][2][0], x[1:2])
    assert torch.equal(rows[1]["options"], table)
    assert rows[1]["k"] == 3
    assert rows[1]["pairs"] == [["a", "b", "c"]], "one list for each row, of as many strings as there are rows"
    assert split_rows(x[:1])[0] is not None
    assert len(split_rows((x, y))) == 3
    pair = split_rows(Pair(x, y))[2]
    assert isinstance(pair, Pair)
    assert torch.equal(pair.y, y[2:])
    assert (num_rows("text"), split_rows("text")) == (None, ["text"])


def test_rows_keep_the_class_of_the_batch():
    batch = BatchEncoding({"input_ids": torch.arange(4).view(2, 2)})
    rows = split_rows(batch)
    assert torch.equal(rows[1].input_ids, torch.tensor([[2, 3]]))
    assert batch.input_ids.shape == (2, 2)


def hugging_face(input_ids, attention_mask=None, **kwargs): ...
def two(x, y): ...
def one(x, mask=None): ...
def whole(batch): ...
def anything(*args, **kwargs): ...
def keywords(*, input_ids): ...
def step(batch, **kwargs): ...


IDS = {"input_ids": 1, "attention_mask": 2, "label": 3}


@pytest.mark.parametrize(
    ("function", "batch", "expected"),
    [
        (hugging_face, IDS, ((), IDS)),
        (keywords, IDS, ((), {"input_ids": 1})),
        (one, IDS, ((IDS,), {})),
        (whole, IDS, ((IDS,), {})),
        (step, IDS, ((IDS,), {})),
        (anything, IDS, ((), IDS)),
        (two, (1, 2), ((1, 2), {})),
        (two, [1, 2, 3], ((1, 2), {})),
        (one, (1, 2), ((1,), {})),
        (two, (1,), (((1,),), {})),
        (whole, (1, 2), (((1, 2),), {})),
        (anything, (1, 2), ((1, 2), {})),
        (one, 7, ((7,), {})),
        (hugging_face, 7, ((7,), {})),
    ],
)
def test_a_batch_is_fitted_to_a_signature(function, batch, expected):
    assert call_arguments(function, batch) == expected
