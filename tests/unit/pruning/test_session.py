"""The preparation of a pruning: everything once."""

from collections import Counter

import pytest
import torch
from helpers.prune_options import make_options
from helpers.pruning import Tiny, loader

from wandazeta.pruning import PruningSession, calibration, pruner, session
from wandazeta.pruning.progress.folder import ProgressFolder
from wandazeta.utilities.ranks import Ranks


class WithTeacher(Tiny):
    """Holds another model that its forward does not run."""

    def __init__(self):
        super().__init__()
        self.teacher = Tiny(seed=1, num_blocks=5)


@pytest.mark.parametrize("kind", [Tiny, WithTeacher])
def test_blocks_are_found_and_checked_and_rows_split_once(tmp_path, monkeypatch, kind):
    calls, module = Counter(), kind()
    watched = [(session, "find_blocks"), (session, "validate_layers"), (session, "block_lists")]
    watched += [(session, "collect_rows"), (calibration, "split_rows"), (pruner, "capture_samples")]
    for owner, name in watched:
        original = getattr(owner, name)

        def count(*args, original=original, name=name, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, count)
    run = PruningSession(
        module=module,
        options=make_options(rounds=1, samples_per_round=4).for_samples(8),
        folder=ProgressFolder(tmp_path),
        forward=lambda batch: module(batch[0]),
        token_mask=lambda batch: None,
        num_samples=8,
    )
    cpu = {"device": torch.device("cpu"), "ranks": Ranks(), "should_stop": lambda: False, "show_progress": False}
    report = run.run(loader, **cpu)
    assert report.sparsity == 0.5
    assert not run.was_complete
    # two batches of four rows
    assert calls == {name: 1 for _, name in watched} | {"split_rows": 2}
