import pytest
import torch
from torch import nn

from wandazeta.models.experts import ExpertLayer
from wandazeta.pruning.method import statistics
from wandazeta.pruning.method.statistics import InputStatistics


def measure(layer, samples, masks):
    norms = InputStatistics({"layer": layer})
    with norms.collect(), torch.no_grad():
        for sample, mask in zip(samples, masks, strict=True):
            with norms.sample(mask):
                layer(sample)
    return norms


def test_norm_is_the_mean_over_samples_of_the_squared_norm():
    samples = [torch.randn(1, length, 3) for length in (4, 7)]
    norms = measure(nn.Linear(3, 2), samples, [None, None])
    wanted = torch.stack([s[0].norm(dim=0) ** 2 for s in samples]).mean(0).sqrt()
    torch.testing.assert_close(norms.norm("layer"), wanted)


def test_padded_positions_do_not_count():
    sample, garbage = torch.randn(1, 4, 3), torch.full((1, 2, 3), 1e3)
    mask = torch.tensor([[True] * 4 + [False] * 2])
    layer = nn.Linear(3, 2)
    padded = measure(layer, [torch.cat([sample, garbage], 1)], [mask])
    assert torch.equal(padded.norm("layer"), measure(layer, [sample], [None]).norm("layer"))


def test_inputs_flattened_by_the_model_are_understood():
    sample, mask = torch.randn(6, 3), torch.tensor([[True] * 4 + [False] * 2])
    torch.testing.assert_close(measure(nn.Linear(3, 2), [sample], [mask]).norm("layer"), sample[:4].norm(dim=0))
    with pytest.raises(ValueError, match="6 positions at the input of `layer`"):
        measure(nn.Linear(3, 2), [torch.randn(2, 3)], [mask])


def test_layers_that_share_an_input_and_sixteen_bits():
    layers = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}).bfloat16()
    norms, x = InputStatistics(layers), torch.randn(1, 5, 3).bfloat16()
    with norms.collect():
        for _ in range(2):
            with norms.sample():
                layers["a"](x)
                layers["b"](x)
                layers["b"](2 * x)  # a layer may run twice
    assert norms.norm("a").dtype == torch.float32
    torch.testing.assert_close(norms.norm("a"), x.float()[0].norm(dim=0))
    torch.testing.assert_close(norms.norm("b"), x.float()[0].norm(dim=0) * 5**0.5)


def test_a_layer_that_never_ran_is_named_and_hooks_are_removed():
    layer = nn.Linear(3, 2)
    norms = InputStatistics({"layer": layer})
    with norms.collect():
        pass
    layer(torch.randn(1, 2, 3))
    with pytest.raises(ValueError, match="`layer` did not"):
        norms.norm("layer")


def test_gram_matrices_are_shared_by_layers_with_one_input():
    layers = nn.ModuleDict({name: nn.Linear(3, 2) for name in "abc"})
    statistics, samples = InputStatistics(layers, with_gram=True), [torch.randn(1, 5, 3) for _ in range(3)]
    mask = torch.tensor([[True, True, True, False, False]])
    with statistics.collect(), torch.no_grad():
        for x, m in zip(samples, (None, mask, None), strict=True):
            with statistics.sample(m):
                layers["a"](x)
                layers["b"](x)
                layers["c"](x + 1)
    rows = torch.cat([samples[0][0], samples[1][0, :3], samples[2][0]])
    (gram, names), (other, last) = statistics.gram_groups()
    assert (names, last) == (["a", "b"], ["c"])
    torch.testing.assert_close(gram, rows.t() @ rows)
    torch.testing.assert_close(other, (rows + 1).t() @ (rows + 1))


def test_a_batch_counts_as_its_samples():
    layer, x = nn.Linear(3, 2), torch.randn(4, 5, 3)
    together = InputStatistics({"layer": layer})
    with together.collect(), together.sample(num_samples=4):
        layer(x)
    torch.testing.assert_close(together.norm("layer"), measure(layer, list(x.split(1)), [None] * 4).norm("layer"))


def test_an_expert_counts_its_own_tokens_and_shares_nothing_with_another():
    experts = {name: ExpertLayer(torch.randn(2, 3), None, False) for name in ("a", "b", "padded", "never")}
    x, mask = torch.randn(6, 3), torch.tensor([[True] * 4 + [False] * 2])
    statistics = InputStatistics(experts, with_gram=True)
    with statistics.collect(), torch.no_grad(), statistics.sample(mask):
        for name, tokens in {"a": [0, 2, 5], "b": [0, 2], "padded": [4, 5]}.items():
            experts[name](x[tokens], torch.tensor(tokens), 6)
    assert [statistics.num_tokens(name) for name in experts] == [2, 2, 0, 0]
    torch.testing.assert_close(statistics.norm("a"), x[[0, 2]].norm(dim=0))
    # although their inputs are the same
    (gram, first), (other, second) = statistics.gram_groups()
    assert (first, second) == (["a"], ["b"])
    assert torch.equal(gram, other)
    torch.testing.assert_close(gram, x[[0, 2]].t() @ x[[0, 2]])
    with (
        pytest.raises(ValueError, match="Expected 6 positions at the input of `a`, but got 5"),
        statistics.collect(),
        statistics.sample(mask),
    ):
        experts["a"](x[:1], torch.tensor([0]), 5)


class Counted(nn.Module):
    """Two layers; the second one's runs are counted."""

    def __init__(self, twice=False):
        super().__init__()
        self.a, self.b, self.twice, self.num_finished = nn.Linear(3, 3), nn.Linear(3, 3), twice, 0

    def forward(self, x, swap=False):
        first, last = (self.b, self.a) if swap else (self.a, self.b)
        x = last(first(x))
        if self.twice:
            x = last(x)
        self.num_finished += 1
        return x


def sums_of(block, inputs, may_stop, **options):
    statistics = InputStatistics({"a": block.a, "b": block.b}, with_gram=True)
    with statistics.collect(), torch.no_grad():
        for x in inputs:
            with statistics.sample(None, len(x), x.shape, may_stop):
                block(x, **options)
    return [statistics.norm(name) for name in "ab"] + [gram for gram, _ in statistics.gram_groups()]


def test_a_forward_ends_once_all_inputs_are_seen_and_the_statistics_are_the_same():
    inputs = [torch.randn(2, 5, 3) for _ in range(3)] + [torch.randn(1, 5, 3)]
    block = Counted()
    whole = sums_of(block, inputs, may_stop=False)
    assert block.num_finished == 4
    early = sums_of(block, inputs, may_stop=True)
    assert block.num_finished == 4 + 2  # the first of either shape shows which layer is the last
    assert all(torch.equal(x, y) for x, y in zip(whole, early, strict=True))


def test_a_forward_does_not_end_early_where_a_layer_runs_twice():
    inputs, block = [torch.randn(1, 5, 3) for _ in range(3)], Counted(twice=True)
    whole, early = sums_of(block, inputs, may_stop=False), sums_of(block, inputs, may_stop=True)
    assert block.num_finished == 6
    assert all(torch.equal(x, y) for x, y in zip(whole, early, strict=True))


def test_a_forward_does_not_end_early_when_the_last_layer_comes_first():
    block, x = Counted(), torch.randn(1, 5, 3)
    statistics = InputStatistics({"a": block.a, "b": block.b})
    with statistics.collect(), torch.no_grad():
        for swap in (False, True, False):
            with statistics.sample(None, 1, x.shape, may_stop=True):
                block(x, swap=swap)
    # the second one shows that the order changes, and the third follows it: both run whole
    assert block.num_finished == 3
    assert statistics.num_samples == 3


def test_other_errors_are_not_swallowed():
    statistics = InputStatistics({"layer": nn.Linear(3, 2)})
    with pytest.raises(RuntimeError, match="of the block"), statistics.sample(shape=torch.Size([1]), may_stop=True):
        raise RuntimeError("of the block")
    assert statistics.num_samples == 0


def test_autocast_of_the_block_does_not_reach_the_statistics():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 2), torch.randn(1, 50, 64)
    statistics = InputStatistics({"layer": layer}, with_gram=True)
    with statistics.collect(), statistics.sample(), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    ((gram, _),) = statistics.gram_groups()
    assert torch.equal(gram, x[0].t() @ x[0])
    torch.testing.assert_close(statistics.norm("layer"), x[0].norm(dim=0))


def test_small_terms_are_not_lost_in_large_sums():
    layer = nn.Linear(1, 1)
    samples = [torch.full((1, 1, 1), value) for value in (4096.0, *[1.0] * 4)]
    # 2²⁴ + 1 is no float32
    assert measure(layer, samples, [None] * 5)._sums["layer"].item() == 2**24 + 4


@pytest.mark.parametrize("squares_at_once", [1, 12, 10**6])
def test_sums_in_pieces_are_the_sums(squares_at_once, monkeypatch):
    monkeypatch.setattr(statistics, "SQUARES_AT_ONCE", squares_at_once)
    samples = [torch.randn(1, length, 3) for length in (5, 11)]
    norms = measure(nn.Linear(3, 2), samples, [None, None])
    wanted = torch.cat(samples, 1)[0].double().square().sum(0) / len(samples)
    torch.testing.assert_close(norms.norm("layer").double(), wanted.sqrt())


@pytest.mark.parametrize("tile", [1, 2, 3, 8])
def test_gram_matrices_in_tiles_are_the_whole_ones(tile, monkeypatch):
    monkeypatch.setattr(statistics, "GRAM_TILE", tile)
    sample, layer = torch.randn(1, 9, 5), nn.Linear(5, 2)
    sums = InputStatistics({"layer": layer}, with_gram=True)
    with sums.collect(), torch.no_grad(), sums.sample(None):
        layer(sample)
    ((gram, _),) = sums.gram_groups()
    torch.testing.assert_close(gram, sample[0].t() @ sample[0])
    assert torch.equal(gram, gram.t())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gram_matrices_of_a_gpu_are_as_exact_as_float32(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(64, 2, device="cuda", dtype=dtype)
    x = torch.randn(1, 3000, 64, device="cuda", dtype=dtype)
    sums = InputStatistics({"layer": layer}, with_gram=True)
    with sums.collect(), torch.no_grad(), sums.sample(None):
        layer(x)
    ((gram, _),) = sums.gram_groups()
    expected = x[0].double().t() @ x[0].double()
    assert gram.dtype == torch.float32
    assert (gram - expected).norm() < 1e-5 * expected.norm()


def test_a_layer_may_be_called_by_keyword():
    layer, x = nn.Linear(4, 4), torch.randn(1, 3, 4)
    found = []
    for call in (lambda: layer(x), lambda: layer(input=x)):
        statistics = InputStatistics({"weight": layer})
        statistics.reset()
        with statistics.collect(), statistics.sample():
            call()
        found.append(statistics.norm("weight"))
    assert torch.equal(*found)
