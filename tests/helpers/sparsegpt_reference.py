"""SparseGPT as its authors publish it, column by column in float64, and problems to solve with it."""

import torch

from wandazeta.pruning.pattern import SparsityPattern


def pattern_of(pattern):
    if isinstance(pattern, str):
        return SparsityPattern(pattern)
    return SparsityPattern("unstructured", sparsity=pattern)


def problem(width, rows=24):
    """A weight, and inputs whose features are correlated."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(4 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return torch.randn(rows, width, generator=generator), x


def published(weight, gram, pattern, block_size=128):
    """The authors' procedure: blocks of 128, masks chosen at their start or per group."""
    weight, gram = weight.double(), gram.double()
    width = weight.shape[1]
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    kept = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, width, block_size) if pattern.group is None else [0]:
        stop = min(start + block_size, width) if pattern.group is None else width
        if pattern.group is None:
            scores = (weight[:, start:stop] / upper.diagonal()[start:stop]) ** 2
            lowest = scores.t().flatten().sort(stable=True).indices[: int(scores.numel() * pattern.target_sparsity)]
            flat = torch.ones(scores.numel(), dtype=torch.bool)
            flat[lowest] = False
            kept[:, start:stop] = flat.view(stop - start, -1).t()
        for column in range(start, stop):
            if pattern.group is not None and column % pattern.group[1] == 0:
                num_kept, size = pattern.group
                scores = (weight[:, column : column + size] / upper.diagonal()[column : column + size]) ** 2
                lowest = scores.sort(dim=1, stable=True).indices[:, : size - num_kept]
                kept[:, column : column + size] = torch.ones_like(scores, dtype=torch.bool).scatter(1, lowest, False)
            error = weight[:, column] * ~kept[:, column] / upper[column, column]
            weight[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
            weight[:, column] *= kept[:, column]
    return weight.float(), kept
