from functools import partial

import pytest
import torch
from torch import nn

from wandazeta.pruning.method.optimizer import MasterWeights
from wandazeta.pruning.method.regional import (
    optimisation_loss,
    optimise_block,
    regional_gradients,
    regional_loss,
)
from wandazeta.pruning.method.statistics import InputStatistics
from wandazeta.pruning.methods import RegionalOptimisation
from wandazeta.utilities.ranks import Ranks


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


HIDDEN = [torch.randn(1, length, 8, generator=torch.Generator().manual_seed(length)) for length in (5, 6, 7, 8)]
MASKS = [None, None, torch.tensor([[True] * 5 + [False] * 2]), None]


def parts(block):
    layers = {"up": block.up, "down": block.down}
    return lambda batch, hidden: block(hidden), layers, InputStatistics(layers)


def test_gradients_equal_the_root_mean_square_of_autograd_sample_by_sample(block):
    run, layers, norms = parts(block)
    outputs = []
    found = regional_gradients(run, layers, HIDDEN, MASKS, norms, outputs.append, Ranks())
    for name, layer in layers.items():
        squares = []
        for hidden, mask in zip(HIDDEN, MASKS, strict=True):
            output = block(hidden)
            output = output if mask is None else output[:, : mask.sum()]
            squares.append(torch.autograd.grad(output.pow(2).sum().sqrt(), layer.weight)[0] ** 2)
        torch.testing.assert_close(found[name], torch.stack(squares).mean(0).sqrt())
        assert layer.weight.grad is None
    assert torch.equal(outputs[1], block(HIDDEN[1]))
    assert not any(output.requires_grad for output in outputs)
    assert norms.num_samples == 4
    block(HIDDEN[0]).sum().backward()  # no hook is left to drop this gradient
    assert block.up.weight.grad is not None


def test_losses():
    output, target = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    mask = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(regional_loss(output), output.flatten().norm())
    torch.testing.assert_close(regional_loss(output, mask), output[:, :3].flatten().norm())
    torch.testing.assert_close(optimisation_loss(output, target, mask), (output - target)[:, :3].pow(2).mean())
    assert regional_loss(output.bfloat16()).dtype == torch.float32


def halve(block):
    """A pruning that is easy to follow: the even columns go."""
    master = MasterWeights({"up": block.up, "down": block.down})
    kept = {name: torch.arange(weight.shape[1]).expand_as(weight) % 2 == 1 for name, weight in master.masters.items()}

    return master, partial(master.apply_masks, kept)


def run_rounds(block, options, hidden=HIDDEN, masks=MASKS, targets=None):
    run, _, norms = parts(block)
    targets = targets if targets is not None else [block(h).detach() for h in hidden]
    master, prune = halve(block)
    generator = torch.Generator().manual_seed(0)
    optimise_block(run, master, prune, hidden, targets, masks, norms, options, generator, Ranks())
    return norms


def reference(block, options):
    """The rounds, written out for float32 weights."""
    targets = [block(h).detach() for h in HIDDEN]
    weights, generator = [block.up.weight, block.down.weight], torch.Generator().manual_seed(0)
    optimizer = torch.optim.RMSprop(weights, lr=options.learning_rate)
    for _ in range(options.rounds):
        for weight in weights:
            weight.data[:, ::2] = 0
        drawn = torch.randperm(4, generator=generator)[: options.samples_per_round].tolist()
        for i in drawn:
            count = 5 if i == 2 else None
            (block(HIDDEN[i]) - targets[i])[:, :count].pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_rounds_equal_a_plain_loop():
    options = RegionalOptimisation(rounds=3, samples_per_round=4, learning_rate=1e-2)
    torch.manual_seed(0)
    ours = Block()
    torch.manual_seed(0)
    theirs = Block()
    run_rounds(ours, options)
    reference(theirs, options)
    torch.testing.assert_close(ours.up.weight, theirs.up.weight)
    torch.testing.assert_close(ours.down.weight, theirs.down.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_are_positive(block, dtype):
    block.to(dtype)
    assert (block.up.weight[:, ::2] < 0).any()
    _, prune = halve(block)
    prune()
    assert (block.up.weight[:, ::2] == 0).all()
    assert not block.up.weight[:, ::2].signbit().any()


def test_norms_come_from_the_rounds_own_forwards(block):
    norms = run_rounds(block, RegionalOptimisation(rounds=2, samples_per_round=3, learning_rate=1e-2))
    assert norms.num_samples == 3


def test_sixteen_bits_keep_a_float32_master():
    # a step far below half an ulp of bfloat16: without a master nothing would ever move
    torch.manual_seed(0)
    block = Block().bfloat16()
    hidden = [h.bfloat16() for h in HIDDEN]
    targets = [torch.zeros_like(h) for h in hidden]
    before = block.up.weight.detach().clone()
    options = RegionalOptimisation(rounds=1, samples_per_round=4, learning_rate=1e-4)
    master, prune = halve(block)
    run, _, norms = parts(block)
    for _ in range(20):
        generator = torch.Generator().manual_seed(0)
        optimise_block(run, master, prune, hidden, targets, MASKS, norms, options, generator, Ranks())
    assert block.up.weight.dtype == torch.bfloat16
    assert master.masters["up"].dtype == torch.float32
    assert torch.equal(block.up.weight, master.masters["up"].bfloat16())
    assert (block.up.weight != before)[:, 1::2].any()


def test_half_precision_gradients_do_not_vanish():
    torch.manual_seed(0)
    wide, half = Block(), Block().half()
    half.load_state_dict(wide.state_dict())
    found = []
    for block in (wide, half):
        run, layers, norms = parts(block)
        hidden = [h.to(block.up.weight.dtype) for h in HIDDEN]
        found.append(regional_gradients(run, layers, hidden, MASKS, norms, lambda _: None, Ranks()))
    torch.testing.assert_close(found[0]["up"], found[1]["up"], rtol=2e-2, atol=2e-3)


def test_small_half_precision_gradients_keep_their_digits():
    torch.manual_seed(0)
    half, wide = Block().half(), Block()
    with torch.no_grad():
        half.down.weight.mul_(1e-5)
    wide.load_state_dict(half.state_dict())
    hidden = torch.randn(1, 64, 8).half()
    found = []
    for block in (wide, half):
        run, layers, norms = parts(block)
        states = [hidden.to(block.up.weight.dtype)]
        found.append(regional_gradients(run, layers, states, [None], norms, lambda _: None, Ranks())["up"])
    assert (found[0] - found[1]).norm() < 1e-2 * found[0].norm()


def test_masters_take_the_gradients_of_the_weights(block):
    master = MasterWeights({"up": block.bfloat16().up})
    block.up.weight.grad = torch.full_like(block.up.weight, 8.0)
    master.take_gradients(scale=2.0)
    assert block.up.weight.grad is None
    assert torch.equal(master.masters["up"].grad, torch.full((12, 8), 4.0))


def test_half_precision_steps_do_not_vanish():
    """The loss is a mean over many values: unscaled, its gradient is zero in float16."""
    hidden, updates = torch.randn(1, 4096, 8, generator=torch.Generator().manual_seed(0)), []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        block = Block().to(dtype)
        run, layers, norms = parts(block)
        master, states = MasterWeights(layers), [hidden.to(dtype)]
        before = master.masters["down"].detach().clone()
        targets = [block(states[0]).detach().float() + 1e-4]
        options, draw = RegionalOptimisation(rounds=1, samples_per_round=1, learning_rate=1e-4), torch.Generator()
        optimise_block(run, master, lambda: None, states, targets, [None], norms, options, draw, Ranks())
        updates.append(master.masters["down"].detach() - before)
    assert (updates[1] != 0).all()
    assert (updates[0].sign() == updates[1].sign()).float().mean() > 0.9


def test_weights_that_blow_up_are_an_error(block):
    hidden = [h.clone() for h in HIDDEN]
    targets = [torch.full_like(h, float("nan")) for h in hidden]
    with pytest.raises(ValueError, match="`learning_rate` to keep the weights finite"):
        run_rounds(block, RegionalOptimisation(rounds=1, samples_per_round=2), hidden, MASKS, targets)
