"""Where the host would wait for a GPU: never inside a loop over samples, rounds, steps or queries."""

import pytest
import torch
from helpers.causal_lms import tiny_lm
from helpers.prune_options import make_options
from helpers.waits import Waits

from wandazeta.pruning import prune_model
from wandazeta.zeroth_order import OneSided, TwoSided, directions_of_step, projected_gradients

METHODS = [
    {"method": "magnitude"},
    {"method": "wanda"},
    {"method": "sparsegpt"},
    {"method": "rgs"},
    {"method": "wanda++"},
    {"method": "wanda++", "alpha": "auto", "mask_mode": "fixed", "optimizer": "adamw", "lr_schedule": "linear"},
    {"method": "wanda++", "mask_mode": "straight_through", "target": "dense_stream"},
]


def waits_of_a_block(options, num_samples, padding=0):
    """What is counted from the end of the first block to that of the second."""
    model = tiny_lm(num_hidden_layers=2)
    ids = torch.randint(300, (num_samples, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 10 - padding :] = 0
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(1), mask.split(1), strict=True)]
    waits = Waits()
    with waits:
        prune_model(
            model,
            lambda batch: model(**batch, use_cache=False),
            batches,
            make_options(**options),
            token_mask=lambda batch: batch["attention_mask"].bool(),
            on_block=lambda record, num_blocks: waits.counts.clear() if record.index == 0 else None,
        )
    return waits.counts


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("options", METHODS, ids=lambda options: "-".join(options.values()))
def test_waits_of_a_block_do_not_grow_with_samples_or_rounds(options, padding):
    few = waits_of_a_block(options | {"rounds": 1, "samples_per_round": 2}, 2, padding)
    many = waits_of_a_block(options | {"rounds": 3, "samples_per_round": 6}, 6, padding)
    assert many == few
    # weights that are checked after they have been moved to the CPU, and a few of the whole block
    num_layers = 7
    assert sum(few.values()) <= num_layers + 6


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
