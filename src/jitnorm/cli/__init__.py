"""The command `jitnorm`: manages the cache, builds kernels ahead of time, checks this machine, and benchmarks."""

from __future__ import annotations

import click

from jitnorm._version import __version__
from jitnorm.cli.base import LazyGroup

_COMMANDS = {
    "bench": ("jitnorm.cli.bench:bench", "Compare runs of a benchmark, and measure a server."),
    "cache": ("jitnorm.cli.cache:cache", "List, verify, move and remove compiled kernels."),
    "demo": ("jitnorm.cli.demo:demo", "Build two kernels, check them and time them."),
    "doctor": ("jitnorm.cli.doctor:doctor", "Report what this machine can build."),
    "verify-invariance": ("jitnorm.cli.verify:verify_invariance", "Compare rows alone and in batches, bit by bit."),
    "warmup": ("jitnorm.cli.warmup:warmup", "Build kernels ahead of their first call."),
    "wheel": ("jitnorm.cli.wheel:wheel", "Pack compiled kernels as a Python package."),
}


@click.group(cls=LazyGroup, lazy_commands=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="jitnorm")
def main() -> None:
    """Manage just-in-time compiled CUDA and CPU kernels: their cache, builds ahead of time, and benchmarks."""
