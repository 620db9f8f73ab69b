"""Compilers that can be watched, and one that copies a library which was built before."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The problems that were logged; a build that takes long is none."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("kernels/*/*"))


class Watched:
    """A compiler that writes a line for each time it compiles, and may be slow about it."""

    def __init__(self, folder: Path, real: str, compiles_if: str) -> None:
        self.log = folder / "log"
        self.path = folder / "bin" / Path(real).name
        self.path.parent.mkdir(parents=True)
        self.path.write_text(
            f'#!/bin/sh\ncase " $* " in *"{compiles_if}"*) echo $PPID >>{self.log}; sleep ${{SLOW:-0}};; esac\n'
            f'exec {real} "$@"\n'
        )
        self.path.chmod(0o755)

    @property
    def compilations(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def watched_cxx(tmp_path: Path) -> Watched:
    real = next(path for name in ("c++", "g++", "clang++") if (path := shutil.which(name)))
    return Watched(tmp_path / "cxx", real, " -shared ")


@pytest.fixture
def watched_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """A script, far from its toolkit, which compiles for CUDA while the test runs."""
    from jitnorm.jit.toolchain import find_nvcc

    monkeypatch.setenv("JITNORM_CUDA_COMPILER", "nvcc")
    return Watched(tmp_path / "cuda", find_nvcc(), " -cubin -std")


class Copier:
    """A C++ compiler that answers with a version and copies a library that was built before, in milliseconds.

    `then` is a shell script that runs after the copy, with the library as $out.
    """

    def __init__(self, folder: Path, library: Path) -> None:
        self.path = folder / "g++"
        self.log = folder / "log"
        self._library = library
        self.then(":")

    def then(self, script: str) -> None:
        self.path.write_text(
            f"""#!/bin/sh
case "$*" in
  --version) echo copier 1.0; exit 0 ;;
esac
echo build >> {self.log}
for out; do :; done
cp {self._library} "$out"
{script}
"""
        )
        self.path.chmod(0o755)

    @property
    def builds(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture(scope="session")
def built_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of rmsnorm for 512 float32 on the CPU, built once."""
    import torch

    from jitnorm.jit.build import build
    from jitnorm.jit.spec import Target
    from jitnorm.rmsnorm import rmsnorm_spec

    entry = build(rmsnorm_spec(512, torch.float32, torch.float32, Target("cpu")))
    return Path(shutil.copy(entry.library, tmp_path_factory.mktemp("built") / "library.so"))


@pytest.fixture
def copier(built_library: Path, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Copier:
    """An empty cache, and CXX set to a compiler that copies."""
    (tmp_path / "copier").mkdir()
    compiler = Copier(tmp_path / "copier", built_library)
    monkeypatch.setenv("CXX", str(compiler.path))
    return compiler
