"""cuBLASLt without room to split k in, by a thin operator over the library that torch has loaded."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jitnorm.jit.load import load
from jitnorm.jit.log import logger
from jitnorm.jit.spec import CSRC, KernelSpec, Target

if TYPE_CHECKING:
    from jitnorm.batch_invariant.cuda_matmul import Problem, Road


# Bytes that a kernel may use beside its operands. Partial sums of a split k need far more; a few bytes let in kernels
# that keep counters. Another value is another question to the proof.
WORKSPACE = 0


CODE = Path(__file__), CSRC / "gemm" / "cublaslt_cpu.h"  # which decide what kernels are run


class _Spec(KernelSpec):
    @property
    def warmup_command(self) -> str:
        return "jitnorm verify-invariance --op mm"


SPEC = _Spec(
    op="cublaslt",
    family="cublaslt",
    folder="gemm",
    entry="cublaslt_matmul",
    name="cublaslt_matmul",
    kernel="CublasLt",
    target=Target("cpu"),
    warmup="",
)


@functools.cache
def library_path() -> str | None:
    """The libcublasLt that this process has loaded, or else the one that cuda-pathfinder finds; None without any."""
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
def _opened() -> tuple[Any, int]:
    """The operator, and the version of the library that it calls: 130100 for 13.1.0; 0 where it cannot call any."""
    path = library_path()
    if not path:
        return None, 0
    try:
        module = load(SPEC)
        return module, int(module.cublaslt_open(ctypes.CDLL(path)._handle))
    except (OSError, RuntimeError) as error:
        logger.warning(f"batch-invariant mode does without cuBLASLt: {error}")
        return None, 0


def library_version() -> int:
    return _opened()[1]


def description() -> str:
    """Of the library, and what it is asked for: as proofs name it."""
    return f"{library_version()}, {WORKSPACE} bytes"


def road(problem: Problem, workspace: int = WORKSPACE) -> Road:
    """How `problem` is computed by the library."""
    function = _opened()[0].cublaslt_matmul
    function.release_gil = False
    transposed, tf32 = problem.b_transposed, problem.tf32

    def run(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        # Of torch's allocator, which keeps streams and graphs apart.
        room = a.new_empty(workspace, dtype=torch.uint8) if workspace else None
        if function(a, b, bias, out, transposed, tf32, room):
            raise Refused(f"cuBLASLt has no kernel that keeps k whole for {problem} and {a.shape[0]} rows")

    return run


class Refused(RuntimeError):
    """A road has no kernel for a product: the library none that does without splitting k, or Triton no room for one."""
