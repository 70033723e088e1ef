import os
import sys
from pathlib import Path

import pytest

# shared helpers are imported as `helpers.…`; test files themselves are not on the path (importlib mode)
sys.path.insert(0, str(Path(__file__).parent))
# tests never reach for a hub, and small matrices are slower on two threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# the repository's own cache, as the Makefile sets it, so that a bare `pytest` finds the samples too
os.environ.setdefault("WANDAZETA_CACHE", str(Path(__file__).parents[1] / ".cache" / "wandazeta"))


def pytest_collection_modifyitems(items):
    from wandazeta.data.samples import cache_folder

    wanted = [cache_folder() / name for name in ("smollm2-135m", "wikipedia.jsonl", "rotten-tomatoes.jsonl")]
    missing = [path.name for path in wanted if not path.exists()]
    if missing:
        reason = f"no {', '.join(missing)} in {cache_folder()}; run `make samples`"
        for item in items:
            if item.get_closest_marker("samples"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repository():
    return Path(__file__).parents[1]
