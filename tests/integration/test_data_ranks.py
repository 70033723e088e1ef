import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "helpers" / "record_batches.py"


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["queries", "data", "silent"])
def test_what_two_processes_see(sharing, tmp_path):
    source = tmp_path / "text.txt"
    # hexadecimal digits: no two windows are alike
    paragraphs = [hashlib.sha256(bytes([index])).hexdigest()[:20] for index in range(40)]
    source.write_text("\n\n".join(paragraphs))
    command = [sys.executable, PROGRAM, sharing, source, tmp_path / "seen"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    first, second = (json.loads((tmp_path / f"seen.{rank}.json").read_text()) for rank in range(2))
    assert len(first) == len(second) > 2
    if sharing == "queries":
        assert first == second
    else:
        # no window twice in an epoch, whichever process sees it
        windows = [tuple(window) for batch in first + second for window in batch]
        assert len(set(windows)) == len(windows)
