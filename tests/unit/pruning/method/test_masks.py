import pytest
import torch

from wandazeta.pruning.method.masks import OneGroup, group_mask, make_mask, row_mask, zero_where_false
from wandazeta.pruning.pattern import SparsityPattern


def brute_force(values, num_pruned):
    """Prune the smallest; of equals the leftmost."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    return [i not in order[:num_pruned] for i in range(len(values))]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("kept", "size"), [(1, 4), (2, 4), (3, 4), (4, 8), (1, 2), (2, 3), (5, 16), (8, 32)])
def test_group_mask_equals_brute_force(kept, size, ties):
    generator = torch.Generator().manual_seed(size)
    score = torch.rand(7, 3 * size, generator=generator)
    if ties:
        score = (score * 3).round()
    mask = group_mask(score, kept, size)
    wanted = [[keep for group in row.split(size) for keep in brute_force(group.tolist(), size - kept)] for row in score]
    assert mask.tolist() == wanted
    assert (mask.view(7, 3, size).sum(-1) == kept).all()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.5, 0.75, 0.99])
def test_row_mask_equals_brute_force(sparsity, ties):
    generator = torch.Generator().manual_seed(1)
    score = torch.rand(6, 100, generator=generator)
    if ties:
        score = (score * 4).round()
    mask = row_mask(score, sparsity)
    assert mask.tolist() == [brute_force(row.tolist(), round(100 * sparsity)) for row in score]
    assert ((~mask).sum(1) == round(100 * sparsity)).all()


def test_all_equal_scores_prune_from_the_left():
    zeros = torch.zeros(2, 8)
    assert group_mask(zeros, 2, 4).tolist() == [[False, False, True, True] * 2] * 2
    assert group_mask(torch.zeros(2, 16), 4, 16).tolist() == [[False] * 12 + [True] * 4] * 2
    assert row_mask(zeros, 0.5).tolist() == [[False] * 4 + [True] * 4] * 2


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("kept", "size"), [(1, 4), (2, 4), (4, 8), (5, 16)])
def test_one_group_of_columns_has_the_mask_of_all_groups(kept, size, ties):
    scores = torch.rand(size, 50, generator=torch.Generator().manual_seed(size))
    if ties:
        scores = (scores * 3).round()
    assert torch.equal(OneGroup(kept, size)(scores), group_mask(scores.t(), kept, size).t())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zeros_are_positive_and_what_is_kept_keeps_its_bits(dtype):
    values = torch.tensor([[-1.5, 2.0, torch.inf, torch.nan, -0.0, 3.0]], dtype=dtype)
    mask = torch.tensor([[False, True, False, False, True, True]])
    weight = torch.nn.Parameter(values.clone().t().contiguous().t())
    with torch.no_grad():
        zero_where_false(weight, mask)
    assert torch.equal(weight[~mask], torch.zeros(3, dtype=dtype))
    assert not weight[~mask].signbit().any()
    assert torch.equal(weight[mask], values[mask])
    assert weight[0, 4].signbit()


def test_a_transposed_score_gives_the_same_mask():
    score = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    view = score.t().contiguous().t()
    assert torch.equal(group_mask(score, 2, 4), group_mask(view, 2, 4))
    assert torch.equal(row_mask(score, 0.5), row_mask(view, 0.5))


def test_make_mask_follows_the_pattern():
    score = torch.rand(4, 8)
    assert torch.equal(make_mask(score, SparsityPattern("4:8")), group_mask(score, 4, 8))
    pattern = SparsityPattern("unstructured", sparsity=0.3)
    assert torch.equal(make_mask(score, pattern), row_mask(score, 0.3))
