"""The regional optimisation that tunes itself."""

import statistics

import pytest
import torch
from helpers.architectures import build, token_batches
from helpers.prune_model import Memory, equal, prune, tiny
from torch import nn

from wandazeta.pruning import PruneOptions, SparsityPattern, TunedRO, prune_model
from wandazeta.pruning.method.tuning import relative_error, split_held_out, token_weights
from wandazeta.pruning.pruner import PruningInterrupted
from wandazeta.pruning.records import PruneReport


def error_by_hand(output, target, mask):
    """The error in float64, token by token."""
    sizes = [sum(float(x) ** 2 for x in token) / len(token) for token in target]
    typical = sorted(size for size, kept in zip(sizes, mask, strict=True) if kept)[(sum(mask) - 1) // 2]
    total = 0.0
    for token, wanted, size, kept in zip(output, target, sizes, mask, strict=True):
        if kept:
            square = sum((float(a) - float(b)) ** 2 for a, b in zip(token, wanted, strict=True)) / len(wanted)
            total += square / (size + 0.1 * typical)
    return total / sum(mask)


@pytest.mark.parametrize("padding", [0, 3])
def test_error_is_relative_to_the_size_of_each_token(padding):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, 7, 5, generator=generator) * torch.tensor([100.0, 1, 2, 0.1, 1, 3, 1])[:, None]
    output = target + torch.randn(1, 7, 5, generator=generator)
    mask = torch.arange(7) < 7 - padding
    given = mask[None] if padding else None
    found = relative_error(output, target, token_weights(target, given))
    wanted = error_by_hand(output[0].tolist(), target[0].tolist(), mask.tolist())
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_padding_has_no_influence_even_if_it_is_large():
    target, mask = torch.randn(1, 6, 4), torch.tensor([[True, True, True, True, False, False]])
    other = target.clone()
    other[:, 4:] = 1e4
    assert torch.equal(token_weights(target, mask), token_weights(other, mask))


def test_an_output_of_zeros_has_finite_weights():
    weights = token_weights(torch.zeros(1, 4, 3), None)
    assert weights.isfinite().all()
    assert float(relative_error(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), weights)) == 0.0


@pytest.mark.parametrize(("num_samples", "num_held_out"), [(1, 1), (2, 1), (7, 1), (8, 1), (15, 1), (16, 2), (64, 8)])
def test_one_sample_in_eight_is_held_out(num_samples, num_held_out):
    train, held_out = split_held_out(num_samples)
    assert len(held_out) == num_held_out
    assert sorted({*train, *held_out}) == list(range(num_samples))
    assert num_samples == 1 or not {*train} & {*held_out}


@pytest.mark.parametrize(("num_samples", "rounds"), [(1, 4), (32, 4), (64, 4), (128, 2), (256, 1), (1000, 1)])
def test_more_text_takes_fewer_rounds(num_samples, rounds):
    assert TunedRO().for_samples(num_samples).rounds == rounds
    assert TunedRO(3).for_samples(num_samples).rounds == 3


def test_rounds_are_checked():
    with pytest.raises(ValueError, match="`rounds`"):
        TunedRO(0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_no_block_ends_above_its_start(name, pattern):
    _, _, start = tiny(name, method="sparsegpt", sparsity_pattern=pattern)
    _, blocks, report = tiny(name, method="tuned-ro", sparsity_pattern=pattern)
    for block in report.blocks:
        assert block.sparsity == pytest.approx(0.5)
        assert block.tuning.error_after <= block.tuning.error_before
        assert block.tuning.rounds > 0 or block.tuning.error_after == block.tuning.error_before
    # the first block, whose inputs are the same
    assert report.blocks[0].loss_before == pytest.approx(start.blocks[0].loss_after)
    assert report.blocks[0].tuning.error_after < report.blocks[0].tuning.error_before
    if pattern == "2:4":
        for block in blocks:
            for weight in (p for p in block.parameters() if p.ndim == 2):
                groups = weight.t() if name == "gpt2" else weight
                assert ((groups.reshape(-1, 4) == 0).sum(-1) >= 2).all()


def scaled(factor):
    """A tiny model and the same function with weights and inputs of the blocks' matrices at other scales."""
    model = nn.Module()
    generator = torch.Generator().manual_seed(0)
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    for block in model.layers:
        block[0].weight.data *= factor
        block[0].bias.data *= factor
        block[2].weight.data /= factor
    model.forward = lambda x: [x := block(x) for block in model.layers][-1]
    return model


def test_the_scale_of_weights_does_not_matter():
    rows = list(torch.randn(16, 1, 6, 8, generator=torch.Generator().manual_seed(1)))
    options = PruneOptions(TunedRO(2), SparsityPattern("2:4"))
    reports = []
    # powers of two, so that products round alike
    for factor in (1.0, 2.0**-6, 2.0**6):
        model = scaled(factor)
        reports.append(prune_model(model, model.forward, rows, options, block_name="layers"))
    for report in reports[1:]:
        for block, wanted in zip(report.blocks, reports[0].blocks, strict=True):
            assert block.tuning.rate == wanted.tuning.rate
            # the epsilon of AdamW is not relative
            assert block.tuning.error_after == pytest.approx(wanted.tuning.error_after, rel=1e-3)


def deep(run=None):
    """A tiny LLaMA with more blocks than search the rate, pruned."""
    model, blocks = build("llama")
    model.config.num_hidden_layers = 5
    torch.manual_seed(0)
    model = type(model)(model.config).eval()
    for block in model.get_submodule(blocks):
        for weight in (p for p in block.parameters() if p.ndim == 2):
            weight.data.mul_(8)
    run = {"block_name": blocks, **(run or {})}
    return model, prune(model, token_batches(64), method="tuned-ro", rounds=2, run=run)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_resumed_pruning_has_the_same_bits_and_rates(stop):
    undisturbed, wanted = deep()
    progress, asked = Memory(), []

    def should_stop():
        asked.append(1)
        return len(asked) == stop + 1

    with pytest.raises(PruningInterrupted):
        deep({"progress": progress, "should_stop": should_stop})
    resumed, report = deep({"progress": progress})
    assert equal(resumed, undisturbed)
    assert [block.tuning for block in report.blocks] == [block.tuning for block in wanted.blocks]


def test_later_blocks_take_the_median_rate_of_the_first_three():
    _, report = deep()
    assert all(block.tuning.rounds for block in report.blocks)
    first, later = [[block.tuning.rate for block in part] for part in (report.blocks[:3], report.blocks[3:])]
    assert len(set(first)) > 1
    assert set(later) == {statistics.median(first)}


def test_the_record_survives_json():
    _, _, report = tiny(method="tuned-ro")
    assert PruneReport.from_dict(report.to_dict()) == report
    assert report.blocks[0].tuning.num_held_out >= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_trained_with_float32_masters(dtype):
    model, blocks = build("llama")
    report = prune(model.to(dtype), method="tuned-ro", rounds=4, run={"block_name": blocks})
    assert all(block.tuning.error_after <= block.tuning.error_before for block in report.blocks)
    assert report.blocks[0].tuning.error_after < report.blocks[0].tuning.error_before


class Cliff(nn.Module):
    """A linear layer whose output is infinite once its weights have moved by two per cent."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.start = None

    def forward(self, x):
        y, kept = self.linear(x), self.linear.weight.detach()
        if self.start is None and bool((kept == 0).any()):
            self.start = kept.clone()
        moved = self.start is not None and float((kept - self.start).norm() / self.start.norm()) > 0.02
        return y * float("inf") if moved else y


def test_a_rate_that_diverges_is_not_chosen():
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([Cliff()])
    model.forward = lambda x: model.layers[0](x)
    rows = list(torch.randn(64, 1, 6, 8))
    report = prune_model(model, model.forward, rows, PruneOptions("tuned-ro", "2:4"), block_name="layers")
    tuning = report.blocks[0].tuning
    assert tuning.rate < 0.01
    assert tuning.error_after <= tuning.error_before
    assert model.layers[0](rows[0]).isfinite().all()
