"""Prune tiny random models by `prune_model`, and compare the results."""

import copy
from dataclasses import fields

import torch
from helpers.architectures import build, token_batches
from torch import nn

from wandazeta.pruning import RegionalOptimisation, make_method, prune_model
from wandazeta.pruning.method.layers import is_transposed
from wandazeta.pruning.options import PruneOptions

FAST = {"rounds": 2, "samples_per_round": 4, "learning_rate": 1e-3}
OF_METHODS = {"alpha", *(field.name for field in fields(RegionalOptimisation))}

BATCHES = token_batches(8)


def make_options(method="wanda++", **options):
    """Options from flat ones, without those that the method does not have."""
    known = make_method(method).to_dict()
    return PruneOptions.from_dict(
        {
            "method": method,
            **{name: value for name, value in options.items() if name in known or name not in OF_METHODS},
        }
    )


def prune(model, batches=BATCHES, token_mask=None, run=None, **options):
    options = make_options(**{**FAST, **options})
    return prune_model(model, lambda batch: model(**batch), batches, options, token_mask=token_mask, **(run or {}))


def tiny(name="llama", batches=BATCHES, **options):
    model, blocks = build(name)
    report = prune(model, batches, **options)
    return model, model.get_submodule(blocks), report


def linears(block):
    return [m for m in block.modules() if isinstance(m, nn.Linear) or is_transposed(m)]


def rows_of(layer):
    return layer.weight.detach().t() if is_transposed(layer) else layer.weight.detach()


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Memory:
    """Progress in memory that forgets some blocks."""

    def __init__(self):
        self.results = {}

    def num_saved(self):
        return len(self.results)

    def load(self, index):
        return self.results.get(index)

    def save(self, index, result):
        self.results[index] = copy.deepcopy(result)
