"""Kills a training at random instants and starts it again each time, until it ends by itself."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path


def main():
    """Run the JSON file's settings: whole once, then killed; writes how often, and what both ended with."""
    from helpers import zo_run

    from wandazeta.modules import ZerothOrderModule

    settings = json.loads(Path(sys.argv[1]).read_text())
    root, kills = Path(settings["root"]), settings.pop("kills")
    random.seed(settings.pop("kill_seed"))
    # imports are paid for once, here; nothing back-propagates, which torch would refuse after a fork
    ZerothOrderModule(settings["model_dir"])
    _child(zo_run, settings | {"root": str(root / "whole")})
    lives = 0
    settings["root"], steps_seen = str(root / "killed"), []
    while True:
        kill_after = (random.randint(1, 5), random.uniform(0, 0.05)) if lives < kills else None
        steps_seen.append(_child(zo_run, settings | {"resume": lives > 0}, kill_after))
        if kill_after is None:
            break
        lives += 1
    (root / "kills.json").write_text(json.dumps({"kills": lives, "steps": steps_seen}))


def _child(zo_run, settings, kill_after=None):
    """Train in a fork; kill it the given time after it has begun its n-th step. Returns the steps that it began."""
    Path(settings["root"]).mkdir(exist_ok=True)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        sys.argv[1] = str(Path(settings["root"]) / "settings.json")
        Path(sys.argv[1]).write_text(json.dumps(settings | {"step_pipe": writer}))
        try:
            zo_run.main()
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    begun = []
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while step := pipe.read(4):
            begun.append(int.from_bytes(step, "little"))
            if kill_after and len(begun) == kill_after[0]:
                time.sleep(kill_after[1])
                os.kill(pid, signal.SIGKILL)
                break
    status = os.waitpid(pid, 0)[1]
    expected = -signal.SIGKILL if kill_after else 0
    assert os.waitstatus_to_exitcode(status) == expected, "the training ended otherwise than it should"
    return begun


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
