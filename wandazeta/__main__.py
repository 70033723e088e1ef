"""Entry point of the command line: `wandazeta`, `python -m wandazeta` and `torchrun -m wandazeta`."""

import sys
from importlib.util import find_spec

from wandazeta.cli.help import short_help, without_all


def main() -> None:
    """Run the command line with the arguments of the process; see `wandazeta.cli.main.main`."""
    # only an installation maps the folder callbacks/ into the package
    if find_spec("wandazeta.callbacks") is None:
        raise SystemExit("error: wandazeta is not installed; run `pip install -e .` in the checkout")
    # before torch and Lightning, whose import takes seconds
    if (text := short_help(sys.argv[1:])) is not None:
        sys.stdout.write(f"{text}\n")
        return
    # also for the processes of other ranks, which Lightning starts with the same arguments
    sys.argv[1:] = without_all(sys.argv[1:])
    from wandazeta.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
