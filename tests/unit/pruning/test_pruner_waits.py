"""Where the host would wait for a GPU: never inside a loop over samples, rounds, steps or queries.

Reading a value (`.item()`, `bool(tensor)`) and a boolean index make the host wait. On a CPU they are operations, too,
and counted here, and so are tensors that are asked for on the CPU. The threads that save a block and read the next one
are not counted: nothing waits for them.
"""

from collections import Counter

import pytest
import torch
from helpers.causal_lms import tiny_lm
from helpers.prune_model import Memory
from helpers.prune_options import make_options
from helpers.waits import Waits
from torch.overrides import TorchFunctionMode

from wandazeta.pruning import prune_model
from wandazeta.utilities.host_memory import HostCopies
from wandazeta.zeroth_order import OneSided, TwoSided, directions_of_step, projected_gradients

METHODS = [
    {"method": "magnitude"},
    {"method": "wanda"},
    {"method": "sparsegpt"},
    {"method": "rgs"},
    {"method": "wanda++"},
    {"method": "wanda++", "alpha": "auto"},
]


class Moves(TorchFunctionMode):
    """Counts the tensors that are asked for on the CPU."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        to_cpu = func is torch.Tensor.to and "cpu" in [arg for arg in args[1:] if isinstance(arg, str)]
        if to_cpu or func in (torch.Tensor.cpu, torch.Tensor.numpy):
            self.counts[f"Tensor.{func.__name__}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def gathers(monkeypatch):
    """Counts how often results are copied to the host, each time all of a block."""
    start, counts = HostCopies.start, Counter()

    def started(self, tensors):
        counts["gathers"] += 1
        return start(self, tensors)

    monkeypatch.setattr(HostCopies, "start", started)
    return counts


def waits_of_a_block(options, num_samples, padding=0):
    """What is counted from the end of the first block to that of the second."""
    model = tiny_lm(num_hidden_layers=2)
    ids = torch.randint(300, (num_samples, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 10 - padding :] = 0
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(1), mask.split(1), strict=True)]
    waits = Waits()
    with waits, Moves(waits.counts):
        prune_model(
            model,
            lambda batch: model(**batch, use_cache=False),
            batches,
            make_options(**options),
            token_mask=lambda batch: batch["attention_mask"].bool(),
            progress=Memory(),
            on_block=lambda record, num_blocks: waits.counts.clear() if record.index == 0 else None,
        )
    return waits.counts


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("options", METHODS, ids=lambda options: "-".join(options.values()))
def test_waits_of_a_block_do_not_grow_with_samples_or_rounds_or_layers(options, padding, gathers):
    few = waits_of_a_block(options | {"rounds": 1, "samples_per_round": 2}, 2, padding)
    many = waits_of_a_block(options | {"rounds": 3, "samples_per_round": 6}, 6, padding)
    assert many == few
    # a few of the whole block, which has seven layers
    assert sum(few.values()) <= 5
    num_prunings, num_blocks = 2, 2
    assert gathers["gathers"] == num_prunings * num_blocks


def test_the_tuned_optimisation_waits_once_a_round_and_not_for_samples():
    options = {"method": "tuned-ro", "rounds": 2}
    # layers, figures of the block, and the held-out error before, of each round and of each rate that the search tries
    most = 7 + 10 + 1 + 2 + 8
    num_samples = 2 * most
    assert sum(waits_of_a_block(options, num_samples).values()) <= most


@pytest.mark.parametrize("estimator", [TwoSided(1e-3), OneSided(1e-3)], ids=lambda estimator: type(estimator).__name__)
def test_waits_of_a_zeroth_order_step_do_not_grow_with_queries(estimator):
    def waits(num_queries):
        theta = torch.randn(12)
        directions = directions_of_step(theta, 0, 0)
        with Waits() as counted:
            points = range(estimator.num_points(num_queries))
            found = estimator.evaluate(lambda theta_Pd: theta_Pd.square().sum(1)[None], theta, directions, points, 2)
            slopes = projected_gradients(estimator.slopes(found.values_VP))
            theta.sub_(estimator.gradient(theta, slopes, directions), alpha=1e-3)
            estimator.loss(found.values_VP)
        return counted.counts

    assert waits(8) == waits(2)
