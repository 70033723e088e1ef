import pytest
from huggingface_hub import constants

from wandazeta.utilities.hub import offline_without_hub


class Session:
    def __init__(self, error=None):
        self.error, self.asked = error, []

    def head(self, address, timeout):
        assert timeout <= 5
        self.asked.append(address)
        if self.error is not None:
            raise self.error


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def use(error=None):
        made = Session(error)
        monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: made)
        return made

    return use


@pytest.mark.parametrize("error", [None, OSError("Name or service not known"), TimeoutError()])
def test_the_hub_is_asked_once_and_left_alone_if_it_does_not_answer(session, error):
    made = session(error)
    with offline_without_hub() as uses_hub:
        assert uses_hub == (error is None)
        assert constants.is_offline_mode() == (error is not None)
    assert made.asked == [constants.ENDPOINT]
    assert not constants.is_offline_mode()


def test_who_works_offline_is_not_asked(session, monkeypatch):
    made = session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with offline_without_hub() as uses_hub:
        assert not uses_hub
    assert made.asked == []
    assert constants.is_offline_mode()
