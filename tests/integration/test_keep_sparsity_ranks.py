"""Two processes on gloo hold the same masks as a plain loop over both their batches."""

import pytest
import torch
from helpers.masked import is_positive_zero, prunable, reference, sparse_tiny
from helpers.processes import run


@pytest.mark.parametrize("prune", [False, True], ids=["pruned before", "pruned by the callback"])
def test_two_ranks_train_what_a_plain_loop_trains(tmp_path, prune):
    ranks = run("masked_run", {"steps": 4, "prune": prune}, tmp_path)
    assert len(ranks) == 2
    plain = sparse_tiny()
    pruned = {name: weight == 0 for name, weight in prunable(plain).items()}
    reference(plain, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), 4, clip=0.05, ranks=2)
    for rank in ranks:
        for name, weight in plain.named_parameters():
            assert torch.equal(rank["weights"][name], ranks[0]["weights"][name]), name
            # the order of a sum differs
            torch.testing.assert_close(rank["weights"][name], weight.detach(), atol=1e-5, rtol=1e-4)
        for name, places in pruned.items():
            assert is_positive_zero(rank["weights"][name][places])
            assert is_positive_zero(rank["moments"][name][places])
            assert bool(rank["moments"][name][~places].any())
