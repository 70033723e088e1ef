"""Find out quickly whether the Hugging Face hub can be reached."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["offline_without_hub"]

_TIMEOUT = 3.0
"""Seconds to wait for the hub."""


@contextmanager
def offline_without_hub() -> Iterator[bool]:
    """Context manager in which only cached files of the hub are used if it cannot be reached.

    huggingface_hub repeats every request for half a minute; one request shows whether that is worth it. Its own
    `HF_HUB_OFFLINE` turns all requests off.

    Yields:
        Whether the hub is used.
    """
    from huggingface_hub import constants

    is_offline = constants.HF_HUB_OFFLINE
    # a module constant, which huggingface_hub and transformers read at every request
    constants.HF_HUB_OFFLINE = is_offline or not _answers(constants.ENDPOINT)
    try:
        yield not constants.HF_HUB_OFFLINE
    finally:
        constants.HF_HUB_OFFLINE = is_offline


def _answers(address: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        # any status is an answer
        get_session().head(address, timeout=_TIMEOUT)
    except Exception:  # its types depend on the HTTP library of huggingface_hub
        return False
    return True
