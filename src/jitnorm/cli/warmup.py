"""`jitnorm warmup`: build kernels ahead of their first call."""

from __future__ import annotations

from typing import Any

import click

from jitnorm.benchmark.options import format_option
from jitnorm.benchmark.progress import ProgressBar
from jitnorm.cli import output
from jitnorm.cli.base import Command, several
from jitnorm.jit import locations
from jitnorm.jit.spec import LAUNCHER, KernelSpec
from jitnorm.warmup import ALL_ROUNDINGS, CACHE_DTYPES, DTYPES, OPS, argument_problem, make_plan
from jitnorm.warmup.run import Result, build_all, build_launcher, default_jobs, find_cached, prepare

_DTYPE, _CACHE_DTYPE = click.Choice(list(DTYPES)), click.Choice(list(CACHE_DTYPES))


@click.command(
    cls=Command,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--op",
    **several(click.Choice(list(OPS))),
    is_eager=True,  # so that an unknown operator is reported before other mistakes
    metavar="NAME",
    help=f"Build this operator; by default all that the model of --config calls, or rmsnorm. One of {', '.join(OPS)}.",
)
@click.option(
    "--hidden-size",
    **several(click.INT),
    help="Build for this size of the normalised dimension, which may be head_dim. Optional for activations and "
    "store_cache; not accepted for quantisation alone.",
)
@click.option("--dtype", **several(_DTYPE), help="Build for inputs of this dtype; by default the config's, or bf16.")
@click.option("--weight-dtype", **several(_DTYPE), help="Build for weights of this dtype; by default the input's.")
@click.option("--rotary-dim", **several(click.INT), help="Rotate so many elements of a head; by default all.")
@click.option(
    "--cos-sin-dtype",
    **several(_DTYPE),
    help="Build for cosines and sines of this dtype, the input's or fp32; by default the input's.",
)
@click.option(
    "--cache-dtype",
    **several(_CACHE_DTYPE),
    help="Build for caches of this dtype, the input's or fp8; by default the input's.",
)
@click.option(
    "--q-out-dtype",
    **several(_CACHE_DTYPE),
    help="Build for a result for q of this dtype, the input's or fp8; by default the input's.",
)
@click.option(
    "--interleaved", is_flag=True, help="Rotate neighbours, elements 2 i and 2 i + 1 of a head (GPT-J style)."
)
@click.option("--mrope", is_flag=True, help="Build for three positions of each token.")
@click.option(
    "--rounding",
    **several(click.Choice(ALL_ROUNDINGS)),
    help="Round once, at the end, or after each step; for a general norm hf, before the weight multiplies. By default "
    "once.",
)
@click.option(
    "--form",
    **several(click.STRING),
    help="Build a general norm for rows (the default), strided or unaligned; +no_weight and +bias may follow. Or a "
    "gated norm for strided (the default) or unaligned; +no_weight, +fp32_gate and +sigmoid may follow. The "
    "default of LayerNorm is strided+bias.",
)
@click.option(
    "--hidden-size2",
    **several(click.INT),
    help="Build dual_rmsnorm for this size of its second input; by default that of the first.",
)
@click.option(
    "--config",
    metavar="PATH",
    help="Read operators and sizes from a Hugging Face config.json, or from the folder that contains one.",
)
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    help="Build for this device; by default CUDA if torch sees a GPU, else the CPU.",
)
@click.option(
    "--arch", **several(click.STRING), help="Build for this CUDA architecture, such as 9.0a or sm_90a. It needs no GPU."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Run this many builds at a time; by default one for each CPU.")
@click.option("--skip-unsupported", is_flag=True, help="Report sizes that are not supported, and exit 0 all the same.")
@format_option
def warmup(
    op: tuple[str, ...],
    hidden_size: tuple[int, ...],
    dtype: tuple[str, ...],
    weight_dtype: tuple[str, ...],
    rotary_dim: tuple[int, ...],
    cos_sin_dtype: tuple[str, ...],
    cache_dtype: tuple[str, ...],
    q_out_dtype: tuple[str, ...],
    interleaved: bool,
    mrope: bool,
    rounding: tuple[str, ...],
    form: tuple[str, ...],
    hidden_size2: tuple[int, ...],
    config: str | None,
    device: str | None,
    arch: tuple[str, ...],
    jobs: int | None,
    skip_unsupported: bool,
    output_format: str,
) -> None:
    """Build kernels ahead of their first call, for this machine or another.

    Every combination of the given operators, sizes, dtypes and architectures is built. Give several values as a list
    (512,1024), or repeat the option. Sizes that are not supported are listed first: if --hidden-size gives one, nothing
    is built; if a config does, the rest is built. Exits 1 unless all kernels are in the cache (see --skip-unsupported).

    \b
    jitnorm warmup --config Qwen3-32B/config.json
    jitnorm warmup --hidden-size 4096,128 --dtype bf16 --arch 8.0,9.0a
    jitnorm warmup --op silu_and_mul,store_cache --dtype bf16
    jitnorm warmup --op qk_norm_rope_store --hidden-size 128 --dtype bf16 --cache-dtype fp8
    """
    options = {
        "rotary_dim": rotary_dim,
        "cos_sin_dtype": cos_sin_dtype,
        "cache_dtype": cache_dtype,
        "q_out_dtype": q_out_dtype,
        "interleaved": interleaved,
        "mrope": mrope,
        "rounding": rounding,
        "form": form,
        "hidden_size2": hidden_size2,
    }
    options = {name: value for name, value in options.items() if value}
    if problem := argument_problem(op, hidden_size, weight_dtype, config, options, _spelled):
        raise click.UsageError(problem)
    plan = make_plan(op or None, hidden_size, dtype, weight_dtype, device, arch, config, skip_unsupported, **options)
    for note in plan.notes:
        click.echo(f"note: {note}", err=True)
    for why in plan.refused:
        click.echo(f"refused  {why}", err=True)
    cached, missing = find_cached(plan.specs)
    is_table = output_format == "table"
    if is_table:
        for spec in cached:
            click.echo(f"cached   {_line(spec)}")
    result = Result(cached=cached, refused=plan.refused)
    if missing:
        _build(missing, jobs or default_jobs(), result, is_table)
    build_launcher(plan.specs, result)
    for spec, error in result.failed:
        if spec is LAUNCHER:
            click.echo(f"failed   {_line(spec)}: {error}", err=True)
    if is_table:
        click.echo(f"{result}; the cache is {locations.readable().root}")
    else:
        output.as_json(_as_json(result))
    if result.failed or (result.refused and not skip_unsupported):
        raise click.exceptions.Exit(1)


def _build(specs: list[KernelSpec], jobs: int, result: Result, is_table: bool) -> None:
    """Build kernels, and print a line for each as it is done."""
    prepare(specs)
    if is_table:
        click.echo(f"{len(specs)} to build, {min(jobs, len(specs))} at a time")
    with ProgressBar(total=len(specs), unit="kernel") as bar:
        for outcome in build_all(specs, jobs):
            result.add(outcome)
            bar.update()
            with ProgressBar.external_write_mode():
                if outcome.error is not None:
                    click.echo(f"failed   {_line(outcome.spec)}: {outcome.error}", err=True)
                elif is_table:
                    click.echo(f"built    {_line(outcome.spec)}  {outcome.seconds:.2f} s")


def _spelled(argument: str) -> str:
    return f"--{argument.replace('_', '-')}"


def _line(spec: KernelSpec) -> str:
    return f"{spec.name}  {spec.target.sm}"


def _as_json(result: Result) -> dict[str, Any]:
    def kernel(spec: KernelSpec) -> dict[str, str]:
        return {"name": spec.name, "arch": spec.target.sm}

    return {
        "cache": str(locations.readable().root),
        "built": [kernel(spec) for spec in result.built],
        "cached": [kernel(spec) for spec in result.cached],
        "refused": result.refused,
        "failed": [{**kernel(spec), "error": error} for spec, error in result.failed],
    }
