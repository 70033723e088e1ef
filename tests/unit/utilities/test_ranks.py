import pytest
import torch
from helpers.processes import fork_ranks
from torch import nn

from wandazeta.pruning.method.statistics import InputStatistics
from wandazeta.utilities.ranks import Ranks


def test_every_sample_belongs_to_one_rank_and_keeps_its_order():
    drawn = [7, 2, 5, 0, 3, 6]
    shares = [Ranks(rank, 3).local_indices(drawn) for rank in range(3)]
    # the samples of rank r are r, r + 3, r + 6, …
    assert [[3 * place + rank for place in share] for rank, share in enumerate(shares)] == [[0, 3, 6], [7], [2, 5]]
    assert Ranks().local_indices(drawn) == drawn


def test_alone_nothing_is_exchanged():
    ranks, tensor = Ranks(), torch.ones(2)
    ranks.all_reduce_([tensor])
    ranks.broadcast_([tensor])
    assert tensor.tolist() == [1.0, 1.0]
    assert (ranks.sum(2.5), ranks.broadcast_object("a"), ranks.run_on_all(lambda: 3)) == (2.5, "a", 3)
    with pytest.raises(ZeroDivisionError):
        ranks.run_on_all(lambda: 1 / 0)


def test_without_a_process_group_it_is_alone():
    ranks = Ranks.of_process_group("cpu")
    assert (ranks.rank, ranks.size) == (0, 1)


def test_two_ranks_exchange(tmp_path):
    def work(rank, size):
        ranks = Ranks.of_process_group("cpu")
        assert (ranks.rank, ranks.size) == (rank, size)
        # a transposed view is copied to be sent, and must come back
        sums = [torch.full((2,), 1.0 + rank), torch.arange(6.0).view(2, 3).t()]
        ranks.all_reduce_(sums)
        sent = torch.full((2,), 5.0 + rank)
        ranks.broadcast_([sent])
        refusal = ""
        try:
            ranks.run_on_all(lambda: 1 / (1 - rank))
        except (ValueError, ZeroDivisionError) as error:
            refusal = f"{type(error).__name__}: {error}"
        return {
            "sums": [tensor.contiguous() for tensor in sums],
            "sent": sent,
            # more digits than float32 has
            "total": ranks.sum(2.0**30 + rank),
            "first": ranks.broadcast_object(f"from {rank}"),
            "together": ranks.run_on_all(lambda: rank),
            "refusal": refusal,
        }

    results = fork_ranks(work, tmp_path)
    for rank, result in enumerate(results):
        assert torch.equal(result["sums"][0], torch.full((2,), 3.0))
        assert torch.equal(result["sums"][1], 2 * torch.arange(6.0).view(2, 3).t())
        assert result["sent"].tolist() == [5.0, 5.0]
        assert (result["total"], result["first"], result["together"]) == (2**31 + 1, "from 0", rank)
    assert results[0]["refusal"].startswith("ValueError: Failed on rank 1: ")
    assert results[1]["refusal"].startswith("ZeroDivisionError: ")


def test_statistics_of_two_ranks_are_those_of_one(tmp_path):
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("both", "one", "none")})
    samples = [torch.randn(1, 4 + i, 3) for i in range(3)]

    def measure(own, ranks):
        statistics = InputStatistics(layers, with_gram=True)
        with statistics.collect(), torch.no_grad():
            for index in own:
                with statistics.sample():
                    layers["both"](samples[index])
                    if index == 1:  # an expert that no sample of another rank is sent to
                        layers["one"](2 * samples[index])
        statistics.all_reduce(ranks)
        found = {name: (statistics.norm(name), statistics._grams[name]) for name in ("both", "one")}
        with pytest.raises(ValueError, match="`none` did not"):
            statistics.norm("none")
        return {"found": found, "num_samples": statistics.num_samples}

    alone = measure(range(3), Ranks())
    shared = fork_ranks(lambda rank, size: measure(range(rank, 3, size), Ranks.of_process_group("cpu")), tmp_path)
    for result in shared:
        assert result["num_samples"] == alone["num_samples"] == 3
        for name, (norm, gram) in result["found"].items():
            torch.testing.assert_close(norm, alone["found"][name][0])
            torch.testing.assert_close(gram, alone["found"][name][1])
