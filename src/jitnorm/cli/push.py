"""`jitnorm cache push`: write kernels to a remote cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jitnorm.benchmark.options import format_option
from jitnorm.cli import output
from jitnorm.cli.archive import selected_entries
from jitnorm.cli.base import BadValue, Command
from jitnorm.cli.filters import Filter, filter_option, older_than_option

if TYPE_CHECKING:
    from jitnorm.jit.remote import Pushed


@click.command("push", cls=Command)
@click.option(
    "--url",
    metavar="URL",
    envvar="JITNORM_REMOTE_CACHE",
    help="Write to this remote cache, a URL or folder that fsspec can open; by default JITNORM_REMOTE_CACHE.",
)
@click.option(
    "--key",
    metavar="FILE",
    envvar="JITNORM_REMOTE_KEY",
    type=click.Path(dir_okay=False),
    help="Sign with the secret key in this file, 64 hexadecimal digits; by default JITNORM_REMOTE_KEY, if that is set.",
)
@filter_option
@older_than_option
@format_option
def push(
    url: str | None, key: str | None, filters: tuple[Filter, ...], older_than: float | None, output_format: str
) -> None:
    """Write kernels to the remote cache, and print the digests of their manifests.

    All kernels of the cache and the prebuilt layers are written, or selected ones. Each is compared with its recorded
    hash first. What the remote cache has already is not written again; another build of the same kernel is replaced,
    and nothing is removed.

    The standard output has a line for each kernel, its digest and its id, which JITNORM_REMOTE_TRUST accepts as a file.
    With --key, machines that have the key trust the kernels without such a list.

    \b
    jitnorm cache push --url s3://bucket/kernels >trusted.txt
    jitnorm cache push --url s3://bucket/kernels --key kernels.key
    """
    from jitnorm.jit import remote  # here, as no other command needs it

    if not url:
        raise BadValue("--url must name the remote cache, unless JITNORM_REMOTE_CACHE is set")
    secret = remote.read_key(key) if key else None
    pushed: list[Pushed] = []
    for each in remote.push(url, selected_entries(filters, older_than), secret):
        pushed.append(each)
        if output_format == "table":
            click.echo(f"{each.digest}  {each.label}")
    new = [each for each in pushed if each.is_new]
    present = [each for each in pushed if not each.is_new]
    shown = remote.shown_url(url)
    if output_format == "json":
        output.as_json({"url": shown, "pushed": _as_json(new), "present": _as_json(present)})
    else:
        line = f"pushed {output.plural(len(new), 'kernel')}, {len(present)} already there; the remote cache is {shown}"
        click.echo(line, err=True)


def _as_json(pushed: list[Pushed]) -> list[dict[str, str]]:
    return [{"id": each.label, "digest": each.digest} for each in pushed]
