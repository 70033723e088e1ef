"""`python -m wandazeta`, as `torchrun -m wandazeta` starts it."""

from wandazeta.cli import main

if __name__ == "__main__":
    main()
