"""`python -m jitnorm.warmup`: the same as `jitnorm warmup`."""

from jitnorm.cli.warmup import warmup

warmup(prog_name="python -m jitnorm.warmup")
