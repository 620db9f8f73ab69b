"""`jitnorm doctor`: report what this machine can build, and what to do about the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from jitnorm.benchmark.options import format_option
from jitnorm.cli import output
from jitnorm.cli.base import Command


@click.command(cls=Command)
@format_option
def doctor(output_format: str) -> None:
    """Report what this machine can build, with which tools, and what is missing.

    A small kernel is built and loaded for the CPU and for CUDA, as by a first call, at the same time and in two minutes
    at most. Its temporary folder is removed, and no other file is created.

    Exits 1 if nothing can be built, neither for the CPU nor for CUDA.
    """
    from jitnorm.cli.diagnostics import collect_diagnostics  # here, as it imports torch

    facts = collect_diagnostics()
    if output_format == "json":
        output.as_json(facts)
    else:
        _print(facts)
    if not any(facts["can_build"].values()):
        raise click.exceptions.Exit(1)


def _print(facts: dict[str, Any]) -> None:
    _section("versions", facts["versions"].items())
    _section("devices", ((d["device"], f"{d['arch']}  {d['name']}") for d in facts["devices"]))
    compilers = facts["compilers"].items()
    _section(
        "compilers", ((n, f"{c['version'] or 'unknown'}  {c['path']}" if c else "not found") for n, c in compilers)
    )
    builds = facts["builds"].items()
    present = {device["device"].partition(":")[0] for device in facts["devices"]}
    _section("can build for", ((n, _build(facts["can_build"][n], build, n in present)) for n, build in builds))
    _section("caches", (("prebuilt" if c["prebuilt"] else "own", _cache(c)) for c in facts["caches"]))
    if remote := facts["remote"]:
        _section("remote cache", [(remote["url"], remote["problem"] or "read where no cache has a kernel; not tried")])
    temporary = facts["temporary"]
    _section("temporary folder", [(temporary["root"] or temporary["problem"], _free_space(temporary["free"]))])
    _dispatch(facts["dispatch"])
    _invariance_checks(facts["batch_invariant"])
    _section("environment", facts["environment"].items())
    for line in [f"advice: {line}" for line in facts["advice"]] or ["nothing is missing"]:
        click.echo(output.printable(line))


def _section(title: str, lines: Iterable[tuple[str, str]]) -> None:
    click.echo(title)
    for name, value in list(lines) or [("none", "")]:
        click.echo(output.printable(f"  {name:20} {value}".rstrip()))
    click.echo()


def _dispatch(dispatch: dict[str, Any]) -> None:
    click.echo(f"jitnorm.dispatch, backend {dispatch['backend'] or 'unknown'}")
    if dispatch["problem"]:
        click.echo(output.printable(f"  {dispatch['problem']}"))
    else:
        calls = [(call["call"], call["backend"] or "none", call["why"]) for call in dispatch["calls"]]
        output.table(("CALL", "BACKEND", "WHY"), calls)
    click.echo()


def _invariance_checks(checks: list[dict[str, Any]]) -> None:
    """Print the results of batch-invariant mode's checks on this machine, if there are any."""
    if not checks:
        return
    click.echo("GEMM backends of batch-invariant mode, as checked on this machine")
    fields = ("backend", "problem", "gpu", "driver", "library")
    rows = [[*(str(check[f]) for f in fields), str(check["first_difference"] or "same bits")] for check in checks]
    output.table(("BACKEND", "GEMM", "GPU", "DRIVER", "LIBRARY", "FOUND"), rows)
    click.echo()


def _cache(cache: dict[str, Any]) -> str:
    state = cache["problem"] or ("usable" if cache["exists"] else "usable; created when the first kernel is built")
    if cache["problem"] and not cache["prebuilt"]:
        state += "; each process would use a temporary folder of its own instead"
    kernels = f"{output.plural(cache['kernels'], 'kernel')}, {output.size(cache['size'])}"
    return f"{cache['root']}  {kernels}; {_free_space(cache['free'])}; {state}"


def _free_space(free: int | None) -> str:
    return "free space unknown" if free is None else f"{output.size(free)} free"


def _build(ok: bool, build: dict[str, Any], is_present: bool) -> str:
    """Return whether kernels can be built for a device, and how that is known."""
    if build["works"]:
        where = "" if is_present else ", for a device that is not here"
        return f"yes  built and loaded a kernel in {build['seconds']:.2f} s{where}"
    return f"{'yes' if ok else 'no '}  {build['problem']}"
