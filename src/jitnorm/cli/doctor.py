"""`jitnorm doctor`: what this machine can build, and what to do about the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from jitnorm.cli import output
from jitnorm.cli.base import Command, json_option
from jitnorm.cli.diagnosis import diagnose


@click.command(cls=Command, short_help="Say what this machine can build.")
@json_option
def doctor(form: str) -> None:
    """Say what this machine can build, with what, and what is missing.

    Compilers are tried: a small kernel is built and loaded as a first call does it, for the CPU and for CUDA, at the
    same time and for two minutes at most, in a temporary folder that is removed. No other file is created.

    Exits 1 if nothing can be built, neither for the CPU nor for CUDA.
    """
    facts = diagnose()
    if form == "json":
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
    _section("can build for", ((name, _build(facts["can_build"][name], trial)) for name, trial in builds))
    _section("caches", (("prebuilt" if c["prebuilt"] else "own", _cache(c)) for c in facts["caches"]))
    temporary = facts["temporary"]
    _section("temporary folder", [(temporary["root"] or temporary["problem"], _room(temporary["free"]))])
    _dispatch(facts["dispatch"])
    _proofs(facts["batch_invariant"])
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


def _proofs(proofs: list[dict[str, Any]]) -> None:
    """What batch-invariant mode found out on this machine, if it ever had to."""
    if not proofs:
        return
    click.echo("batch-invariant products, as checked here")
    fields = ("backend", "problem", "gpu", "driver", "library")
    rows = [[*(str(proof[f]) for f in fields), str(proof["first_difference"] or "same bits")] for proof in proofs]
    output.table(("BACKEND", "PRODUCT", "GPU", "DRIVER", "LIBRARY", "FOUND"), rows)
    click.echo()


def _cache(place: dict[str, Any]) -> str:
    state = place["problem"] or ("usable" if place["exists"] else "usable; created when the first kernel is built")
    if place["problem"] and not place["prebuilt"]:
        state += "; each process would use a temporary folder of its own instead"
    kernels = f"{output.plural(place['kernels'], 'kernel')}, {output.size(place['size'])}"
    return f"{place['root']}  {kernels}; {_room(place['free'])}; {state}"


def _room(free: int | None) -> str:
    return "free space unknown" if free is None else f"{output.size(free)} free"


def _build(ok: bool, trial: dict[str, Any]) -> str:
    """Whether it can build, and what that is known from."""
    if trial["works"]:
        return f"yes  built and loaded a kernel in {trial['seconds']:.2f} s"
    return f"{'yes' if ok else 'no '}  {trial['problem']}"
