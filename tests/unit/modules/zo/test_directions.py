import pytest
import torch

from wandazeta.modules.zo import direction
from wandazeta.modules.zo.directions import MAX_QUERIES, stream


def test_drawn_again_bit_exactly():
    first = direction(7, 3, 2, 1000)
    torch.randn(5)
    torch.manual_seed(123)
    assert torch.equal(direction(7, 3, 2, 1000), first)
    assert first.dtype == torch.float32


def test_global_rng_is_neither_read_nor_moved():
    state = torch.random.get_rng_state()
    direction(0, 0, 0, 100)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_distinct_over_step_and_query():
    drawn = torch.stack([direction(0, step, query, 64) for step in range(20) for query in range(20)])
    cosine = torch.nn.functional.normalize(drawn) @ torch.nn.functional.normalize(drawn).T
    assert (cosine - torch.eye(400)).abs().max() < 0.75
    assert not torch.equal(direction(0, 0, 0, 64), direction(1, 0, 0, 64))


@pytest.mark.parametrize("seed", [0, 1, 42, 2**40, -5])
def test_no_two_streams_of_a_run_collide(seed):
    # 200,000 hashes of 32 bits would have about five collisions
    streams = {stream(seed, step, query) for step in range(12_500) for query in range(16)}
    assert len(streams) == 200_000
    assert all(0 <= value < 2**32 for value in streams)


def test_streams_follow_the_whole_seed():
    assert len({stream(seed, 0, 0) for seed in (0, 1, 2**32, 2**33, -1)}) == 5


def test_the_generator_ignores_the_upper_half_of_a_seed():
    # why streams are 32 bits wide; if this fails, torch has changed and they may be wider
    low, high = (torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5 + 2**32))
    assert torch.equal(low, high)


def test_values_are_standard_normal():
    z = direction(0, 0, 0, 200_000)
    assert abs(z.mean().item()) < 0.01
    assert z.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("step", "query"), [(-1, 0), (0, -1), (0, MAX_QUERIES)])
def test_out_of_range(step, query):
    with pytest.raises(ValueError, match="Expected argument"):
        direction(0, step, query, 4)
