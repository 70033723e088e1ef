import pytest
import torch
from torch import nn

from wandazeta.models import sparsity
from wandazeta.models.sparsity import is_pruned


def dense(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.mark.parametrize("chunk_numel", [1, 20, 1 << 20])
def test_every_row_of_a_pruned_weight_has_zeros(monkeypatch, chunk_numel):
    monkeypatch.setattr(sparsity, "_CHUNK_NUMEL", chunk_numel)
    weight = dense(6, 8)
    assert not is_pruned(weight)
    weight[:, 3] = 0.0
    assert is_pruned(weight)
    assert is_pruned(nn.Parameter(weight))
    weight[5, 3] = 1.0
    assert not is_pruned(weight), "a row without zeros"


def test_rows_are_the_output_features():
    weight = dense(6, 8)
    weight[2] = 0.0
    assert not is_pruned(weight)
    assert is_pruned(weight, rows_dim=1)
    assert is_pruned(weight.t())
    assert not is_pruned(weight.t(), rows_dim=1)


def test_weights_of_more_dimensions_are_read_row_by_row():
    weight = dense(4, 3, 2)
    weight[:, 1, 0] = 0.0
    assert is_pruned(weight)
    assert not is_pruned(weight, rows_dim=1)


def test_zeros_alone_are_not_a_pruning():
    assert not is_pruned(torch.zeros(4, 4))
    assert not is_pruned(torch.empty(0, 4))
    assert not is_pruned(torch.tensor([0.0, 1.0]))
    few = torch.zeros(4, 4)
    few[3, 3] = 1.0
    assert is_pruned(few)
