import math

import pytest
import torch
from helpers.small_net import adapted_net

from wandazeta.zeroth_order import direction
from wandazeta.zeroth_order.diagnosis import EpsilonRow, measure_epsilons, recommended_epsilon


def rounded(loss_fn, step):
    """A loss that knows only multiples of a step, as one in low precision does."""

    def rounded_loss(theta_Nd):
        loss = loss_fn(theta_Nd)
        # the derivative passes as it is
        return loss + ((loss / step).round() * step - loss).detach()

    return rounded_loss


def test_correlations_equal_those_with_the_gradient_of_autograd():
    loss_fn, theta, gradient = adapted_net()
    epsilons = (1e-3, 0.3)
    rows = measure_epsilons([loss_fn], theta, seed=4, num_queries=6, epsilons=epsilons, chunk_size=4)
    z = torch.stack([direction(4, 0, query, len(theta)).double() for query in range(6)])
    exact = z @ gradient
    for epsilon in epsilons:
        plus, minus, base = loss_fn(theta + epsilon * z), loss_fn(theta - epsilon * z), loss_fn(theta[None])
        for name, slopes in (("two_sided", plus - minus), ("one_sided", plus - base)):
            (row,) = (row for row in rows if (row.estimator, row.epsilon) == (name, epsilon))
            expected = torch.cosine_similarity(slopes, exact, 0).item()
            assert row.correlation == pytest.approx(expected, abs=1e-9)


def test_rounding_drowns_small_distances_and_curvature_large_ones():
    loss_fn, theta, _ = adapted_net()
    rows = measure_epsilons([rounded(loss_fn, 1e-4)] * 2, theta, num_queries=24)
    found = {(row.estimator, row.epsilon): row.correlation for row in rows}
    assert found["two_sided", 1e-5] < 0.7
    assert found["two_sided", 1e-2] > 0.99
    assert found["one_sided", 1e-1] < found["two_sided", 1e-1] - 0.01
    best = recommended_epsilon(rows, "two_sided")
    assert 1e-3 <= best.epsilon <= 1e-1


def row(epsilon, correlation, estimator="two_sided"):
    return EpsilonRow(estimator, epsilon, correlation)


@pytest.mark.parametrize(
    ("correlations", "expected"),
    [
        ((0.1, 0.995, 0.999, 0.998, 0.5), 1e-3),
        ((0.1, 0.2, 0.3, 0.4, 0.9), 1e-1),
        ((0.999, math.nan, 0.2, math.nan, math.nan), 1e-5),
        ((0.1, 0.998, 0.999, 0.2, math.nan), 1e-4),
    ],
    ids=["middle", "edge", "not finite", "of two the smaller"],
)
def test_recommended_is_the_middle_of_the_plateau(correlations, expected):
    epsilons = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    rows = [row(e, c) for e, c in zip(epsilons, correlations, strict=True)]
    others = [row(e, 1.0, "one_sided") for e in epsilons]
    assert recommended_epsilon([*others, *reversed(rows)], "two_sided").epsilon == expected


def test_no_finite_loss():
    with pytest.raises(ValueError, match="finite loss"):
        recommended_epsilon([row(1e-3, math.nan)], "two_sided")


def test_a_loss_that_is_flat_correlates_with_nothing():
    rows = measure_epsilons([lambda theta_Nd: theta_Nd.sum(1) * 0], torch.ones(4), num_queries=3, epsilons=(1e-2,))
    assert [row.correlation for row in rows] == [0.0, 0.0]
