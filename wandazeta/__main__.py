"""Entry point of the command line: `wandazeta`, `python -m wandazeta` and `torchrun -m wandazeta`."""

from importlib.util import find_spec


def main() -> None:
    """Run the command line with the arguments of the process; see `wandazeta.cli.main.main`."""
    # only an installation maps the folder callbacks/ into the package
    if find_spec("wandazeta.callbacks") is None:
        raise SystemExit("error: wandazeta is not installed; run `pip install -e .` in the checkout")
    from wandazeta.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
