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
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent
MAX_GLIBC = 28  # that of manylinux_2_28
MACHINES = {62: "x86_64", 183: "aarch64"}  # by e_machine of an ELF file
OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-shared", "-Wl,-z,now")


class LauncherHook(BuildHookInterface[Any]):
    """Adds the launcher to wheels, and their tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build it, unless the wheel is an editable one, or not for Linux with glibc.

        Raises:
            RuntimeError: JITNORM_WHEEL_MACHINE is set, and there is no launcher for it.
        """
        if self.target_name != "wheel" or version == "editable":
            return
        requested = os.environ.get("JITNORM_WHEEL_MACHINE")
        self._folder = tempfile.TemporaryDirectory()
        try:
            if not requested and platform.libc_ver()[0] != "glibc":
                raise RuntimeError("it is for Linux with glibc")
            file = build_launcher(requested or platform.machine(), Path(self._folder.name))
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if requested:
                raise
            self.app.display_warning(f"the wheel has no launcher, and CUDA kernels need a C++ compiler: {error}")
            return
        build_data["force_include"][str(file)] = f"jitnorm/{file.name}"
        build_data["tag"] = f"py3-none-manylinux_2_{MAX_GLIBC}_{requested or platform.machine()}"
        build_data["pure_python"] = False

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the launcher's folder."""
        if folder := getattr(self, "_folder", None):
            folder.cleanup()


def build_launcher(machine: str, folder: Path) -> Path:
    """Compile the launcher for a processor, and return its path, whose name `jitnorm.jit.spec.launcher_file` expects.

    It names libtvm_ffi as a dependency, which need not be there for the processor.

    Raises:
        RuntimeError: There is no compiler, or what it makes is not for the processor or for MAX_GLIBC.
        CalledProcessError: The compiler fails.
    """
    from tvm_ffi import libinfo

    cxx = shutil.which(os.environ.get("CXX") or "c++")
    if not cxx:
        raise RuntimeError("there is no C++ compiler: set CXX")
    file = folder / f"launcher-{machine}-{launcher_key(machine)}.so"
    includes = [
        ROOT / "csrc",
        ROOT / "csrc" / "include",
        libinfo.find_include_path(),
        libinfo.find_dlpack_include_path(),
    ]
    for name in ("libtvm_ffi.so", "libdl.so.2"):
        stub = [cxx, "-shared", "-nostdlib", "-x", "c", os.devnull, f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run(stub, check=True)
    sources = [str(ROOT / "csrc" / "launcher" / "launcher.cc"), *(f"-I{path}" for path in includes)]
    libraries = [f"-L{folder}", "-Wl,--no-as-needed", "-l:libtvm_ffi.so", "-l:libdl.so.2", "-Wl,--as-needed"]
    subprocess.run([cxx, *OPTIONS, *sources, *libraries, "-o", str(file)], check=True)
    content = file.read_bytes()
    if MACHINES.get(int.from_bytes(content[18:20], "little")) != machine:
        raise RuntimeError(f"{cxx} does not compile for {machine}: set CXX")
    if newer := [minor for minor in glibc_versions(content) if minor > MAX_GLIBC]:
        raise RuntimeError(f"the launcher needs glibc 2.{max(newer)}, and the wheel is for 2.{MAX_GLIBC}")
    return file


def launcher_key(machine: str) -> str:
    """Return the key of the launcher's sources for a processor."""
    # Without the package's own imports, which need torch.
    script = (
        f"import sys, platform; sys.path.insert(0, {str(ROOT / 'src')!r}); sys.modules['_jitnorm_command'] = sys; "
        f"platform.machine = lambda: {machine!r}; from jitnorm.jit.spec import LAUNCHER; print(LAUNCHER.key)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def glibc_versions(library: bytes) -> list[int]:
    """Return the minor versions of glibc whose symbols a library needs."""
    return [int(minor) for minor in re.findall(rb"GLIBC_2\.(\d{1,3})(?=[.\0])", library)]
