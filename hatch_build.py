"""Build the launcher of CUDA kernels into the wheel, so that its users need no compiler.

The launcher needs no version of Python, torch or tvm-ffi, and no symbol of a glibc after 2.28. Without a C++ compiler
the wheel has none, and the first CUDA kernel of an installation builds one.

For another processor: CXX=aarch64-linux-gnu-g++ JITNORM_WHEEL_MACHINE=aarch64 python -m build --wheel
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
MAX_GLIBC = 28  # that of manylinux_2_28
OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-shared", "-Wl,-z,now")


class LauncherHook(BuildHookInterface[Any]):
    """Adds the launcher to wheels, and their tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build it, unless the wheel is an editable one."""
        cxx = shutil.which(os.environ.get("CXX") or "c++")
        if self.target_name != "wheel" or version == "editable":
            return
        if not cxx:
            self.app.display_warning("the wheel has no launcher, as there is no C++ compiler: set CXX")
            return
        machine = os.environ.get("JITNORM_WHEEL_MACHINE") or platform.machine()
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / f"launcher-{machine}.so"
        build_launcher(cxx, file)
        if newer := [minor for minor in glibc_versions(file.read_bytes()) if minor > MAX_GLIBC]:
            raise RuntimeError(f"the launcher needs glibc 2.{max(newer)}, and the wheel is for 2.{MAX_GLIBC}")
        build_data["force_include"][str(file)] = f"jitnorm/{file.name}"
        build_data["tag"] = f"py3-none-manylinux_2_{MAX_GLIBC}_{machine}"
        build_data["pure_python"] = False

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the launcher's folder."""
        if folder := getattr(self, "_folder", None):
            folder.cleanup()


def build_launcher(cxx: str, file: Path) -> None:
    """Compile the launcher to `file`. It names libtvm_ffi as a dependency, which need not be there to link to."""
    from tvm_ffi import libinfo

    includes = [
        ROOT / "csrc",
        ROOT / "csrc" / "include",
        libinfo.find_include_path(),
        libinfo.find_dlpack_include_path(),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("libtvm_ffi.so", "libdl.so.2"):
            stub = [cxx, "-shared", "-nostdlib", "-x", "c", os.devnull, f"-Wl,-soname,{name}", "-o", f"{folder}/{name}"]
            subprocess.run(stub, check=True)
        sources = [str(ROOT / "csrc" / "launcher" / "launcher.cc"), *(f"-I{path}" for path in includes)]
        libraries = [f"-L{folder}", "-Wl,--no-as-needed", "-l:libtvm_ffi.so", "-l:libdl.so.2"]
        subprocess.run([cxx, *OPTIONS, *sources, *libraries, "-o", str(file)], check=True)


def glibc_versions(library: bytes) -> list[int]:
    """Return the minor versions of glibc whose symbols a library needs."""
    return [int(minor) for minor in re.findall(rb"GLIBC_2\.(\d{1,3})(?=[.\0])", library)]
