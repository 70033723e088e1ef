import pytest
import torch

from wandazeta.utilities.precision import default_dtype
from wandazeta.utilities.random_streams import MAX_QUERIES, drawn_by, stream
from wandazeta.zeroth_order import direction, directions_of_step, rademacher

both = pytest.mark.parametrize("draw", [direction, rademacher])


@both
def test_drawn_again_bit_exactly(draw):
    first = draw(7, 3, 2, 1000)
    torch.randn(5)
    torch.manual_seed(123)
    assert torch.equal(draw(7, 3, 2, 1000), first)
    assert first.dtype == torch.float32


@both
def test_global_rng_is_neither_read_nor_moved(draw):
    state = torch.random.get_rng_state()
    draw(0, 0, 0, 100)
    assert torch.equal(torch.random.get_rng_state(), state)


@both
def test_distinct_over_step_and_query(draw):
    drawn = torch.stack([draw(0, step, query, 64) for step in range(20) for query in range(20)])
    cosine = torch.nn.functional.normalize(drawn) @ torch.nn.functional.normalize(drawn).T
    assert (cosine - torch.eye(400)).abs().max() < 0.75
    assert not torch.equal(draw(0, 0, 0, 64), draw(1, 0, 0, 64))


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


def test_signs_are_fair():
    z = rademacher(0, 0, 0, 200_000)
    assert set(z.tolist()) == {-1.0, 1.0}
    assert abs(z.mean().item()) < 0.01
    # neighbours do not know of each other
    assert abs((z[1:] * z[:-1]).mean().item()) < 0.01


def test_directions_of_a_step_have_the_type_of_the_vector():
    theta = torch.zeros(6, dtype=torch.float64)
    drawn = directions_of_step(theta, 4, 7, rademacher)(2)
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn, rademacher(4, 7, 2, 6).double())


@both
@pytest.mark.parametrize(("step", "query"), [(-1, 0), (0, -1), (0, MAX_QUERIES)])
def test_out_of_range(step, query, draw):
    with pytest.raises(ValueError, match="Expected argument"):
        draw(0, step, query, 4)


@both
def test_defaults_of_torch_do_not_change_the_directions(draw):
    expected = draw(3, 1, 2, 50)
    assert expected.dtype == torch.float32
    with default_dtype(torch.bfloat16), torch.device("meta"):
        found = draw(3, 1, 2, 50)
    assert torch.equal(found, expected)
    assert torch.get_default_dtype() == torch.float32


@both
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_its_directions_without_the_host(draw):
    state = torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, again, other = (draw(7, 3, query, 300_000, "cuda") for query in (2, 2, 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)
    assert abs((first * other).mean().item()) < 0.01
    assert first.square().mean().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert drawn_by("cuda") == torch.cuda.get_device_name() != drawn_by("cpu") == "cpu"
