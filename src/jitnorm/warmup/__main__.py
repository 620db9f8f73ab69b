"""Run `python -m jitnorm.warmup`, which is the same as `jitnorm warmup`."""

from jitnorm.cli.warmup import warmup

if __name__ == "__main__":
    warmup(prog_name="python -m jitnorm.warmup")
