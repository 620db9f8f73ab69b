"""`jitnorm warmup`: kernels built ahead of their first call."""

from __future__ import annotations

import click
from tqdm import tqdm

from jitnorm.cli.base import Command, several
from jitnorm.jit import locations
from jitnorm.jit.spec import KernelSpec
from jitnorm.warmup import DTYPES, OPS, argument_problem, make_plan
from jitnorm.warmup.run import Result, build_all, default_jobs, find_cached, prepare

_DTYPE = click.Choice(list(DTYPES))


@click.command(
    cls=Command,
    context_settings={"help_option_names": ["-h", "--help"]},
    short_help="Build kernels ahead of their first call.",
)
@click.option(
    "--op",
    **several(click.Choice(list(OPS))),
    is_eager=True,  # a wrong one is named before all else
    metavar="NAME",
    help=f"By default all that the model of --config calls, or rmsnorm. One of {', '.join(OPS)}.",
)
@click.option(
    "--hidden-size",
    **several(click.INT),
    help="The size of the normalised dimension, which may be head_dim. Activations and store_cache do without; "
    "quantisation alone takes none.",
)
@click.option("--dtype", **several(_DTYPE), help="The input's; by default the config's own, or bf16.")
@click.option("--weight-dtype", **several(_DTYPE), help="The weight's; by default the input's.")
@click.option("--config", metavar="PATH", help="A Hugging Face config.json, or the folder that holds one.")
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), help="By default CUDA where torch sees a GPU, else the CPU."
)
@click.option(
    "--arch", **several(click.STRING), help="A CUDA architecture such as 9.0a or sm_90a, with no GPU of it here."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Builds at a time; by default one for each CPU.")
@click.option("--skip-unsupported", is_flag=True, help="A size that is not supported is reported, and is no failure.")
def warmup(
    op: tuple[str, ...],
    hidden_size: tuple[int, ...],
    dtype: tuple[str, ...],
    weight_dtype: tuple[str, ...],
    config: str | None,
    device: str | None,
    arch: tuple[str, ...],
    jobs: int | None,
    skip_unsupported: bool,
) -> None:
    """Build kernels ahead of their first call, for this machine or another.

    Every combination of the given operators, sizes, dtypes and architectures is built, several at a time; of each,
    several are given as a list (512,1024) or by repeating the option. Sizes that are not
    supported are listed first. One given as --hidden-size then stops everything; with one from a config the rest is
    built. Either way the exit status is 1 unless all that was asked for is in the cache (see --skip-unsupported).

    \b
    jitnorm warmup --config Qwen3-32B/config.json
    jitnorm warmup --hidden-size 4096,128 --dtype bf16 --arch 8.0,9.0a
    jitnorm warmup --op silu_and_mul,store_cache --dtype bf16
    """
    names = ("--hidden-size", "--config", "--weight-dtype")
    if problem := argument_problem(op, hidden_size, weight_dtype, config, names):
        raise click.UsageError(problem)
    plan = make_plan(op or None, hidden_size, dtype, weight_dtype, device, arch, config, skip_unsupported)
    for note in plan.notes:
        click.echo(f"note: {note}", err=True)
    for why in plan.refused:
        click.echo(f"refused  {why}", err=True)
    cached, missing = find_cached(plan.specs)
    for spec in cached:
        click.echo(f"cached   {_row(spec)}")
    result = Result(cached=cached, refused=plan.refused)
    if missing:
        _build(missing, jobs or default_jobs(), result)
    click.echo(f"{result}; the cache is {locations.readable().root}")
    if result.failed or (result.refused and not skip_unsupported):
        raise click.exceptions.Exit(1)


def _build(specs: list[KernelSpec], jobs: int, result: Result) -> None:
    prepare(specs)
    click.echo(f"{len(specs)} to build, {min(jobs, len(specs))} at a time")
    # disable=None: a bar on a terminal, and elsewhere the lines alone.
    with tqdm(total=len(specs), unit="kernel", disable=None, leave=False) as bar:
        for outcome in build_all(specs, jobs):
            result.add(outcome)
            bar.update()
            with tqdm.external_write_mode():
                if outcome.error is None:
                    click.echo(f"built    {_row(outcome.spec)}  {outcome.seconds:.2f} s")
                else:
                    click.echo(f"failed   {_row(outcome.spec)}: {outcome.error}", err=True)


def _row(spec: KernelSpec) -> str:
    return f"{spec.name}  {spec.target.sm}"
