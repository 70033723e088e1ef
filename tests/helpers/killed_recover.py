"""Runs `wandazeta recover` to the end, and in another folder killed by SIGKILL on the way and started again.

This process imports everything once and each run is a fork of it. What the runs print is left beside their folders.
"""

import os
import signal
import sys
import time
import traceback
from pathlib import Path

PATIENCE_S = 300

root, arguments = Path(sys.argv[1]), sys.argv[2:]

import torch  # noqa: E402

from wandazeta.cli import functions, recover  # noqa: E402, F401 (else every fork imports it anew)

torch.set_num_threads(1)
os.chdir(root)


def start(output, name):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, stream in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{name}.{stream}", os.O_CREAT | os.O_WRONLY), number)
            functions.main([*arguments, "--output_dir", output])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def end(child):
    assert os.waitpid(child, 0)[1] == 0


end(start("whole", "whole"))
killed = start("killed", "killed")
deadline = time.monotonic() + PATIENCE_S
while not Path("killed/progress/checkpoints/last.ckpt").exists():
    assert time.monotonic() < deadline
    time.sleep(0.001)
os.kill(killed, signal.SIGKILL)
assert os.WIFSIGNALED(os.waitpid(killed, 0)[1]), "it had ended: nothing was tested"
assert not Path("killed/config.json").exists()
end(start("killed", "resumed"))
# nothing is left to do
end(start("killed", "repeated"))
