import pytest
import torch

from wandazeta.pruning.method.sparsegpt import sparsegpt
from wandazeta.pruning.pattern import SparsityPattern

PATTERNS = [(576, "2:4"), (96, "1:4"), (160, "4:8"), (160, "10:16"), (15, "2:5"), (300, 0.5), (64, 0.7), (129, 0.6)]


def pattern_of(pattern):
    if isinstance(pattern, str):
        return SparsityPattern(pattern)
    return SparsityPattern("unstructured", sparsity=pattern)


def problem(width, rows=24):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(4 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return torch.randn(rows, width, generator=generator), x


def published(weight, gram, pattern, block_size=128):
    """The authors' procedure, column by column in float64: blocks of 128, masks chosen at their start or per group."""
    weight, gram = weight.double(), gram.double()
    width = weight.shape[1]
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    kept = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, width, block_size) if pattern.group is None else [0]:
        stop = min(start + block_size, width) if pattern.group is None else width
        if pattern.group is None:
            scores = (weight[:, start:stop] / upper.diagonal()[start:stop]) ** 2
            lowest = scores.t().flatten().sort(stable=True).indices[: int(scores.numel() * pattern.target_sparsity)]
            flat = torch.ones(scores.numel(), dtype=torch.bool)
            flat[lowest] = False
            kept[:, start:stop] = flat.view(stop - start, -1).t()
        for column in range(start, stop):
            if pattern.group is not None and column % pattern.group[1] == 0:
                num_kept, size = pattern.group
                scores = (weight[:, column : column + size] / upper.diagonal()[column : column + size]) ** 2
                lowest = scores.sort(dim=1, stable=True).indices[:, : size - num_kept]
                kept[:, column : column + size] = torch.ones_like(scores, dtype=torch.bool).scatter(1, lowest, False)
            error = weight[:, column] * ~kept[:, column] / upper[column, column]
            weight[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
            weight[:, column] *= kept[:, column]
    return weight.float(), kept


@pytest.mark.parametrize(("width", "pattern"), PATTERNS)
def test_equals_the_published_procedure(width, pattern):
    weight, x = problem(width)
    before = weight.clone()
    # two layers with one input are each what they would be alone
    parts = weight.split([10, 14])
    for part, (found, kept) in zip(parts, sparsegpt(parts, x.t() @ x, pattern_of(pattern)), strict=True):
        expected, expected_mask = published(part, x.t() @ x, pattern_of(pattern))
        assert torch.equal(kept, expected_mask)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert (found[~kept] == 0).all()
        assert not found[~kept].signbit().any()
    assert torch.equal(weight, before)


def test_what_is_kept_makes_up_for_what_is_pruned():
    weight, x = problem(64)
    ((found, kept),) = sparsegpt([weight], x.t() @ x, SparsityPattern())
    error = (x @ (found - weight).t()).norm()
    assert error < 0.8 * (x @ (weight * kept - weight).t()).norm()


def test_the_scale_of_the_gram_matrix_does_not_matter():
    weight, x = problem(64)
    found = [sparsegpt([weight], scale * (x.t() @ x), SparsityPattern())[0][0] for scale in (1.0, 1024.0)]
    torch.testing.assert_close(*found)


def test_a_feature_that_is_never_seen_costs_nothing():
    weight, x = problem(64)
    x[:, 5] = 0
    ((found, _),) = sparsegpt([weight], x.t() @ x, SparsityPattern())
    assert (found[:, 5] == 0).all()
    assert found.isfinite().all()


def test_a_layer_that_only_sees_zeros_costs_nothing():
    weight, _ = problem(64)
    ((found, kept),) = sparsegpt([weight], torch.zeros(64, 64), SparsityPattern())
    assert (found == 0).all()
    assert (kept.view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("value", ["nan", "inf", "1e30"])
def test_activations_that_are_not_finite_are_an_error(value):
    weight, x = problem(64)
    x[3, 3] = float(value)
    with pytest.raises(ValueError, match="Gram matrix can be inverted"):
        sparsegpt([weight], x.t() @ x, SparsityPattern())


def test_a_gram_matrix_that_rounding_has_spoiled_is_an_error():
    weight, _ = problem(64)
    with pytest.raises(ValueError, match="Gram matrix can be inverted"):
        sparsegpt(
            [weight], torch.eye(64) + 2 * torch.eye(64).roll(1, 0) + 2 * torch.eye(64).roll(-1, 0), SparsityPattern()
        )


def test_sixteen_bit_weights_are_solved_in_thirty_two():
    weight, x = problem(64)
    weight = weight.bfloat16()
    found, expected = (sparsegpt([w], x.t() @ x, SparsityPattern())[0] for w in (weight, weight.float()))
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
