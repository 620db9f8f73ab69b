"""The command `jitnorm`: looks after the cache, warms it up, says what this machine can build, and benchmarks."""

from __future__ import annotations

import click

from jitnorm._version import __version__
from jitnorm.cli import bench, cache, demo, doctor, verify, warmup
from jitnorm.cli.base import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="jitnorm")
def main() -> None:
    """Just-in-time compiled CUDA and CPU kernels: their cache, their warm-up, this machine, and their benchmarks."""


for command in (bench.bench, cache.cache, demo.demo, doctor.doctor, verify.verify_invariance, warmup.warmup):
    main.add_command(command)
