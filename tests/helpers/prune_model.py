"""Prune tiny random models by `prune_model`, and compare the results."""

import copy

import torch
from helpers.architectures import build, token_batches
from helpers.prune_options import make_options
from torch import nn

from wandazeta.pruning import prune_model
from wandazeta.pruning.method.layers import is_transposed

FAST = {"rounds": 2, "samples_per_round": 4, "learning_rate": 1e-3}
BATCHES = token_batches(8)


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
