import math
import random
from math import ceil

import pytest
import torch

from wandazeta.zeroth_order import AdaZetaSchedule, ConstantSchedule, ProjectedGradients, VarianceSchedule


def test_constant():
    schedule = ConstantSchedule(8)
    assert [schedule.num_queries(epoch) for epoch in (0, 1, 1000)] == [8, 8, 8]
    assert schedule.max_queries == 8


def test_adazeta_by_hand():
    schedule = AdaZetaSchedule(alpha=0.85, beta=0.5, max_queries=6)
    # 0.85·√e: 0, 0.85, 1.70, 2.55, 3.40, 5.10, 5.95, 6.01, 8.5
    assert [schedule.num_queries(epoch) for epoch in (0, 1, 4, 9, 16, 36, 49, 50, 100)] == [1, 1, 1, 2, 3, 5, 5, 6, 6]
    assert schedule.max_queries == 6


def test_beta_of_the_released_code():
    # its script: alpha 0.85, 20 queries at the end, at most 15; 10,000 steps of 16 out of 1000 examples are 159 epochs
    schedule = AdaZetaSchedule.from_target(final_queries=20, num_epochs=159, alpha=0.85, max_queries=15)
    assert schedule.beta == pytest.approx(math.log(20 / 0.85) / math.log(159))
    assert schedule.beta == pytest.approx(0.6230, abs=1e-4)
    queries = [schedule.num_queries(step // 63) for step in range(10_000)]
    assert queries == sorted(queries)
    assert (queries[0], queries[-1]) == (1, 15)
    assert sum(queries) / len(queries) == pytest.approx(11, abs=0.5)


def test_target_is_reached():
    for epochs in range(2, 200):
        assert AdaZetaSchedule.from_target(20, epochs, max_queries=100).num_queries(epochs) == 20


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConstantSchedule(0),
        lambda: AdaZetaSchedule(alpha=0),
        lambda: AdaZetaSchedule(beta=-0.1),
        lambda: AdaZetaSchedule(max_queries=0),
        lambda: AdaZetaSchedule.from_target(num_epochs=1),
        lambda: AdaZetaSchedule.from_target(final_queries=0),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="Expected argument"):
        make()


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
def test_bad_arguments_of_the_variance_schedule(bad):
    with pytest.raises(ValueError, match="Expected argument"):
        VarianceSchedule(**bad)
