import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from wandazeta.adapters import Site, TensorTrainVector, TTLinear, inject_adapters
from wandazeta.adapters.tensor_train import dense_matrix


class Block(nn.Module):
    """Two widths, so that the vector stacks two groups."""

    def __init__(self, width=12, inner=20):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block() for _ in range(3)).to(dtype)
        sites = ["before:up", "after:up", "before:down", "after:down"]
        self.vector = inject_adapters(
            self, blocks=self.blocks, sites=sites, rank=3, bottleneck=8, identity_start=False, dtype=dtype
        )
        with torch.no_grad():
            self.vector.theta.add_(0.1 * torch.randn(self.vector.num_parameters, generator=gen(1), dtype=dtype))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def gen(seed):
    return torch.Generator().manual_seed(seed)


def by_hand(theta, holder, site, x):
    """One adapter from slices of the vector found by plain counting, through full matrices."""
    layout = holder.layout
    for group in layout.groups:
        if site not in group.sites:
            continue
        place = group.sites.index(site)
        dense = []
        for shape, slices in group.layers:
            *cores, bias = (theta[where].view(size)[place] for where, size in slices)
            dense.append((dense_matrix(cores).view(shape.in_features, shape.out_features), bias))
        (down, down_bias), (up, up_bias) = dense
        return x + torch.relu(x @ down + down_bias) @ up + up_bias
    raise AssertionError(site)


def test_adapt_equals_dense_matrices():
    vector = Model(torch.float64).vector
    for index, site in enumerate(vector.sites):
        x = torch.randn(2, 5, site.width, generator=gen(2), dtype=torch.float64)
        torch.testing.assert_close(vector.adapt(index, x), by_hand(vector.theta, vector, index, x))


def test_slices_cover_the_vector_once():
    vector = Model().vector
    covered = torch.zeros(vector.num_parameters)
    for group in vector.layout.groups:
        for _, slices in group.layers:
            for where, _ in slices:
                covered[where] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folded_equals_loop_equals_vmap(dtype):
    model = Model(dtype)
    x = torch.randn(4, 6, 12, generator=gen(3), dtype=dtype)
    theta_Pd = model.vector.theta + 0.3 * torch.randn(5, model.vector.num_parameters, generator=gen(4), dtype=dtype)
    with torch.no_grad():
        with model.vector.use(theta_Pd):
            folded = model(x.repeat(5, 1, 1)).view(5, *x.shape)
        mapped = vmap(lambda theta: functional_call(model, {"vector.theta": theta}, (x,)))(theta_Pd)
        loop = []
        for theta in theta_Pd:
            model.vector.theta.copy_(theta)
            loop.append(model(x))
    assert (folded - folded.roll(1, 0)).abs().min() > 0
    torch.testing.assert_close(folded, torch.stack(loop))
    torch.testing.assert_close(mapped, torch.stack(loop))


def test_use_restores_even_after_an_error():
    model = Model()
    x = torch.randn(2, 12, generator=gen(0))
    before = model(x)
    with pytest.raises(RuntimeError, match="on purpose"), model.vector.use(model.vector.theta.repeat(2, 1)):
        raise RuntimeError("on purpose")
    assert torch.equal(model(x), before)


def test_use_refuses_wrong_shapes():
    model = Model()
    with pytest.raises(ValueError, match="shape"), model.vector.use(model.vector.theta):
        pass
    with pytest.raises(ValueError, match="multiple of the 2"), model.vector.use(model.vector.theta.repeat(2, 1)):
        model(torch.randn(3, 12))


@pytest.mark.parametrize("shape", [(12,), (1, 12), (4, 1, 12), (1, 1, 12), (2, 3, 4, 12)])
def test_shapes_are_kept(shape):
    model = Model()
    assert model(torch.randn(shape)).shape == shape
    if len(shape) > 1:
        with model.vector.use(model.vector.theta.repeat(2, 1)):
            assert model(torch.randn(2 * shape[0], *shape[1:])).shape == (2 * shape[0], *shape[1:])


def test_plain_forward_sees_every_change_of_theta():
    model = Model()
    x = torch.randn(2, 12, generator=gen(0))
    with torch.no_grad():
        first = model(x)
        model.vector.theta.add_(0.1)
        second = model(x)
        assert not torch.equal(first, second)
        model.load_state_dict({**model.state_dict(), "vector.theta": model.vector.theta - 0.1})
        torch.testing.assert_close(model(x), first)
        model.vector.theta = model.vector.theta + 0.1
        assert torch.equal(model(x), second)
    with torch.inference_mode():
        assert torch.equal(model(x), second)
        model.vector.theta.sub_(0.1)
        torch.testing.assert_close(model(x), first)


def test_vector_made_or_moved_under_inference_mode():
    with torch.inference_mode():
        model = Model()
        assert not model.vector.theta.is_inference()
        x = torch.randn(2, 12)
        model.vector.theta.copy_(torch.zeros_like(model.vector.theta))
        assert torch.equal(model.vector.adapt(0, x), x)
        model.vector.theta = model.vector.theta + 0.1
        assert model.vector.theta.is_inference()
        first = model(x)
        model.vector.theta.add_(0.1)
        assert not torch.equal(model(x), first)


def test_matrices_are_merged_once_while_theta_stays(monkeypatch):
    model, calls = Model(), []
    merge = type(model.vector.layout).merge
    monkeypatch.setattr(type(model.vector.layout), "merge", lambda *args: calls.append(1) or merge(*args))
    with torch.no_grad():
        model(torch.randn(2, 12))
        model(torch.randn(2, 12))
        assert len(calls) == 1
        with model.vector.use(model.vector.theta.repeat(2, 1)):
            model(torch.randn(2, 12))
            model(torch.randn(2, 12))
        assert len(calls) == 2


def test_theta_can_be_trained_by_autograd_again_and_again():
    model = Model(torch.float64)
    x = torch.randn(2, 12, generator=gen(0), dtype=torch.float64)
    model.vector.theta.requires_grad_()
    grads = [torch.autograd.grad(model(x).sum(), model.vector.theta)[0] for _ in range(2)]
    assert torch.equal(*grads)
    direction = torch.randn(model.vector.num_parameters, generator=gen(9), dtype=torch.float64)
    with torch.no_grad(), model.vector.use(model.vector.theta + 1e-6 * torch.stack([direction, -direction])):
        plus, minus = model(x.repeat(2, 1)).view(2, -1).sum(1)
    torch.testing.assert_close(grads[0] @ direction, (plus - minus) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_theta_stays_fp32_in_a_16_bit_model(convert):
    model = Model()
    before = model.vector.theta.clone()
    convert(model)
    assert model.blocks[0].down.weight.dtype != torch.float32
    assert model.vector.theta.dtype == torch.float32
    assert torch.equal(model.vector.theta, before)
    x = torch.randn(2, 3, 12).to(model.blocks[0].down.weight.dtype)
    assert model(x).dtype == x.dtype
    assert "vector.theta" in model.state_dict()


def test_theta_follows_the_device():
    model = Model().to("meta", torch.bfloat16)
    assert model.vector.theta.device.type == "meta"
    assert model.vector.theta.dtype == torch.float32
    assert model.vector.decay_mask.device.type == "meta"


def test_arithmetic_is_fp32_under_autocast_and_in_bf16():
    vector = Model().vector
    x = torch.randn(4, 12, generator=gen(0)).bfloat16()
    expected = by_hand(vector.theta, vector, 0, x.float()).bfloat16()
    assert torch.equal(vector.adapt(0, x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vector.adapt(0, x), expected)


def test_state_dict_round_trip():
    model, other = Model(), Model()
    with torch.no_grad():
        other.vector.theta.zero_()
    assert [name for name in model.state_dict() if "theta" in name] == ["vector.theta"]
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 12, generator=gen(0))
    assert torch.equal(model(x), other(x))


def test_copies_are_independent():
    model = Model()
    x = torch.randn(2, 12, generator=gen(0))
    with torch.no_grad():
        before = model(x)
        clone = copy.deepcopy(model)
        clone.vector.theta.add_(1.0)
        assert torch.equal(model(x), before)
        assert not torch.equal(clone(x), before)


def test_decay_spares_the_biases():
    vector = TensorTrainVector([Site(0, "mlp", "after", 6), Site(0, "mlp2", "after", 10)], rank=2, bottleneck=4)
    assert (~vector.decay_mask).sum() == 6 + 10 + 2 * 4
    assert vector.decay_mask.shape == vector.theta.shape


def test_start_values():
    sites = [Site(0, "mlp", "after", 64)] * 200
    plain = TensorTrainVector(sites, identity_start=False, generator=gen(3))
    assert (plain.theta[~plain.decay_mask] == 0).all()
    # independent formula for the first core of `down`: 64 -> 64 in six cores of rank 5
    core = plain.theta[: 200 * 4 * 5]
    assert core.std().item() == pytest.approx((1 / 128) ** (1 / 12) / 5**0.5, rel=0.05)
    assert torch.equal(plain.theta, TensorTrainVector(sites, identity_start=False, generator=gen(3)).theta)
    assert not torch.equal(plain.theta, TensorTrainVector(sites, identity_start=False, generator=gen(4)).theta)
    state = torch.random.get_rng_state()
    identity = TensorTrainVector(sites)
    assert torch.equal(state, torch.random.get_rng_state())
    x = torch.randn(3, 64)
    assert torch.equal(identity.adapt(7, x), x)
    assert TTLinear(64, 64).shape == identity.layout.groups[0].layers[0][0]
