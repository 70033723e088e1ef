import pytest
import torch

from wandazeta.zeroth_order import (
    AGGREGATIONS,
    ForwardMode,
    OneSided,
    RAdaZOUpdate,
    SGDUpdate,
    TwoSided,
    directions_of_step,
    projected_gradients,
)


def test_sgd_equals_torchs():
    theta = torch.linspace(-1, 1, 11)
    parameter = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for step in range(3):
        parameter.grad = torch.randn(11, generator=torch.Generator().manual_seed(step))
        SGDUpdate().step_(theta, parameter.grad.clone(), torch.zeros(0, 11), step, 0.1)
        optimizer.step()
    assert torch.equal(theta, parameter.data)


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


@pytest.mark.parametrize("kind", [SGDUpdate, RAdaZOUpdate])
def test_weight_decay_is_not_negative(kind):
    with pytest.raises(ValueError, match="`weight_decay` to be at least 0"):
        kind(weight_decay=-1.0)


@pytest.mark.parametrize(("name", "value"), [("beta1", 1.0), ("beta2", -0.1), ("eps", 0.0)])
def test_radazo_refuses_what_is_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        RAdaZOUpdate(**{name: value})


@pytest.mark.parametrize(("rule", "lr"), [(SGDUpdate(), 0.02), (RAdaZOUpdate(), 0.02)], ids=["sgd", "radazo"])
@pytest.mark.parametrize(
    ("estimator", "aggregation"),
    [(TwoSided(1e-3), "mean"), (OneSided(1e-3), "align"), (ForwardMode(), "fzoo")],
    ids=["two_sided", "one_sided", "forward_mode"],
)
def test_steps_go_downhill(rule, lr, estimator, aggregation):
    theta, states = torch.linspace(-1, 1, 20), torch.zeros(rule.num_states, 20)
    start = theta.square().sum()
    for step in range(200):
        directions = directions_of_step(theta, 0, step)
        points = range(estimator.num_points(4))
        values = estimator.evaluate(lambda copies: copies.square().sum(-1), theta, directions, points, 4).values_VP
        grad = AGGREGATIONS[aggregation](theta, projected_gradients(estimator.slopes(values)), directions)
        rule.step_(theta, grad, states, step, lr)
    assert theta.square().sum() < 0.1 * start
