"""Entry point of the command line: `wandazeta`, `python -m wandazeta` and `torchrun -m wandazeta`."""

import sys
from importlib.util import find_spec

from wandazeta.cli.help import is_function, short_help, without_all


def main() -> None:
    """Run the command line with the arguments of the process.

    `wandazeta.cli.functions` has the commands that are functions, `wandazeta.cli.main` those of LightningCLI.
    """
    # only an installation maps the folder callbacks/ into the package
    if find_spec("wandazeta.callbacks") is None:
        raise SystemExit("error: wandazeta is not installed; run `pip install -e .` in the checkout")
    arguments = without_all(sys.argv[1:])
    wants_everything = arguments != sys.argv[1:]
    # of `prune`, everything is what LightningCLI has
    if is_function(arguments) and not (wants_everything and arguments[0] == "prune"):
        from wandazeta.cli import functions

        functions.main(arguments)
    elif (text := short_help(sys.argv[1:])) is not None:
        sys.stdout.write(f"{text}\n")
    else:
        # also for the processes of other ranks, which Lightning starts with the same arguments
        sys.argv[1:] = arguments
        # imported here, because torch and Lightning take seconds
        from wandazeta.cli.main import main as run

        run()


if __name__ == "__main__":
    main()
