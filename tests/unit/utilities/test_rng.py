import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from wandazeta.utilities.rng import isolated_rng, preserve_generators


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def seed_all():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def test_global_generators_are_seeded_and_put_back():
    with isolated_rng(3):
        inside = draw()
    seed_all()
    expected = draw()
    seed_all()
    with isolated_rng(3):
        assert draw() == inside
    assert draw() == expected
    seed_all()
    with pytest.raises(ZeroDivisionError), isolated_rng(3):
        _ = draw()[0] / 0
    assert draw() == expected


def test_the_generators_of_a_loader_are_put_back():
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(list(range(8)), shuffle=True, generator=generator)
    with preserve_generators(loader):
        first = [int(batch) for batch in loader]
    assert [int(batch) for batch in loader] == first
    assert [int(batch) for batch in loader] != first
