"""Prune language models block by block, in plain torch.

Examples:
    >>> import torch
    >>> from torch import nn
    >>> blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
    >>> model = nn.Sequential(nn.Embedding(16, 8), nn.Sequential(*blocks))
    >>> tokens = [torch.randint(16, (4, 6))]
    >>> report = prune_model(model, model, tokens, PruneOptions("wanda", "2:4"))
    >>> report.sparsity
    0.5
"""

from wandazeta.pruning.methods import (
    METHODS,
    RGS,
    RO,
    Magnitude,
    PruningMethod,
    RegionalOptimisation,
    SparseGPT,
    TunedRO,
    Wanda,
    WandaPP,
    make_method,
)
from wandazeta.pruning.options import PruneOptions
from wandazeta.pruning.pattern import SparsityPattern
from wandazeta.pruning.pruner import BlockResult, PreparedPruning, Progress, PruningInterrupted, prune_blocks
from wandazeta.pruning.records import BlockRecord, LayerRecord, PruneReport
from wandazeta.pruning.session import PruningSession, prune_model

__all__ = [
    "METHODS",
    "RGS",
    "RO",
    "BlockRecord",
    "BlockResult",
    "LayerRecord",
    "Magnitude",
    "PreparedPruning",
    "Progress",
    "PruneOptions",
    "PruneReport",
    "PruningInterrupted",
    "PruningMethod",
    "PruningSession",
    "RegionalOptimisation",
    "SparseGPT",
    "SparsityPattern",
    "TunedRO",
    "Wanda",
    "WandaPP",
    "make_method",
    "prune_blocks",
    "prune_model",
]
