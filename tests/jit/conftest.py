"""Processes of their own, and compilers that can be watched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def start(*script: str, **environment: str | None) -> subprocess.Popen[str]:
    """A fresh Python that runs the parts of `script`. A variable that is None is removed."""
    env = {**os.environ, **{k: v for k, v in environment.items() if v is not None}}
    for name, value in environment.items():
        if value is None:
            env.pop(name, None)
    command = [sys.executable, "-c", "\n".join(textwrap.dedent(part) for part in script)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def run(*script: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    process = start(*script, **environment)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


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
def watched_nvcc(tmp_path: Path) -> Watched:
    """A script, far from its toolkit."""
    from jitnorm.jit.toolchain import find_nvcc

    return Watched(tmp_path / "cuda", find_nvcc(), " -cubin -std")
