import pytest
import torch

from wandazeta.zeroth_order import Evaluations, RankSync
from wandazeta.zeroth_order.rank_sync import checksum


class Ranks:
    """Ranks that take turns in one process: what all of them sent is summed once the last one has."""

    def __init__(self, size, parallel="queries", lockstep=False):
        self.sent = []
        self.syncs = [RankSync(size, rank, self.reduce, parallel, lockstep) for rank in range(size)]

    def reduce(self, vector):
        self.sent.append(vector)
        return torch.stack(self.sent).sum(0)

    def gather(self, values, thetas, batches):
        """Return what the last rank sees, whose turn it is when all have sent."""
        (_, num_points), result = values[0].shape, None
        for sync, mine, theta, batch in zip(self.syncs, values, thetas, batches, strict=True):
            points = sync.local_points(num_points)
            # the others look at sums that are not complete
            sync._require_agreement, check = lambda *_: None, sync._require_agreement
            if sync is self.syncs[-1]:
                sync._require_agreement = check
            result = sync.gather(Evaluations(mine[:, points], tuple(points), 1), num_points, theta, batch)
        return result


VALUES = torch.linspace(-1, 1, 14, dtype=torch.float64).view(2, 7)
THETA = torch.linspace(-1, 1, 1001)
BATCH = torch.arange(24).view(4, 6)


@pytest.mark.parametrize("size", [2, 3, 9])
@pytest.mark.parametrize("lockstep", [False, True])
def test_points_come_together_bit_for_bit(size, lockstep):
    ranks = Ranks(size, lockstep=lockstep)
    shares = [sync.local_points(7) for sync in ranks.syncs]
    assert {point for share in shares for point in share} == set(range(7))
    if lockstep:
        assert len({len(share) for share in shares}) == 1
    else:
        assert sum(map(len, shares)) == 7
    result = ranks.gather([VALUES] * size, [THETA] * size, [BATCH] * size)
    assert torch.equal(result, VALUES)


def test_data_are_averaged_by_their_examples():
    ranks = Ranks(2, "data")
    result = ranks.gather([VALUES, VALUES + 1], [THETA] * 2, [BATCH[:1], BATCH[1:]])
    torch.testing.assert_close(result, VALUES + 0.75)


def test_a_loss_that_is_not_finite_stays_so():
    spoiled = VALUES.clone()
    spoiled[1, 3] = torch.nan
    result = Ranks(2).gather([spoiled] * 2, [THETA] * 2, [BATCH] * 2)
    assert result.isfinite().all(0).tolist() == [True] * 3 + [False] + [True] * 3


def one_bit_off(theta):
    theta[500] = torch.nextafter(theta[500], torch.tensor(2.0))


def swapped(theta):
    theta[[10, 20]] = theta[[20, 10]]


def sign_flipped(theta):
    theta[[10, 990]] *= -1


@pytest.mark.parametrize("change", [one_bit_off, swapped, sign_flipped])
@pytest.mark.parametrize("parallel", ["queries", "data"])
def test_any_difference_of_the_vector_is_noticed(change, parallel):
    other = THETA.clone()
    change(other)
    # their sums tell little: the first differs by 1e-7, the others not at all
    assert abs(other.double().sum() - THETA.double().sum()) < 1e-6
    with pytest.raises(RuntimeError, match="differ between ranks"):
        Ranks(4, parallel).gather([VALUES] * 4, [THETA, THETA, other, THETA], [BATCH] * 4)


def test_another_batch_is_noticed_where_it_must_not_be():
    batches = [BATCH, BATCH.flip(0)]
    with pytest.raises(ValueError, match="same batch"):
        Ranks(2).gather([VALUES] * 2, [THETA] * 2, batches)
    Ranks(2, "data").gather([VALUES] * 2, [THETA] * 2, batches)


def test_checksum_is_whole_and_small():
    for values in (THETA, BATCH, torch.full((5,), torch.nan), torch.randn(100_000)):
        marks = checksum(values)
        assert torch.equal(marks, marks.round())
        assert (marks >= 0).all()
        assert (marks < 2**16).all()
    assert not torch.equal(checksum(THETA), checksum(-THETA))
