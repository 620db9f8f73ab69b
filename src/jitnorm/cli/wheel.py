"""`jitnorm wheel`: pack compiled kernels as a Python package, which every process finds where it is installed."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from jitnorm.benchmark.options import format_option
from jitnorm.cli import output
from jitnorm.cli.archive import selected_entries
from jitnorm.cli.base import BadValue, Command
from jitnorm.cli.filters import Filter, filter_option, older_than_option
from jitnorm.jit.cache import KERNELS
from jitnorm.jit.files import write_bytes
from jitnorm.jit.library import EM_CUDA
from jitnorm.jit.locations import PACKAGES

if TYPE_CHECKING:
    from jitnorm.jit.archive import PackedEntry

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"  # of a package, by the specification of core metadata
_CUDA = "CUDA"
_MACHINES = {62: "x86_64", 183: "aarch64"}  # by the number in an ELF file
_RELEASE = r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9]+(\.[a-z0-9]+)*)?"  # PEP 440, in normal form
_MAX_NAME = 100  # the file's name contains it, and has at most 255 characters
# What a wheel of that name would replace: jitnorm, and the packages that it needs or that its extras install.
RESERVED = (
    *("jitnorm", "torch", "apache-tvm-ffi", "tvm-ffi", "ninja", "platformdirs", "cuda-pathfinder", "click", "tabulate"),
    *(
        "tqdm",
        "fsspec",
        "nvidia-cuda-nvcc",
        "nvidia-cuda-nvrtc",
        "flashinfer-python",
        "triton",
        "vllm",
        "sglang",
        "transformers",
    ),
)
_MIN_GLIBC = 17  # glibc 2.17 is the first that pip has a tag for on every processor
_GLIBC_VERSION = rb"GLIBC_2\.(\d{1,3})(?=[.\0])"  # in the string table of a library that needs the version
_GLIBC_RELATIVE = b"\0GLIBC_ABI_DT_RELR\0"  # the library has packed relocations, which glibc 2.36 introduced
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # of a zip file, so that the same kernels give the same bytes


@click.command(cls=Command)
@click.option(
    "--output", "folder", metavar="FOLDER", default=".", show_default=True, help="Write the wheel to this folder."
)
@click.option(
    "--name", metavar="NAME", default="jitnorm-kernels", show_default=True, help="Give the package this name."
)
@filter_option
@older_than_option
@format_option
def wheel(folder: str, name: str, filters: tuple[Filter, ...], older_than: float | None, output_format: str) -> None:
    """Pack kernels into a wheel.

    All kernels of the cache (JITNORM_CACHE_DIR) are packed, or selected ones; those of prebuilt layers and of installed
    packages are not. Each is compared with its recorded hash first. The wheel contains no Python code: where it is
    installed, jitnorm finds its kernels without any variable if the cache lacks them. It requires the releases of
    jitnorm and tvm-ffi that built the kernels, and the glibc that they were linked with. Its version ends with a hash
    of the kernels, so pip installs another one over it.

    \b
    jitnorm warmup --config Qwen3-32B/config.json --arch 9.0a
    jitnorm wheel --filter arch=sm_90a --name qwen3-kernels
    """
    from jitnorm.jit import archive  # here, as few commands need it

    if not re.fullmatch(_NAME, name) or len(name) > _MAX_NAME:
        raise BadValue(
            f"--name must be a package's name such as jitnorm-kernels, of at most {_MAX_NAME} characters, got {name!r}"
        )
    if normalised(name) in map(normalised, RESERVED):
        raise BadValue(f"--name must not be that of another package, which the wheel would replace, got {name!r}")
    packed = archive.pack(selected_entries(filters, older_than, own_only=True))
    file, content = make_wheel(name, packed)
    path = os.path.join(folder, file)
    with output.writing(path):
        os.makedirs(folder, exist_ok=True)
        write_bytes(path, content, sync=True)
    if output_format == "json":
        output.as_json({"file": path, "size": len(content), "packed": [each.label for each in packed]})
    else:
        click.echo(f"packed {output.plural(len(packed), 'kernel')}, {output.size(len(content))}, into {path}")


def make_wheel(name: str, packed: Sequence[PackedEntry]) -> tuple[str, bytes]:
    """Return the file name and the content of a wheel. Both depend on the name and the kernels alone.

    Its version is that of jitnorm with a hash of the kernels as its local part: pip takes a wheel of the same version
    as installed already.

    Raises:
        RuntimeError: The kernels were built by several releases, or for several kinds of host processors.
    """
    release = _only("release of jitnorm", {each.jitnorm for each in packed}, _RELEASE)
    package = normalised(name)
    # A cubin depends on nothing of the host.
    libraries = [each.library for each in packed if _machine(each.library) != _CUDA]
    tag = "py3-none-any"
    requires = f"Requires-Dist: jitnorm =={release}\n"
    if libraries:
        machine = _only("host processor", set(map(_machine, libraries)), "|".join(_MACHINES.values()))
        tag = f"py3-none-{_platform(libraries)}_{machine}"
        tvm_ffi = _only("release of tvm-ffi", {e.tvm_ffi for e in packed if e.library in libraries}, _RELEASE)
        requires += f"Requires-Dist: apache-tvm-ffi =={tvm_ffi}\n"
    files = {
        f"{PACKAGES}/{package}/{KERNELS}/{each.label}/{file}": content
        for each in packed
        for file, content in each.files.items()
    }
    files = dict(sorted(files.items()))
    version = f"{release}{'.' if '+' in release else '+'}k{_hash_of(files)[:8]}"
    info = f"{package}-{version}.dist-info"
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: Compiled kernels of jitnorm\n{requires}"
    ).encode()
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: jitnorm {release}\nRoot-Is-Purelib: {str(not libraries).lower()}\nTag: {tag}\n"
    ).encode()
    record = "".join(f"{file},sha256={_digest(content)},{len(content)}\n" for file, content in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for file, content in files.items():
            member = zipfile.ZipInfo(file, _FIRST_DATE)
            member.external_attr = 0o100644 << 16
            archive.writestr(member, content)  # not compressed: the bytes must not depend on zlib's version
    return f"{package}-{version}-{tag}.whl", stream.getvalue()


def normalised(name: str) -> str:
    """Return the package's name as file names contain it, which is the same for all its spellings."""
    return re.sub(r"[-_.]+", "_", name).lower()


def _hash_of(files: Mapping[str, bytes]) -> str:
    """Return a hash of the files' names and contents, in their order."""
    return hashlib.sha256(
        "".join(f"{name} {_digest(content)}\n" for name, content in files.items()).encode()
    ).hexdigest()


def _platform(libraries: Iterable[bytes]) -> str:
    """Return the platform that libraries need, without the processor: "manylinux_2_34" for glibc 2.34 or newer.

    It is "linux" if they need no glibc, as those linked with musl.
    """
    needed = []
    for library in libraries:
        needed += [int(minor) for minor in re.findall(_GLIBC_VERSION, library)]
        needed += [36] if _GLIBC_RELATIVE in library else []
    return f"manylinux_2_{max(_MIN_GLIBC, *needed)}" if needed else "linux"


def _only(what: str, found: set[str], form: str) -> str:
    """Return the one release or processor that all kernels have. Raises RuntimeError for several, or other text."""
    if len(found) > 1 or not re.fullmatch(form, min(found), re.ASCII):
        raise RuntimeError(
            f"a wheel has kernels of one {what}, got {', '.join(map(output.printable, sorted(found)))}: select others "
            "with --filter; jitnorm cache prune removes those of other releases"
        )
    return found.pop()


def _machine(library: bytes) -> str:
    """Return the host processor that a library is for, which its ELF header names; "CUDA" for a cubin."""
    number = int.from_bytes(library[18:20], "little")
    return _CUDA if number == EM_CUDA else _MACHINES.get(number, f"unknown ({number})")


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
