"""Entry point of the command line: `wandazeta`, `python -m wandazeta` and `torchrun -m wandazeta`."""

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line with the arguments of the process.

    `wandazeta.cli.functions` has the commands that are functions, `wandazeta.cli.main` those of LightningCLI.
    """
    # only an installation maps the folder callbacks/ into the package
    if find_spec("wandazeta.callbacks") is None:
        raise SystemExit("error: wandazeta is not installed; run `pip install -e .` in the checkout")
    from wandazeta.cli import functions

    if functions.handles(sys.argv[1:]):
        functions.main(sys.argv[1:])
    else:
        # imported here, because it takes seconds
        from wandazeta.cli.main import main as run

        run()


if __name__ == "__main__":
    main()
