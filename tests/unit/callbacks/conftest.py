import pytest

from wandazeta.pruning import session


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pruned"


@pytest.fixture
def forbid_pruning(monkeypatch):
    def forbid():
        def refuse(*args, **kwargs):
            raise AssertionError("pruned again")

        monkeypatch.setattr(session, "prune_blocks", refuse)

    return forbid
