"""What goes through the blocks: samples, padding, and the states that one block hands to the next."""

import copy

import pytest
import torch
from helpers.architectures import build, pad, token_batches
from helpers.prune_model import BATCHES, equal, tiny
from helpers.prune_options import make_options
from torch import nn

from wandazeta.pruning import prune_model, samples
from wandazeta.pruning.method.masks import make_mask
from wandazeta.pruning.method.statistics import InputStatistics
from wandazeta.pruning.options import PruneOptions


def test_optimisation_lowers_the_loss_of_every_block():
    _, _, report = tiny(rounds=6, samples_per_round=8)
    for block in report.blocks:
        assert block.loss_after < block.loss_before


@pytest.mark.parametrize("method", ["wanda++", "tuned-ro"])
def test_the_pruned_block_feeds_the_next_and_the_target_is_that_of_the_method(method):
    """The reported losses, recomputed with forwards of the pruned and of the dense model."""
    model, blocks, report = tiny(method=method)
    dense, _ = build("llama")

    def states(which):
        inputs, outputs = {}, {}

        def record(block, args, output):
            inputs.setdefault(places[block], []).append(args[0])
            outputs.setdefault(places[block], []).append(output)

        places = {block: i for i, block in enumerate(which.model.layers)}
        handles = [block.register_forward_hook(record) for block in places]
        with torch.no_grad():
            for batch in BATCHES:
                which(**batch)
        for handle in handles:
            handle.remove()
        return inputs, outputs

    inputs, outputs = states(model)
    wanted = states(dense)[1]
    if method == "wanda++":
        mixed = copy.deepcopy(model)
        for i in range(len(blocks)):  # dense blocks on the pruned model's inputs
            mixed.model.layers = copy.deepcopy(model.model.layers)
            mixed.model.layers[i] = copy.deepcopy(dense.model.layers[i])
            wanted[i] = states(mixed)[1][i]
    for i, record in enumerate(report.blocks):
        losses = [(a - b).pow(2).mean() for a, b in zip(outputs[i], wanted[i], strict=True)]
        assert record.loss_after == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert not torch.equal(inputs[1][0], states(dense)[0][1][0])


@pytest.mark.parametrize("method", ["wanda++", "tuned-ro"])
@pytest.mark.parametrize("name", ["llama", "bert", "opt"])
def test_padded_positions_change_nothing(name, method):
    """Right padding that no real position attends to; garbage tokens there must not count anywhere."""
    batches = [pad(batch, 5) for batch in BATCHES]
    other = copy.deepcopy(batches)
    for batch in other:
        batch["input_ids"][:, -5:] = torch.randint(3, 32, (1, 5), generator=torch.Generator().manual_seed(7))
    options = {"method": method, "alpha": 30.0, "token_mask": lambda batch: batch["attention_mask"].bool()}
    assert equal(tiny(name, batches=batches, **options)[0], tiny(name, batches=other, **options)[0])
    options.pop("token_mask")
    assert not equal(tiny(name, batches=batches, **options)[0], tiny(name, batches=other, **options)[0])


def test_rows_of_a_batch_are_samples():
    joined = [
        {key: torch.cat([batch[key] for batch in BATCHES[i : i + 4]]) for key in BATCHES[0]} for i in range(0, 8, 4)
    ]
    model, _, report = tiny(batches=joined)
    assert equal(model, tiny()[0])
    assert (report.num_samples, report.num_tokens) == (8, 80)


class Broadcasting(nn.Module):
    """A model whose blocks take an argument that belongs to one sample, and one that is shared."""

    def __init__(self, per_sample):
        super().__init__()
        self.layers = nn.ModuleList(BiasedBlock() for _ in range(3))
        self.per_sample = per_sample

    def forward(self, x):
        bias = torch.arange(4.0).view(1, 4, 1)
        for layer in self.layers:
            x = layer(x, bias[:, :, 0].reshape(-1) if self.per_sample else bias)
        return x


class BiasedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seen = []

    def forward(self, x, bias):
        self.seen.append(len(x))
        return x + self.linear(x) + (bias if bias.ndim == 3 else bias.view(len(x), -1, 1))


@pytest.mark.parametrize("per_sample", [False, True])
def test_samples_go_together_where_the_block_allows_it(per_sample):
    torch.manual_seed(0)
    model, rows = Broadcasting(per_sample), [torch.randn(1, 4, 8) for _ in range(6)]
    expected = copy.deepcopy(model)
    options = PruneOptions("wanda")
    prune_model(model, model, rows, options)
    for layer in expected.layers:
        norm = sum(x[0].square().sum(0) for x in rows).sqrt()
        kept = make_mask(layer.linear.weight.abs() * norm, options.pattern)
        layer.linear.weight.data *= kept
        bias = torch.arange(4.0).view(1, 4, 1)
        rows = [(layer(x, bias)).detach() for x in rows]
    assert all(
        torch.equal(a.linear.weight, b.linear.weight) for a, b in zip(model.layers, expected.layers, strict=True)
    )
    assert max(model.layers[1].seen) == (1 if per_sample else 6)


class WithAnExpert(nn.Module):
    """One sample of all is sent to its expert."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(ExpertBlock() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class ExpertBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.expert = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        # marked by its last feature, which stays as it is
        chosen = x[..., -1:] > 50
        if bool(chosen.any()):
            y = y + chosen * self.expert(x)
        return torch.cat([x[..., :-1] + y[..., :-1], x[..., -1:]], -1)


def test_an_expert_that_a_round_does_not_reach_keeps_its_norms():
    torch.manual_seed(0)
    rows = [torch.randn(1, 4, 8) for _ in range(8)]
    rows[3][..., -1] = 100.0
    options = make_options(rounds=4, samples_per_round=1, learning_rate=1e-3)
    model = WithAnExpert()
    prune_model(model, model, rows, options)
    for block in model.layers:
        for layer in (block.linear, block.expert):
            assert ((layer.weight.view(8, 2, 4) == 0).sum(-1) == 2).all()
            # pruned, but for the marked feature, by more than the order of the columns
            assert len({tuple(row) for row in (layer.weight[:, :4] == 0).tolist()}) > 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", ["wanda", "tuned-ro", "ro"])
def test_forwards_without_a_use_end_early_and_nothing_changes(monkeypatch, name, method):
    monkeypatch.setattr(samples, "max_tokens", lambda device, width: 16)  # several batches
    batches = token_batches(24)
    model, _, report = tiny(name, batches=batches, method=method)
    sample, stops = InputStatistics.sample, []

    def whole(self, mask=None, num_samples=1, shape=None, may_stop=False):
        stops.append(may_stop and self._last_layers.get(shape) is not None)
        return sample(self, mask, num_samples, shape)

    monkeypatch.setattr(InputStatistics, "sample", whole)
    reference, _, wanted = tiny(name, batches=batches, method=method)
    assert any(stops)
    assert equal(model, reference)
    assert [block.loss_after for block in report.blocks] == [block.loss_after for block in wanted.blocks]
