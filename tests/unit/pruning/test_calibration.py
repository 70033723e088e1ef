import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from wandazeta.pruning.calibration import (
    call_arguments,
    collect_batches,
    count_rows,
    isolated_rng,
    take_rows,
)
from wandazeta.pruning.progress.key import digest_batches

Pair = namedtuple("Pair", "x y")


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def seed_all():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def test_global_generators_are_seeded_and_put_back():
    with isolated_rng(3):
        inside = draw()
    seed_all()
    expected = draw()
    seed_all()
    with isolated_rng(3):
        assert draw() == inside
    assert draw() == expected
    seed_all()
    with pytest.raises(ZeroDivisionError), isolated_rng(3):
        _ = draw()[0] / 0
    assert draw() == expected


def test_batches_are_read_until_there_are_enough_and_the_last_is_cut():
    data = TensorDataset(torch.arange(10))
    for number in (1, 4, 5, 8, 10):
        batches = collect_batches(DataLoader(data, batch_size=4), number, seed=0)
        assert torch.cat([batch[0] for batch in batches]).tolist() == list(range(number))
    with pytest.raises(ValueError, match=r"`num_calibration_samples` to be at most 10, .* but got 11"):
        collect_batches(DataLoader(data, batch_size=4), 11, seed=0)
    with pytest.raises(ValueError, match="at least one sample, but got an empty loader"):
        collect_batches([], 1, seed=0)


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_shuffled_loader_gives_the_same_samples_and_is_not_advanced(own_generator):
    data = TensorDataset(torch.arange(100))

    def epoch(calibrate):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(6) if own_generator else None
        loader = DataLoader(data, batch_size=10, shuffle=True, generator=generator)
        seen = collect_batches(loader, 30, seed=0) if calibrate else None
        return seen, torch.cat([batch[0] for batch in loader])

    first, after = epoch(calibrate=True)
    torch.rand(7)
    second, _ = epoch(calibrate=True)
    assert digest_batches(first, lambda _: None) == digest_batches(second, lambda _: None)
    assert torch.equal(after, epoch(calibrate=False)[1])


def test_rows_are_cut_in_any_nesting():
    x, table = torch.arange(8).view(4, 2), torch.ones(3, 2)
    batch = BatchEncoding({"x": x, "table": table, "names": ["a", "b", "c", "d"], "nested": [x, (x,)], "n": 4})
    assert count_rows(batch) == 4
    cut = take_rows(batch, 3)
    assert torch.equal(cut["x"], x[:3])
    assert torch.equal(cut["table"], table)
    assert cut["names"] == ["a", "b", "c"]
    assert torch.equal(cut["nested"][1][0], x[:3])
    assert cut["n"] == 4
    pair = take_rows(Pair(x, x), 1)
    assert isinstance(pair, Pair)
    assert pair.y.shape == (1, 2)
    assert take_rows(x, 2).shape == (2, 2)
    assert count_rows("no tensors") == 1


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


def test_a_cut_batch_keeps_its_class():
    batch = BatchEncoding({"input_ids": torch.ones(4, 3)})
    cut = take_rows(batch, 2)
    assert cut.input_ids.shape == (2, 3)
    assert batch.input_ids.shape == (4, 3)
