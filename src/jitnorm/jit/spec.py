"""Describe what to build: one kernel instance, its generated source, its ninja file, and the key of both."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jitnorm.jit.environment import import_tvm_ffi

_FORMAT = 3  # of a cache entry; increment it when the content of an entry changes its meaning

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel the sources are inside the package, in a checkout they are beside src.
CSRC = next((d for d in (_PACKAGE / "csrc", _PACKAGE.parents[1] / "csrc") if d.is_dir()), _PACKAGE / "csrc")

_ARCH = r"(?:sm_?)?(?:([0-9]{1,2})\.([0-9])|([2-9]|1[0-9])([0-9]))([af]?)"
_MAJOR = r"(?:sm_?)?([0-9]|1[0-9])([af]?)"  # 9 or 12: a major version alone, not 0.9 or 1.2


class Target(NamedTuple):
    """What a kernel is compiled for: this machine's CPU, or one CUDA architecture.

    Attributes:
        device: "cpu" or "cuda".
        arch: "native" for the CPU, and a compute capability such as "9.0a" for CUDA.
    """

    device: str
    arch: str = "native"

    @classmethod
    def cuda(cls, arch: str) -> Target:
        """Return the target for "9.0a", "90a" or "sm_90a".

        Raises:
            ValueError: `arch` is anything else, such as a major version alone.
        """
        match = re.fullmatch(_ARCH, str(arch))
        if not match:
            major = re.fullmatch(_MAJOR, str(arch))
            meant = f": is '{major[1]}.0{major[2]}' meant?" if major else ""
            raise ValueError(f"arch must be a CUDA architecture such as '9.0a', '90a' or 'sm_90a', got {arch!r}{meant}")
        return cls("cuda", f"{match[1] or match[3]}.{match[2] or match[4]}{match[5]}")

    @property
    def sm(self) -> str:
        """Return the architecture as nvcc and file names spell it, such as sm_90a or cpu_x86_64."""
        return "sm_" + self.arch.replace(".", "") if self.device == "cuda" else f"cpu_{platform.machine()}"


@dataclass(frozen=True)
class KernelSpec:
    """One instance of one kernel class.

    Attributes:
        op: The operator's name.
        family: Name of the files csrc/<folder>/<family>.cuh and <family>_cpu.h.
        binding: The bindings function that the library exports, which <family>.h defines.
        name: The instance's name in profilers, errors and the cache.
        kernel: The C++ type, such as "RMSNormKernel<4096, bf16_t, bf16_t>".
        target: What it is compiled for.
        warmup: Arguments of `jitnorm warmup` that build it ahead of time.
        folder: The folder of its sources below csrc.
    """

    op: str
    family: str
    binding: str
    name: str
    kernel: str
    target: Target
    warmup: str
    folder: str = "elementwise"

    def __str__(self) -> str:
        return f"{self.kernel} for {self.target.sm}"

    @property
    def warmup_command(self) -> str:
        """Return the command that builds it ahead of time."""
        where = f" --arch {self.target.arch}" if self.target.device == "cuda" else ""
        return f"jitnorm warmup {self.warmup} --device {self.target.device}{where}"

    @property
    def source_name(self) -> str:
        """Return the file name of the source."""
        return "module.cu" if self.target.device == "cuda" else "module.cc"

    @property
    def source(self) -> str:
        """Return the source. For CUDA it has device code alone: the host code is the launcher's."""
        header = f"{self.family}.cuh" if self.target.device == "cuda" else f"{self.family}_cpu.h"
        source = (
            f'// {self}\n#include "{self.folder}/{header}"\n\n'
            f"namespace jitnorm {{\nusing Kernel = {self.kernel};\n}}\n\n"
        )
        if self.target.device == "cpu":
            kernel = "jitnorm::CpuKernel<jitnorm::Kernel>"
            binding = f"{kernel}, jitnorm::{self.binding}<{kernel}>"
            return (
                f"{source}JITNORM_EXPORT(__tvm_ffi_{self.binding}, (jitnorm::call<{binding}>))\n"
                f"JITNORM_EXPORT(__tvm_ffi_{self.binding}_fast_path, (jitnorm::call_fast_path<{binding}>))\n"
            )
        kernels = "".join(
            f"JITNORM_DEFINE_KERNEL({symbol}, jitnorm::Kernel, jitnorm::GridVariant::{variant})\n"
            for variant, symbol in self.symbols.items()
        )
        return f"{source}JITNORM_DEFINE_INFO(jitnorm::Kernel)\n{kernels}"

    @property
    def symbols(self) -> dict[str, str]:
        """Return the names of the functions in a cubin, by GridVariant in csrc/include/jitnorm/kernel_info.h."""
        return {
            "kDefault": self.name,
            "kSmallGrid": f"{self.name}_small_grid",
            "kLargeGrid": f"{self.name}_large_grid",
        }

    @property
    def ninja(self) -> str:
        """Return build.ninja, which contains no paths of this machine: those are in paths.ninja beside it.

        For CUDA it runs nvcc. NVRTC runs in this process, with the same `cuda_options`.
        """
        return _NVCC_NINJA.format(options=" ".join(self.cuda_options)) if self.target.device == "cuda" else _CPU_NINJA

    @property
    def cuda_options(self) -> tuple[str, ...]:
        """Return the options of both CUDA compilers, without the paths of headers."""
        return "-std=c++17", f"-arch={self.target.sm}"

    @property
    def output_name(self) -> str:
        """Return the name of the file that a build writes: a cubin, or a shared library for the CPU."""
        return "kernel.cubin" if self.target.device == "cuda" else "library.so"

    @property
    def includes(self) -> tuple[str, ...]:
        """Return the files below csrc that the source includes, directly or not, sorted."""
        return tuple(sorted(_included(self.source)))

    @property
    def sources_changed(self) -> bool:
        """Return whether csrc has changed since this process read it, as in the middle of an upgrade."""
        try:
            return any((CSRC / name).read_bytes() != _read(name).content for name in self.includes)
        except OSError:
            return True

    @property
    def key(self) -> str:
        """Return a hash of the sources and of everything they are compiled with, except the compilers.

        It depends on contents only: pip and network file systems change modification times, and two virtual
        environments should share an entry.
        """
        # Not functools.cached_property: before Python 3.12 it takes a lock, which a fork in another thread leaves held.
        if "_key" not in self.__dict__:
            self.__dict__["_key"] = self._hash()
        return str(self.__dict__["_key"])

    def _host(self) -> dict[str, str]:
        """Return what the output depends on, of the host. A cubin depends on nothing of it."""
        if self.target.device == "cuda":
            return {}
        return {"machine": platform.machine(), "tvm_ffi": import_tvm_ffi().__version__, "cpu": cpu_features()}

    def _hash(self) -> str:
        digest = hashlib.sha256()
        parts = {"format": _FORMAT, "source": self.source, "ninja": self.ninja, "nvrtc": NVRTC_OPTIONS}
        parts |= self._host()
        digest.update(json.dumps(parts, sort_keys=True).encode())
        for name in self.includes:
            digest.update(f"\0{name}\0".encode() + _read(name).content)
        return digest.hexdigest()[:16]


# Of NVRTC alone, for functions without __device__, which are the constexpr functions of constants.
NVRTC_OPTIONS = ("-default-device",)
_NVCC_NINJA = """\
include paths.ninja
rule cubin
  command = $nvcc -cubin {options} -ccbin $cxx -allow-unsupported-compiler -I$csrc -I$csrc/include $in -o $out
build kernel.cubin: cubin module.cu
"""
_CPU_NINJA = """\
include paths.ninja
rule library
  command = $cxx -std=c++17 -O2 -march=native -fopenmp -fPIC -fvisibility=hidden -fno-exceptions -shared $
    -Wl,-z,now -I$csrc -I$csrc/include -I$tvm_ffi_include -I$dlpack_include $in -L$tvm_ffi_lib -ltvm_ffi -o $out
build library.so: library module.cc
"""


class _Launcher(KernelSpec):
    """The library that launches all CUDA kernels. A wheel has it; elsewhere it is built like a kernel."""

    def __str__(self) -> str:
        return f"the launcher of CUDA kernels for {platform.machine()}"

    @property
    def warmup_command(self) -> str:
        return "jitnorm warmup --hidden-size 4096 --arch 9.0a, or any other warm-up for CUDA"

    @property
    def source(self) -> str:
        return f'// {self}\n#include "launcher/launcher.cc"\n'

    def _host(self) -> dict[str, str]:
        return {"machine": platform.machine()}  # the C ABI of tvm-ffi is stable

    @property
    def ninja(self) -> str:
        return _CPU_NINJA.replace(" -march=native -fopenmp", "").replace("-ltvm_ffi", "-ltvm_ffi -ldl")


LAUNCHER = _Launcher(
    op="launcher",
    family="launcher",
    folder="launcher",
    binding="make_kernel",
    name="cuda_launcher",
    kernel="launcher",
    target=Target("cpu"),
    warmup="",
)


def launcher_file() -> Path:
    """Return where a wheel has the launcher, for its processor.

    The name has the key of its sources: one of other sources might launch a kernel with parameters in another order.
    """
    return _PACKAGE / f"launcher-{platform.machine()}-{LAUNCHER.key}.so"


class _SourceFile(NamedTuple):
    """A file below csrc, and those that it includes."""

    content: bytes
    includes: tuple[str, ...]


@functools.cache
def _read(name: str) -> _SourceFile:
    try:
        content = (CSRC / name).read_bytes()
    except OSError as error:
        raise RuntimeError(f"jitnorm cannot read its own source {CSRC / name}: {error.strerror}") from error
    return _SourceFile(content, _direct_includes(content.decode()))


def _included(source: str) -> set[str]:
    """Return the files below csrc that `source` includes, directly or not."""
    found: set[str] = set()
    pending = [*_direct_includes(source)]
    while pending:
        if (name := pending.pop()) not in found:
            found.add(name)
            pending += _read(name).includes
    return found


def _direct_includes(source: str) -> tuple[str, ...]:
    """Return the files below csrc that `#include "..."` names in `source`."""
    found = []
    # No regular expression: compiling one would take a third of the time of a cache hit.
    for line in source.splitlines():
        directive = line.strip()
        if not directive.startswith("#") or not directive[1:].lstrip().startswith("include"):
            continue
        _, quote, include = directive.partition('"')
        include = include.partition('"')[0]
        name = next((n for n in (include, f"include/{include}") if quote and os.path.isfile(f"{CSRC}/{n}")), None)
        if name:
            found.append(name)
    return tuple(found)


_CPU_FIELDS = (
    "vendor_id",
    "cpu family",
    "model",
    "flags",
    "Features",
    "CPU implementer",
    "CPU part",
    "CPU variant",
)


@functools.cache
def cpu_features() -> str:
    """Return what -march=native depends on: the constant fields of the first processor in /proc/cpuinfo."""
    try:
        lines = []
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if not line.strip():
                    break  # one processor is enough, and the file is slow to read on large machines
                if line.partition(":")[0].rstrip() in _CPU_FIELDS:
                    lines.append(" ".join(line.split()))
        return "\n".join(lines)
    except OSError:
        return platform.processor()
