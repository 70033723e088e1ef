import random
from math import ceil

import pytest
import torch

from wandazeta.zeroth_order import ProjectedGradients, VarianceSchedule


def slopes(*values):
    return ProjectedGradients(tuple(range(len(values))), values, 0)


def reference(squares, low, high, window):
    """Queries after each step, from the whole history: exponential weights, written out."""
    means, queries = [], []
    for step in range(1, len(squares) + 1):
        weights = [(1 - 1 / window) ** (step - 1 - place) for place in range(step)]
        mean = sum(w * s for w, s in zip(weights, squares, strict=False)) / sum(weights)
        means.append(mean)
        settled = means[window - 1 :]
        queries.append(min(high, max(low, ceil(low * max(settled) / mean))) if settled else low)
    return queries


def test_equals_the_rule_written_out():
    generator = random.Random(0)
    signals = [[generator.gauss(0, 0.9**step) for _ in range(4)] for step in range(60)]
    schedule, states, seen = VarianceSchedule(3, 24, window=7), torch.zeros(3, dtype=torch.float64), []
    for values in signals:
        schedule.observe_(states, slopes(*values))
        seen.append(schedule.num_queries(0, states))
    assert seen == reference([sum(v * v for v in values) / 4 for values in signals], 3, 24, 7)
    assert seen[:6] == [3] * 6
    assert len(set(seen)) > 5
    assert seen[-1] == 24


def test_signal_that_comes_back_takes_queries_away():
    schedule, states = VarianceSchedule(2, 32, window=1), torch.zeros(3, dtype=torch.float64)
    seen = []
    for value in (2.0, 1.0, 2.0, 4.0, 0.0):
        schedule.observe_(states, slopes(value, -value))
        seen.append(schedule.num_queries(0, states))
    # no slope at all: as many as there may be
    assert seen == [2, 8, 2, 2, 32]


def test_before_the_first_step():
    schedule = VarianceSchedule(5, 9)
    assert schedule.num_queries(0, torch.zeros(3, dtype=torch.float64)) == 5
    assert (schedule.min_queries, schedule.max_queries) == (5, 9)


def test_a_loss_that_is_flat_from_the_start():
    schedule, states = VarianceSchedule(2, 8, window=1), torch.zeros(3, dtype=torch.float64)
    schedule.observe_(states, slopes(0.0, 0.0))
    assert schedule.num_queries(0, states) == 8


@pytest.mark.parametrize("bad", [{"min_queries": 0}, {"min_queries": 5, "max_queries": 4}, {"window": 0}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="Expected argument"):
        VarianceSchedule(**bad)
