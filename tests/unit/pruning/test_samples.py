import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wandazeta.pruning.samples import Batches, capture_samples, max_tokens


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def capture(rows, token_mask=None):
    model = Model()
    return capture_samples(model.layers, lambda x: model(getattr(x, "x", x)), rows, token_mask, torch.device("cpu"))


def test_masks_that_are_all_true_cost_nothing():
    rows = [torch.randn(1, 3, 2), torch.randn(1, 4, 2)]
    samples = capture(rows, lambda row: (torch.arange(row.shape[1]) < 3)[None])
    assert samples.masks[0] is None
    assert samples.masks[1].tolist() == [[True, True, True, False]]
    assert len(samples) == 2
    assert samples.num_tokens == 6


def test_refusals():
    rows = [torch.randn(1, 3, 2)]
    with pytest.raises(ValueError, match=r"mask of shape \(1, 3\), but got \(3,\)"):
        capture(rows, lambda row: torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="all padding"):
        capture(rows, lambda row: torch.zeros(1, 3, dtype=torch.bool))
    unknown = type("Unknown", (), {"x": torch.randn(2, 3, 2)})()
    with pytest.raises(ValueError, match="Unknown with 2 samples"):
        capture([unknown])


def test_batches_are_neighbours_without_padding_that_are_called_alike():
    mask = torch.tensor([[True, True, False]])
    batches = Batches([None, None, mask, None, None], keys=["a", "a", None, "b", "b"], num_tokens=[3] * 5)
    assert batches.split(range(5)) == [[0, 1], [2], [3, 4]]
    assert batches.split([0, 3, 1, 4]) == [[0], [3], [1], [4]]
    assert batches.mask([2]) is mask
    assert batches.mask([0, 1]) is None
    assert batches.one_by_one().split(range(5)) == [[0], [1], [2], [3], [4]]
    long = Batches([None] * 5, keys=["a"] * 5, num_tokens=[1000] * 5)
    assert long.split(range(5)) == [[0, 1], [2, 3], [4]]
    longer = Batches([None] * 5, keys=["a"] * 5, num_tokens=[1000] * 5, max_tokens=3000)
    assert longer.split(range(5)) == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("gib", "width", "expected"), [(80, 4096, 8192), (24, 4096, 7864), (80, 16384, 6553), (8, 8192, 2048)]
)
def test_the_tokens_of_a_batch_depend_on_the_memory_of_a_gpu_and_the_width(monkeypatch, gib, width, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib * 2**30))
    assert max_tokens(torch.device("cuda"), width) == expected
    # an eighth of the memory, if more than 2,048 tokens fit into it
    assert expected * 100 * width <= gib * 2**30 / 8 or expected == 2048
    assert max_tokens(torch.device("cpu"), width) == 2048


def test_samples_are_told_apart_by_shape_padding_and_arguments():
    rows = [torch.randn(1, length, 2) for length in (3, 3, 4, 3)]
    samples = capture(rows, lambda row: torch.ones(1, row.shape[1], dtype=torch.bool))
    assert samples.batches(0).split(range(4)) == [[0, 1], [2], [3]]
    samples.masks[1] = torch.tensor([[True, False, False]])
    assert samples.batches(0).split(range(4)) == [[0], [1], [2], [3]]


def test_the_signature_of_a_call_has_the_shapes_of_its_tensors():
    samples = capture([torch.randn(1, 3, 2)] * 3)
    shapes = [(1, 3), (1, 3), (1, 4)]
    for calls, shape in zip(samples.calls, shapes, strict=True):
        calls[0] = dataclasses.replace(calls[0], kwargs={"mask": torch.randn(shape), "cache": False})
    assert samples.call_signature(0, 0) == samples.call_signature(1, 0) != samples.call_signature(2, 0)
    assert samples.batches(0).split(range(3)) == [[0], [1], [2]], "equal shapes, other tensors"


def test_hidden_states_with_tokens_first_are_refused():
    layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=False) for _ in range(2))

    def forward(row):
        states = row.transpose(0, 1)
        for layer in layers:
            states = layer(states)

    with pytest.raises(ValueError, match=r"\(rows, tokens, width\).*has \(5, 1, 8\); build .* `batch_first=True`"):
        capture_samples(layers, forward, [torch.randn(1, 5, 8)], None, torch.device("cpu"))
