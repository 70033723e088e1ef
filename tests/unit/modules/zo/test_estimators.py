import math

import pytest
import torch
from torch import nn

from wandazeta.modules.adapters import inject_adapters
from wandazeta.modules.zo import QueryLosses, direction, projected_gradients, two_sided


def quadratic(theta_Pd):
    return (theta_Pd**2).sum(-1)


def test_losses_are_those_of_the_perturbed_vectors():
    theta = torch.linspace(-1, 1, 9, dtype=torch.float64)
    losses = two_sided(quadratic, theta, 5, 2, [0, 3, 1], 1e-2, 2)
    assert losses.query_ids == (0, 3, 1)
    for row, query in enumerate(losses.query_ids):
        z = direction(5, 2, query, 9).double()
        assert losses.plus[row].item() == pytest.approx(quadratic(theta + 1e-2 * z).item(), rel=1e-12)
        assert losses.minus[row].item() == pytest.approx(quadratic(theta - 1e-2 * z).item(), rel=1e-12)
        # the two-sided slope of a quadratic is exact
        slope = projected_gradients(losses, 1e-2).values[row]
        assert slope == pytest.approx((2 * theta @ z).item(), rel=1e-9)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 50])
def test_chunks_give_the_same_losses_and_leave_theta_alone(chunk_size):
    theta = torch.linspace(-1, 1, 9)
    before, rows = theta.clone(), []

    def loss_fn(copies):
        rows.append(len(copies))
        return quadratic(copies)

    losses = two_sided(loss_fn, theta, 0, 0, range(7), 1e-3, chunk_size)
    whole = two_sided(quadratic, theta, 0, 0, range(7), 1e-3, 7)
    assert torch.equal(theta, before)
    assert torch.equal(losses.plus, whole.plus)
    assert torch.equal(losses.minus, whole.minus)
    assert max(rows) == 2 * min(chunk_size, 7)
    assert sum(rows) == 14


def test_a_rank_without_queries():
    losses = two_sided(quadratic, torch.ones(3), 0, 0, [], 1e-3, 4)
    assert losses.plus.shape == losses.minus.shape == (0,)
    assert projected_gradients(losses, 1e-3).values == ()
    assert math.isnan(losses.mean)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(2))
        self.double()

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_mean_over_many_directions_approaches_the_gradient():
    model = Net()
    bank = inject_adapters(model, blocks=model.blocks, rank=2, bottleneck=4, identity_start=False, dtype=torch.float64)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss_fn(theta_Pd):
        with bank.use(theta_Pd):
            y = model(x.repeat(len(theta_Pd), 1)).view(len(theta_Pd), *x.shape)
        return (y - target).square().mean((1, 2))

    theta = bank.theta.clone().requires_grad_()
    (true,) = torch.autograd.grad(loss_fn(theta[None]).sum(), theta)

    def error(num_steps):
        estimate = torch.zeros_like(true)
        for step in range(num_steps):
            slopes = projected_gradients(two_sided(loss_fn, bank.theta, 0, step, range(512), 1e-5, 256), 1e-5)
            z = torch.stack([direction(0, step, q, len(true)).double() for q in slopes.query_ids])
            estimate += torch.tensor(slopes.values, dtype=torch.float64) @ z / 512 / num_steps
        return ((estimate - true).norm() / true.norm()).item()

    # the error of a mean over N Gaussian directions is sqrt((d + 1) / N) of the gradient
    few, many = error(1), error(24)
    assert few == pytest.approx(math.sqrt((len(true) + 1) / 512), rel=0.4)
    assert many == pytest.approx(math.sqrt((len(true) + 1) / (24 * 512)), rel=0.4)
    assert many < 0.15


def test_non_finite_queries_are_dropped_and_counted():
    losses = QueryLosses(
        torch.tensor([1.0, math.nan, 3.0, 1.0]), torch.tensor([0.0, 1.0, math.inf, 2.0]), (0, 1, 2, 3), 4
    )
    slopes = projected_gradients(losses, 0.5)
    assert slopes.query_ids == (0, 3)
    assert slopes.values == (1.0, -1.0)
    assert slopes.num_dropped == 2
    assert slopes.std == pytest.approx(math.sqrt(2))
    assert losses.mean == pytest.approx(1.0)
    # two infinities of one sign: their difference is not a number
    both = QueryLosses(torch.tensor([math.inf]), torch.tensor([math.inf]), (0,), 1)
    assert projected_gradients(both, 0.5).num_dropped == 1


def out_of_memory(kind):
    if kind == "cuda":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_chunk_is_halved_until_it_fits(kind):
    calls = []

    def loss_fn(copies):
        calls.append(len(copies))
        if len(copies) > 4:
            raise out_of_memory(kind)
        return quadratic(copies)

    theta = torch.linspace(-1, 1, 9)
    losses = two_sided(loss_fn, theta, 0, 0, range(9), 1e-3, 64)
    assert losses.chunk_size == 2
    # 9 queries, then 4, then 2 at a time
    assert calls == [18, 8, 4, 4, 4, 4, 2]
    whole = two_sided(quadratic, theta, 0, 0, range(9), 1e-3, 9)
    assert torch.equal(losses.plus, whole.plus)
    assert torch.equal(losses.minus, whole.minus)


def test_out_of_memory_with_one_query_says_what_to_do():
    def loss_fn(copies):
        raise out_of_memory("cuda")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        two_sided(loss_fn, torch.ones(3), 0, 0, range(4), 1e-3, 4)
    assert "batch size" in caught.value.__notes__[0]


def test_other_errors_pass():
    def loss_fn(copies):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        two_sided(loss_fn, torch.ones(3), 0, 0, range(4), 1e-3, 4)


@pytest.mark.parametrize(("epsilon", "chunk_size"), [(0.0, 1), (-1.0, 1), (1e-3, 0)])
def test_bad_arguments(epsilon, chunk_size):
    with pytest.raises(ValueError, match="Expected argument"):
        two_sided(quadratic, torch.ones(3), 0, 0, [0], epsilon, chunk_size)
