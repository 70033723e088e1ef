"""`python left_threads.py …` is `wandazeta …`; it fails if threads of gloo are alive after the command.

Such a thread aborts the process now and then: when it needs the interpreter while that ends.
"""

import time
from pathlib import Path


def gloo_threads():
    """The threads of gloo in this process; one that ends is given a moment."""
    deadline = time.monotonic() + 10
    while True:
        names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
        left = [name for name in names if "gloo" in name]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


if __name__ == "__main__":
    from wandazeta.__main__ import main

    main()
    assert gloo_threads() == []
