"""`python -m jitnorm`: the same as `jitnorm`."""

from jitnorm.cli import main

if __name__ == "__main__":
    main(prog_name="python -m jitnorm")
