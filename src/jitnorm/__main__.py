"""`python -m jitnorm`: the same as `jitnorm`."""

from jitnorm.cli import main

main(prog_name="python -m jitnorm")
