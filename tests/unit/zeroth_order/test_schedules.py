import math

import pytest

from wandazeta.zeroth_order import AdaZetaSchedule, ConstantSchedule


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
