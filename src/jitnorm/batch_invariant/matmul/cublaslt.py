"""The cuBLASLt backend: calls the library that torch has loaded, without the workspace that split k needs."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch

from jitnorm.batch_invariant.matmul.problem import Gemm, Problem, UnsupportedProblem
from jitnorm.jit.load import load
from jitnorm.jit.log import logger
from jitnorm.jit.spec import CSRC, LAUNCHER

# Bytes that a kernel may use beside its operands. The partial sums of split k need far more; a few bytes would allow
# kernels that keep counters. The invariance check tells results for different values apart.
WORKSPACE_BYTES = 0

# The files that decide which kernel runs: where they have changed, the invariance check runs again.
SOURCES = Path(__file__), CSRC / "gemm" / "cublaslt.h"


@functools.cache
def library_path() -> str | None:
    """Return the path of the libcublasLt that this process has loaded, or of one that is installed, or None."""
    try:
        with open("/proc/self/maps") as maps:
            for line in maps:
                path = line.split(maxsplit=5)[-1].strip()
                if os.path.basename(path).startswith("libcublasLt.so"):
                    return path
    except OSError:
        pass
    from cuda import pathfinder

    try:
        return str(pathfinder.load_nvidia_dynamic_lib("cublasLt").abs_path)
    except RuntimeError:
        return None


@functools.cache
def _open() -> tuple[Any, int]:
    """Return the bindings and the version of the library that they call: 130100 for 13.1.0, and 0 if there is none."""
    path = library_path()
    if not path:
        return None, 0
    try:
        module = load(LAUNCHER)
        return module, int(module.cublaslt_open(ctypes.CDLL(path)._handle))
    except (OSError, RuntimeError) as error:
        logger.warning("other GEMMs are used, because cuBLASLt cannot be called: %s", error)
        return None, 0


def library_version() -> int:
    """Return the version of cuBLASLt, such as 130100 for 13.1.0, or 0 if it cannot be called."""
    return _open()[1]


def description() -> str:
    """Return the library's version and the workspace that it gets, as results of the invariance check name them."""
    return f"{library_version()}, {WORKSPACE_BYTES} bytes"


def gemm(problem: Problem, workspace_bytes: int = WORKSPACE_BYTES) -> Gemm:
    """Return the backend, bound to `problem`. A call raises UnsupportedProblem if the library has no kernel for it."""
    function = _open()[0].cublaslt_matmul
    function.release_gil = False
    transposed, tf32 = problem.b_transposed, problem.tf32

    def run(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        # torch's allocator keeps memory of different streams and graphs apart.
        workspace = a.new_empty(workspace_bytes, dtype=torch.uint8) if workspace_bytes else None
        if function(a, b, bias, out, transposed, tf32, workspace):
            raise UnsupportedProblem(f"cuBLASLt has no kernel without split k for {problem} with {a.shape[0]} rows")

    return run
