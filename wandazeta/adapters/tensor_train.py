"""Linear maps whose matrix is a tensor train (TT), applied without forming the matrix.

Core k has shape `(r_k, n_k, r_{k+1})` with `r_0 = r_end = 1`. The first cores factorise the input width, the others
the output width, so the left and the right half contract independently to `A (in, r)` and `B (r, out)` and the layer is
`y = (x A) B + b`: the fast forward of AdaZeta (arXiv 2406.18060).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from wandazeta.adapters.factorise import factorise


@dataclass(frozen=True)
class TTShape:
    """Factors and rank of one TT matrix.

    Args:
        in_factors: Factors of the input width, one core each.
        out_factors: Factors of the output width, one core each.
        rank: Every inner rank of the train.
    """

    in_factors: tuple[int, ...]
    out_factors: tuple[int, ...]
    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"Expected argument `rank` to be an integer of at least 1, but got {self.rank}.")
        if not self.in_factors or not self.out_factors or min(self.in_factors + self.out_factors) < 1:
            raise ValueError(
                "Expected arguments `in_factors` and `out_factors` to hold at least one positive integer each, "
                f"but got {self.in_factors} and {self.out_factors}."
            )

    @classmethod
    def balanced(
        cls, in_features: int, out_features: int, rank: int, num_factors: tuple[int, int] = (3, 3)
    ) -> "TTShape":
        """Return the shape for two widths, each split by `factorise`."""
        in_factors, out_factors = factorise(in_features, num_factors[0]), factorise(out_features, num_factors[1])
        return cls(tuple(in_factors), tuple(out_factors), rank)

    def mirrored(self) -> "TTShape":
        """Return the reversed shape, which maps the output width back to the input width with as many values."""
        return TTShape(self.out_factors[::-1], self.in_factors[::-1], self.rank)

    @property
    def in_features(self) -> int:
        """Input width."""
        return prod(self.in_factors)

    @property
    def out_features(self) -> int:
        """Output width."""
        return prod(self.out_factors)

    @property
    def core_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shape `(r_k, n_k, r_{k+1})` of every core, from left to right."""
        factors = self.in_factors + self.out_factors
        ranks = (1, *(self.rank for _ in factors[1:]), 1)
        return tuple(zip(ranks[:-1], factors, ranks[1:], strict=True))

    @property
    def num_parameters(self) -> int:
        """Number of core values, without a bias."""
        return sum(prod(shape) for shape in self.core_shapes)


def tt_matrices(cores: Sequence[Tensor], num_in: int) -> tuple[Tensor, Tensor]:
    """Contract the left and the right half of a tensor train independently.

    Args:
        cores: Cores of shape `(…, r_k, n_k, r_{k+1})`; all leading dimensions (queries, sites) are batched.
        num_in: Number of cores that factorise the input width.

    Returns:
        `A` of shape `(…, in, r)` and `B` of shape `(…, r, out)`; the matrix of the layer is `A @ B`.
    """
    left = cores[0].squeeze(-3)
    for core in cores[1:num_in]:
        # (…, n, r) x (…, r, m·s) -> (…, n·m, s)
        left = (left @ core.flatten(-2)).unflatten(-1, core.shape[-2:]).flatten(-3, -2)
    right = cores[-1].squeeze(-1)
    for core in reversed(cores[num_in:-1]):
        # (…, s·m, r) x (…, r, n) -> (…, s, m·n)
        right = (core.flatten(-3, -2) @ right).unflatten(-2, core.shape[-3:-1]).flatten(-2)
    return left, right


def init_cores(shape: TTShape, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Draw cores as the AdaZeta reference does: `randn / sqrt(r_{k+1}) · σ^(1/order)`, `σ = sqrt(1 / (in + out))`."""
    scale = (1 / (shape.in_features + shape.out_features)) ** (0.5 / len(shape.core_shapes))
    draw = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    return [draw(core_shape).to(dtype) * (scale / core_shape[2] ** 0.5) for core_shape in shape.core_shapes]


def dense_matrix(cores: Sequence[Tensor]) -> Tensor:
    """Return the full matrix `(in·out,)`, contracted core by core; for tests, as training never forms it."""
    dense = cores[0]
    for core in cores[1:]:
        dense = torch.tensordot(dense, core, dims=([-1], [0]))
    return dense.flatten()


class TTLinear(nn.Module):
    """A linear layer with TT cores as parameters; adapters in a model use slices of a flat vector instead.

    Args:
        in_features: Input width.
        out_features: Output width.
        rank: Every inner rank of the train.
        num_factors: Largest numbers of factors of the two widths.
        generator: Source of the initial values; seed 0 by default.

    Shape:
        Input `(…, in_features)`, output `(…, out_features)`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 5,
        num_factors: tuple[int, int] = (3, 3),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape = TTShape.balanced(in_features, out_features, rank, num_factors)
        generator = generator or torch.Generator().manual_seed(0)
        self.cores = nn.ParameterList(init_cores(self.shape, generator))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer without forming its matrix."""
        left, right = tt_matrices(list(self.cores), len(self.shape.in_factors))
        return x @ left @ right + self.bias

    def to_dense(self) -> Tensor:
        """Return the matrix `(in_features, out_features)` of the layer."""
        return dense_matrix(list(self.cores)).view(self.shape.in_features, self.shape.out_features)
