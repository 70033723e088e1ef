"""Record the results of the cases of `same_bits_cases.py` for the processor of this machine.

Checksums that are recorded already are compared and never replaced.

OMP_NUM_THREADS=1 .venv/bin/python tests/helpers/record_same_bits.py [--file tests/data/same_bits.json] [--reverse]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def main() -> None:
    """Run all cases and add what is not recorded yet; fail if anything differs from what is."""
    from helpers.same_bits import checksum, processor, run_case, run_rank_cases, statistics
    from helpers.same_bits_cases import CASES, RANK_CASES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=REPOSITORY / "tests" / "data" / "same_bits.json")
    parser.add_argument("--reverse", action="store_true", help="run the cases in the reverse order")
    options = parser.parse_args()
    git = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    commit = git.stdout.strip()
    record = {"commit": commit, "bits": {}, "figures": {}}
    if options.file.exists():
        record = json.loads(options.file.read_text())
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for index, name in enumerate(reversed(CASES) if options.reverse else CASES):
            folder = Path(root) / str(index)
            folder.mkdir()
            found[name] = run_case(CASES[name], folder)
            print(name, flush=True)  # noqa: T201
        found |= run_rank_cases(Path(root) / "ranks")
    if processor() not in record["bits"] and commit != record["commit"]:
        # later code has added this processor, which proves nothing about the commit of the first one
        record.setdefault("added", {})[processor()] = commit
    bits = record["bits"].setdefault(processor(), {})
    different = []
    for name in (*CASES, *RANK_CASES):
        now = {group: checksum(tensors) for group, tensors in found[name].items()}
        if bits.setdefault(name, now) != now:
            different.append(name)
        record["figures"].setdefault(name, {group: statistics(tensors) for group, tensors in found[name].items()})
    if different:
        sys.exit(f"Expected the recorded checksums, but these cases differ: {', '.join(different)}")
    options.file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
