"""Entry point of the command line: `wandazeta`, `python -m wandazeta` and `torchrun -m wandazeta`."""

from importlib.metadata import PackageNotFoundError, distribution


def main() -> None:
    """Run the command line with the arguments of the process; see `wandazeta.cli.main.main`."""
    try:
        from wandazeta.cli.main import main as run
    except ModuleNotFoundError:
        try:
            distribution("wandazeta")
        except PackageNotFoundError:
            raise SystemExit("error: wandazeta is not installed; run `pip install -e .` in the checkout") from None
        raise
    run()


if __name__ == "__main__":
    main()
