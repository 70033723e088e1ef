"""A sparse `Tiny`, and a training loop in plain torch that keeps it sparse by masking its gradients."""

import torch
from helpers.pruning import Tiny, loader
from torch.nn import functional as F


def prunable(module):
    """The weights in the blocks that pruning selects, by name."""
    return {
        name: weight for name, weight in module.named_parameters() if name.startswith("layers.") and weight.ndim == 2
    }


def sparse_tiny(**kwargs):
    """`Tiny` without dropout, pruned to 2:4 by magnitude."""
    module = Tiny(**kwargs)
    module.dropout.p = 0.0
    with torch.no_grad():
        for weight in prunable(module).values():
            groups = weight.view(-1, 4)
            groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0.0)
    return module


def reference(module, make_optimizer, steps, *, clip=None, accumulate=1, ranks=1):
    """Train in plain torch on the batches of all ranks; returns the optimizer."""
    masks = {name: (weight != 0).float() for name, weight in prunable(module).items()}
    optimizer = make_optimizer(module.parameters())
    # every rank its own data, turn by turn
    batches = [tokens for turn in zip(*(loader(seed=rank) for rank in range(ranks)), strict=True) for (tokens,) in turn]
    turns = [batches[start : start + accumulate * ranks] for start in range(0, len(batches), accumulate * ranks)]
    for step in range(steps):
        turn = turns[step % len(turns)]
        optimizer.zero_grad()
        for tokens in turn:
            loss = F.cross_entropy(module(tokens).flatten(0, 1), tokens.flatten())
            (loss / len(turn)).backward()
        for name, mask in masks.items():
            module.get_parameter(name).grad.mul_(mask)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return optimizer


def is_positive_zero(values):
    """Whether all are +0.0, bit for bit."""
    return bool(((values == 0) & ~values.signbit()).all())
