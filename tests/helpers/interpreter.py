"""Run programs in Triton's interpreter, where kernels run on a CPU."""

import os
import subprocess
import sys


def run_interpreted(*arguments):
    """Run Python with arguments, in a process of its own as Triton decides at its import whether it interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
