"""Kernels of the CPU under UBSan, on tensors without elements and on widths that fill no register."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

_COMPILER = """#!/bin/sh
case "$*" in
  *.cc*|*.cu*|*.o*) exec {cxx} -fsanitize=undefined "$@" ;;
  *) exec {cxx} "$@" ;;
esac
"""

_SCRIPT = """
import torch
import jitnorm

for count in (0, 1, 17, 64):
    x, codes = torch.randn(count), torch.empty(count, dtype=torch.float8_e4m3fn)
    jitnorm.per_tensor_quant_fp8(x, codes, torch.ones(1), True)
    jitnorm.per_tensor_quant_fp8(x, codes, torch.ones(1))
    rows = torch.randn(count, 16)
    jitnorm.per_token_quant_fp8(rows, rows.to(torch.float8_e4m3fn), torch.empty(count, 1))
    jitnorm.silu_and_mul(torch.randn(count, 2 * 13))
    jitnorm.rmsnorm_quant_fp8(torch.randn(count, 64), torch.ones(64))
    jitnorm.layernorm(torch.randn(count, 13), bias=torch.ones(13), return_stats=True)
    jitnorm.layernorm_quant_fp8(torch.randn(count, 13), None, None, torch.ones(1))
"""


@pytest.mark.slow
def test_no_undefined_behaviour(tmp_path):
    cxx = shutil.which("g++")
    probe = tmp_path / "probe.cc"
    probe.write_text("int main() { return 0; }")
    command = [str(cxx), "-fsanitize=undefined", str(probe), "-o", str(tmp_path / "probe")]
    if not cxx or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no g++ with UBSan")
    compiler = tmp_path / "g++"
    compiler.write_text(_COMPILER.format(cxx=cxx))
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "JITNORM_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", _SCRIPT], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "cache").glob("kernels/*/*/*.so"))
    assert "runtime error" not in done.stderr, done.stderr
