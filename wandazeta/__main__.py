"""Entry point of the command line: `wandazeta`, `python -m wandazeta` and `torchrun -m wandazeta`."""

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line with the arguments of the process; see `wandazeta.cli.main.main`."""
    # only an installation maps the folder callbacks/ into the package
    if find_spec("wandazeta.callbacks") is None:
        raise SystemExit("error: wandazeta is not installed; run `pip install -e .` in the checkout")
    if sys.argv[1:2] == ["bench"]:
        from wandazeta.cli.bench import main as bench

        bench(sys.argv[2:])
        return
    from wandazeta.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
