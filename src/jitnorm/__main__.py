"""Run the command `jitnorm` as `python -m jitnorm`."""

from jitnorm.cli import main

if __name__ == "__main__":
    main(prog_name="python -m jitnorm")
