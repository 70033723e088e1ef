"""How often the host would wait for a GPU in a zeroth-order step: not more often with more queries or more layers."""

from collections import Counter

import pytest
from helpers.causal_lms import save_tiny_lm
from helpers.waits import WaitsAndCopies
from helpers.zo_run import train
from transformers.models.llama import modeling_llama

from wandazeta.modules import ZerothOrderModule

EXACT_HEAD = {"estimator": ["OneSided", {}], "head": {"num_answers": 2, "gradient": "exact"}}
# the mask, the options, the keys of the prefixes, the progress and the losses; others read what the CPU has by then
MOST = 11


def waits_of_steps(root, monkeypatch, num_layers, **options):
    """What is counted in each step of a training; the second step finds its prefixes."""
    waits, found = WaitsAndCopies(), []
    step, make_mask = ZerothOrderModule.training_step, modeling_llama.create_causal_mask

    def counted(*args):
        before = Counter(waits.counts)
        step(*args)
        found.append(waits.counts - before)

    def not_counted(*args, **kwargs):
        # transformers reads in every forward pass whether a token is masked
        before = Counter(waits.counts)
        mask = make_mask(*args, **kwargs)
        waits.counts = before
        return mask

    with monkeypatch.context() as patch:
        patch.setattr(ZerothOrderModule, "training_step", counted)
        patch.setattr(modeling_llama, "create_causal_mask", not_counted)
        model_dir = save_tiny_lm(root / f"model-{num_layers}", num_hidden_layers=num_layers)
        with waits:
            train(model_dir, root, steps=2, num_examples=4, query_chunk_size=2, **options)
    return found


@pytest.mark.parametrize("options", [{}, EXACT_HEAD], ids=["adapters", "exact head"])
def test_waits_do_not_grow_with_queries_or_layers(tmp_path, monkeypatch, options):
    _, few = waits_of_steps(tmp_path, monkeypatch, num_layers=2, queries=2, **options)
    _, many = waits_of_steps(tmp_path, monkeypatch, num_layers=4, queries=7, **options)
    assert many == few
    assert sum(few.values()) <= MOST, few
