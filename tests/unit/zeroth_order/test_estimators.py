import math

import pytest
import torch
from helpers.small_net import adapted_net
from torch import nn

from wandazeta.zeroth_order import (
    DEFAULT_EPSILON,
    ForwardMode,
    OneSided,
    TwoSided,
    direction,
    directions_of_step,
    mean_gradient,
    projected_gradients,
)

THETA = torch.linspace(-1, 1, 9, dtype=torch.float64)
ESTIMATORS = [TwoSided(1e-2), OneSided(1e-2), ForwardMode()]
IDS = ["two_sided", "one_sided", "forward_mode"]
all_estimators = pytest.mark.parametrize("estimator", ESTIMATORS, ids=IDS)


def quadratic(theta_Nd):
    return (theta_Nd**2).sum(-1)


def evaluate(estimator, num_queries, loss_fn=quadratic, theta=THETA, chunk_size=4, seed=5, step=2):
    points = range(estimator.num_points(num_queries))
    return estimator.evaluate(loss_fn, theta, directions_of_step(theta, seed, step), points, chunk_size)


def test_two_sided_losses_are_those_of_the_perturbed_vectors():
    estimator = TwoSided(1e-2)
    evaluations = estimator.evaluate(quadratic, THETA, directions_of_step(THETA, 5, 2), [0, 1, 6, 7, 2, 3], 4)
    assert evaluations.points == (0, 1, 6, 7, 2, 3)
    slopes = estimator.slopes(evaluations.values_VP)
    for row, query in enumerate([0, 3, 1]):
        z = direction(5, 2, query, 9).double()
        plus, minus = evaluations.values_VP[0, 2 * row : 2 * row + 2].tolist()
        assert plus == pytest.approx(quadratic(THETA + 1e-2 * z).item(), rel=1e-12)
        assert minus == pytest.approx(quadratic(THETA - 1e-2 * z).item(), rel=1e-12)
        # the two-sided slope of a quadratic is exact
        assert slopes[row].item() == pytest.approx((2 * THETA @ z).item(), rel=1e-9)


def test_one_sided_slopes_share_their_base():
    estimator = OneSided(1e-2)
    evaluations = evaluate(estimator, 3)
    assert evaluations.values_VP[0, 0].item() == quadratic(THETA).item() == estimator.loss(evaluations.values_VP)
    for query, slope in enumerate(estimator.slopes(evaluations.values_VP).tolist()):
        z = direction(5, 2, query, 9).double()
        # with the curvature along z that a difference to one side does not cancel
        assert slope == pytest.approx((2 * THETA @ z + 1e-2 * z @ z).item(), rel=1e-9)


def test_forward_mode_is_the_derivative_that_autograd_gives():
    loss_fn, theta, gradient = adapted_net()
    estimator = ForwardMode()
    evaluations = evaluate(estimator, 6, loss_fn, theta)
    expected = torch.stack([direction(5, 2, query, len(theta)).double() @ gradient for query in range(6)])
    torch.testing.assert_close(estimator.slopes(evaluations.values_VP), expected, rtol=1e-10, atol=1e-12)
    assert estimator.loss(evaluations.values_VP) == pytest.approx(loss_fn(theta[None]).item(), rel=1e-12)


@pytest.mark.parametrize(("kind", "order"), [(TwoSided, 2), (OneSided, 1)], ids=IDS[:2])
def test_differences_approach_the_derivative_with_their_order(kind, order):
    def smooth(copies):
        return (copies.sin() + copies**3).sum(-1)

    exact = ForwardMode().slopes(evaluate(ForwardMode(), 8, smooth).values_VP)
    errors = []
    for epsilon in (1e-2, 1e-3):
        estimator = kind(epsilon)
        errors.append((estimator.slopes(evaluate(estimator, 8, smooth).values_VP) - exact).norm().item())
    assert errors[0] / errors[1] == pytest.approx(10**order, rel=0.1)


@all_estimators
def test_forwards_are_counted_as_they_are_made(estimator):
    rows = []

    def loss_fn(copies):
        rows.append(len(copies))
        return quadratic(copies)

    evaluate(estimator, 7, loss_fn)
    # of a forward-mode row every product is taken twice
    cost = 2 if isinstance(estimator, ForwardMode) else 1
    assert cost * sum(rows) == estimator.num_forwards(7)


@all_estimators
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 50])
def test_chunks_give_the_same_values_and_leave_theta_alone(estimator, chunk_size):
    theta = THETA.clone()
    evaluations = evaluate(estimator, 7, theta=theta, chunk_size=chunk_size)
    assert torch.equal(theta, THETA)
    assert torch.equal(evaluations.values_VP, evaluate(estimator, 7, chunk_size=8).values_VP)
    assert evaluations.chunk_size == chunk_size


@all_estimators
def test_points_in_shares_are_those_in_one_process(estimator):
    whole = evaluate(estimator, 5).values_VP
    total = torch.zeros_like(whole)
    for rank in range(3):
        points = range(rank, estimator.num_points(5), 3)
        share = estimator.evaluate(quadratic, THETA, directions_of_step(THETA, 5, 2), points, 1)
        total[:, list(share.points)] = share.values_VP
    assert torch.equal(total, whole)


@all_estimators
def test_a_rank_without_points(estimator):
    nothing = estimator.evaluate(quadratic, THETA, directions_of_step(THETA, 0, 0), [], 4)
    assert nothing.values_VP.shape == (estimator.num_values, 0)


def test_mean_over_many_directions_approaches_the_gradient():
    loss_fn, theta, true = adapted_net()

    def error(num_steps):
        estimate = torch.zeros_like(true)
        for step in range(num_steps):
            directions = directions_of_step(theta, 0, step)
            estimator = TwoSided(1e-5)
            evaluations = estimator.evaluate(loss_fn, theta, directions, range(1024), 512)
            slopes = projected_gradients(estimator.slopes(evaluations.values_VP))
            estimate += mean_gradient(theta, slopes, directions) / num_steps
        return ((estimate - true).norm() / true.norm()).item()

    # the error of a mean over N Gaussian directions is sqrt((d + 1) / N) of the gradient
    few, many = error(1), error(24)
    assert few == pytest.approx(math.sqrt((len(true) + 1) / 512), rel=0.4)
    assert many == pytest.approx(math.sqrt((len(true) + 1) / (24 * 512)), rel=0.4)
    assert many < 0.15


def test_non_finite_queries_are_dropped_and_counted():
    values = torch.tensor([[1.0, 0.0, math.nan, 1.0, 3.0, math.inf, 1.0, 2.0]])
    slopes = projected_gradients(TwoSided(0.5).slopes(values))
    assert slopes.query_ids == (0, 3)
    assert slopes.values == (1.0, -1.0)
    assert slopes.num_dropped == 2
    assert slopes.std == pytest.approx(math.sqrt(2))
    assert TwoSided(0.5).loss(values) == pytest.approx(1.0)
    # two infinities of one sign: their difference is not a number
    assert projected_gradients(TwoSided(0.5).slopes(torch.full((1, 2), math.inf))).num_dropped == 1
    assert math.isnan(TwoSided(0.5).loss(torch.full((1, 2), math.inf)))


def test_a_base_that_is_not_finite_drops_all():
    for base in (math.nan, math.inf):
        slopes = projected_gradients(OneSided(0.5).slopes(torch.tensor([[base, 1.0, math.inf]])))
        assert (slopes.values, slopes.num_dropped) == ((), 2)
    slopes = projected_gradients(OneSided(0.5).slopes(torch.tensor([[1.0, 2.0, math.inf]])))
    assert (slopes.query_ids, slopes.values, slopes.num_dropped) == ((0,), (2.0,), 1)


def test_a_derivative_of_a_loss_that_is_not_finite_does_not_count():
    values = torch.tensor([[math.inf, 1.0, 1.0], [0.0, math.nan, 2.0]])
    slopes = projected_gradients(ForwardMode().slopes(values))
    assert (slopes.query_ids, slopes.num_dropped) == ((2,), 2)
    assert ForwardMode().loss(values) == 1.0


def out_of_memory(kind):
    if kind == "cuda":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # both sides of 9 queries, then 9, then 4 at a time
        (TwoSided(1e-3), [18, 9, 4, 4, 4, 4, 2]),
        # and their base: 10 points, then 5, then 2
        (OneSided(1e-3), [10, 5, 2, 2, 2, 2, 2]),
        (ForwardMode(), [9, 4, 4, 1]),
    ],
    ids=IDS,
)
def test_chunk_is_halved_until_it_fits(kind, estimator, expected):
    calls = []

    def loss_fn(copies):
        calls.append(len(copies))
        if len(copies) > 4:
            raise out_of_memory(kind)
        return quadratic(copies)

    evaluations = evaluate(estimator, 9, loss_fn, chunk_size=64)
    assert calls == expected
    assert evaluations.chunk_size == (2 if isinstance(estimator, OneSided) else 4)
    assert torch.equal(evaluations.values_VP, evaluate(estimator, 9).values_VP)


@all_estimators
def test_out_of_memory_with_one_query_says_what_to_do(estimator):
    def loss_fn(copies):
        raise out_of_memory("cuda")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        evaluate(estimator, 4, loss_fn)
    assert "batch size" in caught.value.__notes__[0]


@all_estimators
def test_other_errors_pass(estimator):
    def loss_fn(copies):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        evaluate(estimator, 4, loss_fn)


def test_what_has_no_forward_mode_derivative_is_refused_by_name():
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)

    def loss_fn(copies):
        q = x * copies[:, None, None, :4]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0].sum((1, 2, 3))

    with pytest.raises(ValueError, match=r"forward-mode derivatives.*flash_attention.*another estimator"):
        evaluate(ForwardMode(), 1, loss_fn)


def test_forward_mode_goes_through_attention():
    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss_fn(copies):
        q = x * copies[:, None, None, :4]
        k, v = x.expand_as(q), x * copies[:, None, None, 4:8]
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum((1, 2, 3))

    theta = THETA.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_fn(theta[None]).sum(), theta)
    slopes = ForwardMode().slopes(evaluate(ForwardMode(), 3, loss_fn).values_VP)
    torch.testing.assert_close(slopes, torch.stack([direction(5, 2, q, 9).double() @ gradient for q in range(3)]))


@pytest.mark.parametrize("epsilon", [0.0, -1.0])
@pytest.mark.parametrize("kind", [TwoSided, OneSided])
def test_bad_epsilon(kind, epsilon):
    with pytest.raises(ValueError, match="`epsilon`"):
        kind(epsilon)


@pytest.mark.parametrize("kind", [TwoSided, OneSided, ForwardMode])
@pytest.mark.parametrize(("name", "value"), [("directions", "uniform"), ("aggregation", "median")])
def test_unknown_directions_and_aggregations(kind, name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        kind(**{name: value})


@pytest.mark.parametrize("kind", [TwoSided, OneSided])
def test_epsilon_fits_the_precision_unless_it_is_given(kind):
    estimator = kind(directions="rademacher", aggregation="fzoo")
    with pytest.raises(ValueError, match="`epsilon` to be set"):
        evaluate(estimator, 2)
    for dtype, epsilon in DEFAULT_EPSILON.items():
        chosen = estimator.with_default_epsilon(dtype)
        assert (chosen.epsilon, chosen.directions, chosen.aggregation) == (epsilon, "rademacher", "fzoo")
        assert kind(0.5).with_default_epsilon(dtype).epsilon == 0.5
        assert estimator.precision_warning(dtype) is None
    assert "epsilon=0.001 is small" in kind(1e-3).precision_warning(torch.bfloat16)
    assert kind(1e-5).precision_warning(torch.float32) is None


def test_forward_mode_has_no_epsilon():
    with pytest.raises(TypeError, match="epsilon"):
        ForwardMode(epsilon=1e-3)
    assert ForwardMode().with_default_epsilon(torch.bfloat16).epsilon is None


@all_estimators
def test_bad_chunk_size(estimator):
    with pytest.raises(ValueError, match="`chunk_size`"):
        evaluate(estimator, 1, chunk_size=0)
