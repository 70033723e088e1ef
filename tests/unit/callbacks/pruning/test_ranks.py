import pytest
import torch

from wandazeta.callbacks.pruning.ranks import Ranks


def test_every_sample_belongs_to_one_rank_and_keeps_its_order():
    drawn = [7, 2, 5, 0, 3, 6]
    shares = [Ranks(rank, 3).own(drawn) for rank in range(3)]
    # the samples of rank r are r, r + 3, r + 6, …
    assert [[3 * place + rank for place in share] for rank, share in enumerate(shares)] == [[0, 3, 6], [7], [2, 5]]
    assert Ranks().own(drawn) == drawn


def test_alone_nothing_is_exchanged():
    ranks, tensor = Ranks(), torch.ones(2)
    ranks.sum_([tensor])
    ranks.broadcast_([tensor])
    assert tensor.tolist() == [1.0, 1.0]
    assert (ranks.total(2.5), ranks.first("a"), ranks.together(lambda: 3)) == (2.5, "a", 3)
    with pytest.raises(ZeroDivisionError):
        ranks.together(lambda: 1 / 0)


def test_without_a_process_group_it_is_alone():
    ranks = Ranks.of_process_group("cpu")
    assert (ranks.rank, ranks.size) == (0, 1)
