from itertools import product
from math import prod

import pytest
import torch

from wandazeta.adapters import AdapterLayout, TTLinear, TTShape, factorise, tt_matrices

WIDTHS = [64, 128, 384, 576, 640, 768, 1024, 1536, 2048, 3072, 4096, 5120, 8192]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("down", [True, False])
def test_fast_forward_equals_dense_matrix(width, down):
    layer = TTLinear(*((width, 64) if down else (64, width)), generator=torch.Generator().manual_seed(width))
    with torch.no_grad():
        layer.bias.normal_(generator=torch.Generator().manual_seed(1))
        x = torch.randn(2, 5, layer.shape.in_features, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(layer(x), x @ layer.to_dense() + layer.bias, atol=1e-5, rtol=1e-5)


def test_matrix_entries_are_products_of_core_slices():
    shape = TTShape((2, 3), (2, 2, 3), rank=4)
    generator = torch.Generator().manual_seed(0)
    cores = [torch.randn(size, generator=generator, dtype=torch.float64) for size in shape.core_shapes]
    left, right = tt_matrices(cores, 2)
    dense = left @ right
    assert dense.shape == (6, 12)
    for entry, index in enumerate(product(*(range(core.shape[1]) for core in cores))):
        slices = [core[:, i] for core, i in zip(cores, index, strict=True)]
        expected = torch.linalg.multi_dot(slices).item()
        assert dense.flatten()[entry].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("factors", [((5,), (7,)), ((5,), (2, 2)), ((2, 3), (7,))])
def test_single_factor_halves(factors):
    shape = TTShape(*factors, rank=3)
    cores = [torch.randn(size) for size in shape.core_shapes]
    left, right = tt_matrices(cores, len(shape.in_factors))
    assert left.shape == (shape.in_features, 3)
    assert right.shape == (3, shape.out_features)


def test_leading_dimensions_are_batched():
    shape = TTShape((2, 3), (2, 2), rank=2)
    cores = [torch.randn(3, 4, *size) for size in shape.core_shapes]
    left, right = tt_matrices(cores, 2)
    assert left.shape == (3, 4, 6, 2)
    one_left, one_right = tt_matrices([core[2, 1] for core in cores], 2)
    torch.testing.assert_close(left[2, 1], one_left)
    torch.testing.assert_close(right[2, 1], one_right)


def test_paper_shapes():
    down = TTShape.balanced(4096, 64, 5)
    assert (down.in_factors, down.out_factors) == ((16, 16, 16), (4, 4, 4))
    assert down.mirrored() == TTShape((4, 4, 4), (16, 16, 16), 5)
    roberta = TTShape.balanced(1024, 64, 5, num_factors=(3, 2))
    assert roberta.in_factors + roberta.out_factors == (8, 8, 16, 8, 8)
    assert roberta.mirrored().core_shapes == ((1, 8, 5), (5, 8, 5), (5, 16, 5), (5, 8, 5), (5, 8, 1))


def test_paper_trainable_counts():
    llama = AdapterLayout([4096] * 3 * 32)
    assert llama.num_parameters == 610_560
    biases = sum(part.stop - part.start for part in llama.bias_slices())
    assert round(biases / llama.num_parameters, 2) == 0.65
    assert AdapterLayout([1024] * 2 * 24, num_factors=(3, 2)).num_parameters == 136_704


@pytest.mark.parametrize("width", [*range(1, 200), *WIDTHS, 2304, 3584, 11008, 14336, 7919])
def test_factorise_every_width(width):
    factors = factorise(width)
    assert prod(factors) == width
    assert len(factors) <= 3
    assert factors == sorted(factors)
    assert 1 not in factors or width == 1


@pytest.mark.parametrize("width", [60, 64, 96, 210, 576, 1024, 1536])
@pytest.mark.parametrize("num_factors", [1, 2, 3])
def test_factorise_is_the_most_balanced(width, num_factors):
    splits = [s for s in product(range(1, width + 1), repeat=num_factors - 1) if prod(s) and width % prod(s) == 0]
    # factors of one carry no core, so they do not count
    smallest = min(sum(f for f in (*s, width // prod(s)) if f > 1) for s in splits)
    assert sum(factorise(width, num_factors)) == smallest


@pytest.mark.parametrize(("width", "num_factors"), [(0, 3), (-4, 3), (64, 0)])
def test_factorise_refuses(width, num_factors):
    with pytest.raises(ValueError, match="Expected argument"):
        factorise(width, num_factors)
