"""Solve small problems with SparseGPT's kernel on the CPU; run with TRITON_INTERPRET=1."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers.sparsegpt_reference import pattern_of, problem, published

from wandazeta.pruning.method import sparsegpt, sparsegpt_kernel

# (width, pattern, rows, sizes of the blocks): several blocks, several programs, and sizes that fill neither
CASES = [
    (132, "2:4", 33, [128, 4]),
    (48, "4:8", 5, [48]),
    (15, "2:5", 1, [15]),
    (140, 0.5, 7, [128, 12]),
    (144, "70:144", 3, [72, 72]),
]


def solve(weights, gram, pattern, kernel):
    sparsegpt._kernel = lambda device: kernel
    return sparsegpt.sparsegpt(weights, gram, pattern)


class Counted:
    """The kernel, with the sizes of the blocks that it was called for."""

    BLOCK = sparsegpt_kernel.BLOCK

    def __init__(self):
        self.sizes = []

    def eliminate(self, columns, *others):
        self.sizes.append(len(columns))
        sparsegpt_kernel.eliminate(columns, *others)


sparsegpt_kernel.try_out(torch.device("cpu"))
for width, label, rows, sizes in CASES:
    pattern, (weight, x) = pattern_of(label), problem(width, rows)
    # inputs that are never seen; their scores are equal, so the mask has to follow the order of the columns
    dead = (torch.arange(width) >= 4) & (torch.arange(width) <= 6)
    x[:, dead] = 0
    gram, kernel = x.t() @ x, Counted()
    # two layers with one input are each what they would be alone
    weights = [weight[: rows // 3], weight[rows // 3 :]] if rows > 2 else [weight]
    in_torch = solve(weights, gram, pattern, None)
    for part, (found, kept), (other, other_mask) in zip(
        weights, solve(weights, gram, pattern, kernel), in_torch, strict=True
    ):
        expected, expected_mask = published(part.masked_fill(dead, 0.0), gram + torch.diag(dead.float()), pattern)
        assert torch.equal(kept, expected_mask), label
        assert torch.equal(kept, other_mask), label
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
        assert (found[~kept] == 0).all(), label
    assert kernel.sizes == sizes, (label, kernel.sizes)
