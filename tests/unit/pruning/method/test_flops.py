"""The schedule spends what the formula of a lean one says: F and B are a forward and a backward of all blocks."""

import pytest
import torch
from helpers.architectures import build, token_batches
from helpers.prune_options import make_options
from torch.utils.flop_counter import FlopCounterMode

from wandazeta.pruning import prune_model
from wandazeta.pruning.method.block import NUM_PROBES

OPTIONS = [
    {"method": "wanda"},
    {"method": "rgs"},
    {"method": "wanda++", "rounds": 5, "samples_per_round": 8},
]


def count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def forward_and_backward(model, ids):
    """F and B of one sample: the head is not run, and nothing below the first block is differentiated."""
    hidden = []

    def enter(block, args):
        hidden.append(args[0].detach())
        return (hidden[-1], *args[1:])

    def all_blocks():
        handles = [block.register_forward_pre_hook(enter) for block in model.model.layers]
        try:
            return model.model(ids, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()

    with torch.no_grad():
        forward = count(all_blocks)
    totals = []
    for block in model.model.layers:
        calls = []
        handle = block.register_forward_pre_hook(
            lambda b, args, kwargs, c=calls: c.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            model.model(ids, use_cache=False)
        handle.remove()
        (args, kwargs) = calls[0]
        totals.append(count(lambda b=block, a=args, k=kwargs: b(*a, **k).sum().backward()))
    return forward, sum(totals) - forward


def expected(options, forward, backward, num_samples, num_blocks):
    """As in the cost table of the method: PFLOP = N(F+B) + KM(F+B) + NF for norms + NF to propagate."""
    propagated = num_samples - (num_samples - NUM_PROBES) / num_blocks  # the last block feeds no other
    if not options.method.uses_gradients:
        return (num_samples + propagated) * forward
    total = num_samples * (forward + backward) + propagated * forward
    optimisation = options.method.active_optimisation
    if optimisation is not None:
        # with the norms of the optimised block, and the loss before that the report shows
        steps = optimisation.rounds * optimisation.samples_per_round
        total += steps * (forward + backward) + (num_samples + NUM_PROBES) * forward
    return total


def check(model, batches, options):
    forward, backward = forward_and_backward(model, batches[0]["input_ids"])
    found = count(lambda: prune_model(model, lambda batch: model(**batch), batches, options))
    assert found == pytest.approx(expected(options, forward, backward, len(batches), len(model.model.layers)), rel=0.1)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o["method"])
def test_a_tiny_model(options):
    check(build("llama")[0], token_batches(32), make_options(**options))


@pytest.mark.slow
@pytest.mark.samples
def test_smollm2():
    from transformers import AutoModelForCausalLM

    from wandazeta.data.samples import sample_model

    model = AutoModelForCausalLM.from_pretrained(sample_model(), dtype=torch.float32)
    options = make_options(rounds=1, samples_per_round=4)
    check(model, token_batches(16, length=8), options)
