import pytest
import torch

from wandazeta.modules.zo import (
    ProjectedGradients,
    RAdaZOUpdate,
    SGDUpdate,
    direction,
    estimated_gradient,
    projected_gradients,
    two_sided,
)

NO_STATES = torch.zeros(0, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_estimate_and_sgd_equal_a_plain_reference(dtype):
    theta = torch.linspace(-1, 1, 11, dtype=dtype)
    grads = ProjectedGradients((0, 2, 5), (0.5, -2.0, 1.25), 1)
    mean = sum(g * direction(3, 9, q, 11).double() for q, g in zip(grads.query_ids, grads.values, strict=True)) / 3
    grad = estimated_gradient(theta, grads, 3, 9)
    torch.testing.assert_close(grad, mean.to(dtype))
    expected = theta.double() - 0.1 * mean
    SGDUpdate().step_(theta, grad, NO_STATES, 0, 0.1)
    torch.testing.assert_close(theta, expected.to(dtype))


def test_radazo_equals_a_plain_reference():
    theta, states = torch.linspace(-1, 1, 7, dtype=torch.float64), torch.zeros(2, 7, dtype=torch.float64)
    expected, mean, square = theta.clone(), 0.0, 0.0
    rule = RAdaZOUpdate(beta1=0.8, beta2=0.9, eps=1e-3)
    for step in range(5):
        grad = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        mean = 0.8 * mean + 0.2 * grad
        square = 0.9 * square + 0.1 * mean**2
        root = (square / (1 - 0.9 ** (step + 1))) ** 0.5
        expected = expected - 0.05 * (mean / (1 - 0.8 ** (step + 1))) / (root + 1e-3)
        rule.step_(theta, grad, states, step, 0.05)
        torch.testing.assert_close(theta, expected)
    torch.testing.assert_close(states, torch.stack([mean, square]))


@pytest.mark.parametrize(("name", "value"), [("beta1", 1.0), ("beta2", -0.1), ("eps", 0.0)])
def test_radazo_refuses_what_is_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        RAdaZOUpdate(**{name: value})


def test_no_finite_query_gives_no_gradient():
    assert estimated_gradient(torch.linspace(-1, 1, 5), ProjectedGradients((), (), 4), 0, 0) is None


def test_ranks_with_their_share_of_queries_equal_one_process():
    theta = torch.linspace(-1, 1, 50)

    def loss_fn(copies):
        return copies.square().sum(-1)

    whole = two_sided(loss_fn, theta, 1, 4, range(5), 1e-2, 1)
    # rank r evaluates the queries q = r mod 3, and the losses are put together
    shares = [two_sided(loss_fn, theta, 1, 4, range(rank, 5, 3), 1e-2, 1) for rank in range(3)]
    plus, minus = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for share in shares:
        ids = list(share.query_ids)
        plus[ids], minus[ids] = share.plus, share.minus
    assert torch.equal(plus, whole.plus)
    assert torch.equal(minus, whole.minus)


@pytest.mark.parametrize(("rule", "lr"), [(SGDUpdate(), 0.02), (RAdaZOUpdate(), 0.02)], ids=["sgd", "radazo"])
def test_steps_go_downhill(rule, lr):
    theta, states = torch.linspace(-1, 1, 20), torch.zeros(rule.num_states, 20)
    start = theta.square().sum()
    for step in range(200):
        losses = two_sided(lambda copies: copies.square().sum(-1), theta, 0, step, range(4), 1e-3, 4)
        grad = estimated_gradient(theta, projected_gradients(losses, 1e-3), 0, step)
        rule.step_(theta, grad, states, step, lr)
    assert theta.square().sum() < 0.05 * start
