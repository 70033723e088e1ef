import math

import pytest
import torch

from wandazeta.zeroth_order import (
    AGGREGATIONS,
    ProjectedGradients,
    aggregation,
    aligned_gradient,
    direction,
    directions_of_step,
    mean_gradient,
    normalised_gradient,
    rademacher,
)


def setting(d=11, queries=(0, 2, 5), dropped=1, dtype=torch.float64, seed=3):
    """A vector, directions as a dense matrix `(Q, d)`, the gradient and its slopes along them."""
    theta = torch.linspace(-1, 1, d, dtype=dtype)
    z = torch.stack([direction(seed, 9, q, d).double() for q in queries])
    gradient = torch.linspace(2, -1, d, dtype=torch.float64)
    slopes = ProjectedGradients(tuple(queries), tuple((z @ gradient).tolist()), dropped)
    return theta, z, gradient, slopes, directions_of_step(theta, seed, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_equals_a_plain_reference(dtype):
    theta, z, _, slopes, directions = setting(dtype=dtype)
    expected = (torch.tensor(slopes.values, dtype=torch.float64) @ z / 3).to(dtype)
    torch.testing.assert_close(mean_gradient(theta, slopes, directions), expected)


@pytest.mark.parametrize("tile", [1, 2, 100], ids=lambda tile: f"{tile} held")
def test_align_is_the_scaled_projection(monkeypatch, tile):
    monkeypatch.setattr(aggregation, "_TILE_BYTES", tile * 8 * 11)
    theta, z, gradient, slopes, directions = setting(queries=(0, 2, 5, 1, 9))
    basis = torch.linalg.qr(z.T).Q
    projection = basis @ basis.T @ gradient
    torch.testing.assert_close(aligned_gradient(theta, slopes, directions), projection * 11 / 5)


@pytest.mark.parametrize("num_queries", [11, 14], ids=["a basis", "more than a basis"])
def test_align_with_a_basis_is_the_gradient(num_queries):
    theta, _, gradient, slopes, directions = setting(queries=range(num_queries))
    torch.testing.assert_close(aligned_gradient(theta, slopes, directions), gradient, rtol=1e-6, atol=1e-6)


def test_align_counts_a_direction_that_comes_twice_once():
    theta, _, _, slopes, directions = setting(queries=(0, 2))
    twice = ProjectedGradients((0, 2, 3), (*slopes.values, slopes.values[0]), 0)
    same = aligned_gradient(theta, twice, lambda query: directions(0 if query == 3 else query))
    torch.testing.assert_close(same, aligned_gradient(theta, slopes, directions))


def test_align_and_mean_have_the_gradient_as_their_mean_and_align_the_smaller_error():
    theta, _, gradient, _, _ = setting(d=8)
    estimates = {"mean": [], "align": []}
    for step in range(4000):
        directions = directions_of_step(theta, 0, step)
        values = tuple(float(directions(q) @ gradient) for q in range(4))
        for name, seen in estimates.items():
            seen.append(AGGREGATIONS[name](theta, ProjectedGradients(tuple(range(4)), values, 0), directions))
    errors = {}
    for name, seen in estimates.items():
        stacked = torch.stack(seen)
        torch.testing.assert_close(stacked.mean(0), gradient, atol=0.25, rtol=0)
        errors[name] = ((stacked - gradient).square().sum(1).mean() / gradient.square().sum()).item()
    # d / Q - 1 against (d + 1) / Q
    assert errors["align"] == pytest.approx(1.0, rel=0.1)
    assert errors["mean"] == pytest.approx(2.25, rel=0.1)


def test_fzoo_is_the_papers_step():
    d, epsilon, rate = 40, 1e-3, 0.02
    theta = torch.linspace(-1, 1, d, dtype=torch.float64)
    signs = torch.stack([rademacher(1, 0, q, d).double() for q in range(6)])
    # written as the paper does: losses to one side, their deviation, and the learning rate over epsilon
    losses, base = (theta + epsilon * signs).square().sum(1), theta.square().sum()
    expected = rate * ((losses - base) @ signs / (epsilon * 6)) / losses.std()
    slopes = ProjectedGradients(tuple(range(6)), tuple(((losses - base) / epsilon).tolist()), 0)
    step = rate / epsilon * normalised_gradient(theta, slopes, directions_of_step(theta, 1, 0, rademacher))
    torch.testing.assert_close(step, expected, rtol=1e-6, atol=0)


def test_fzoo_forgets_the_scale_of_the_loss():
    theta, _, _, slopes, directions = setting()
    scaled = ProjectedGradients(slopes.query_ids, tuple(1e6 * value for value in slopes.values), 0)
    torch.testing.assert_close(
        normalised_gradient(theta, scaled, directions), normalised_gradient(theta, slopes, directions)
    )


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_no_finite_query_gives_no_gradient(name):
    theta, *_, directions = setting()
    assert AGGREGATIONS[name](theta, ProjectedGradients((), (), 4), directions) is None


@pytest.mark.parametrize("values", [(1.5,), (0.5, 0.5)], ids=["one query", "no spread"])
def test_fzoo_without_a_deviation_gives_no_gradient(values):
    theta, *_, directions = setting()
    assert normalised_gradient(theta, ProjectedGradients(tuple(range(len(values))), values, 0), directions) is None


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_what_is_given_is_left_alone(name):
    theta, *_, slopes, directions = setting()
    before = theta.clone()
    estimate = AGGREGATIONS[name](theta, slopes, directions)
    assert torch.equal(theta, before)
    assert math.isfinite(estimate.norm())
