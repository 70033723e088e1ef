"""Refine a mask by swaps, and the weights on it by conjugate gradients (experiments)."""

import torch
from torch import Tensor


def damped(gram: Tensor) -> Tensor:
    gram = gram.float().clone()
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    return gram


def solve_on_mask(weight: Tensor, mask: Tensor, gram: Tensor, iterations: int = 30) -> Tensor:
    """Minimise tr((W - X) H (W - X)^T) over X that is zero off the mask: preconditioned conjugate gradients, all rows."""
    gram = damped(gram)
    m = mask.float()
    x = weight * m
    scale = gram.diagonal().rsqrt()
    r = ((weight - x) @ gram) * m
    z = r * scale.square()
    p = z.clone()
    rz = (r * z).sum(1, keepdim=True)
    for _ in range(iterations):
        hp = (p @ gram) * m
        alpha = rz / (p * hp).sum(1, keepdim=True).clamp_min(1e-20)
        x = x + alpha * p
        r = r - alpha * hp
        z = r * scale.square()
        new = (r * z).sum(1, keepdim=True)
        p = z + (new / rz.clamp_min(1e-20)) * p
        rz = new
    return x


def swaps(weight: Tensor, mask: Tensor, gram: Tensor, group: tuple[int, int], sweeps: int = 2) -> Tensor:
    """Swap kept and pruned weights within a group while the error of the row falls (SparseSwaps, arXiv 2512.10922)."""
    gram = damped(gram)
    _, size = group
    mask = mask.clone()
    error = weight.masked_fill(mask, 0.0)
    c = error @ gram
    rows = torch.arange(len(weight))
    for _ in range(sweeps):
        for start in range(0, weight.shape[1], size):
            part = slice(start, start + size)
            w, k, ck, h = weight[:, part], mask[:, part], c[:, part], gram[part, part]
            d = h.diagonal()
            back = -2 * w * ck + w.square() * d  # a pruned weight comes back
            gone = 2 * w * ck + w.square() * d  # a kept one goes
            gain = back[:, :, None] + gone[:, None, :] - 2 * w[:, :, None] * w[:, None, :] * h
            gain = gain.masked_fill(k[:, :, None] | ~k[:, None, :], float("inf"))
            best, place = gain.flatten(1).min(1)
            come, go = place // size + start, place % size + start
            better = best < 0
            r, come, go = rows[better], come[better], go[better]
            mask[r, come], mask[r, go] = True, False
            c[r] += weight[r, go, None] * gram[go] - weight[r, come, None] * gram[come]
    return mask
