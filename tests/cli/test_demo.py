"""`jitnorm demo`."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import torch

from cli.run import run
from jitnorm.cli import demo


def test_demo(cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_HIDDEN_SIZES", (128,))
    monkeypatch.setattr(demo, "_SHAPES", ((1, 128), (4, 128)))
    monkeypatch.setattr(demo, "_BUDGET_S", 0.001)
    (tmp_path / "torch.py").write_text("raise ImportError('the wrong module')")  # in the working directory
    monkeypatch.chdir(tmp_path)
    printed = run("demo").stdout
    assert "not built yet, building" in printed and "found hidden size 128 in the cache" in printed
    error = float(re.search(r"relative error .*: (\S+)", printed)[1])
    assert 1e-3 < error < 3e-3
    assert "microseconds" in printed and re.search(r"^ +4 x 128( +\d+\.\d){4}$", printed, re.MULTILINE)
    lines: list[str] = []
    demo._first_call(128, "cpu", lines.append)
    assert "already built" in lines[0]
    monkeypatch.setattr(demo, "_first_call_in_new_process", lambda *_: 1.5)
    shown = json.loads(run("demo", "--format", "json").stdout)
    (kernel,) = shown["kernels"]
    assert kernel["already_built"] and kernel["hidden_size"] == 128 and kernel["new_process_ms"] == 1.5
    assert [times["num_tokens"] for times in shown["median_us"]] == [1, 4]


def test_demo_of_a_wrong_kernel(cache_dir, monkeypatch):
    monkeypatch.setattr(demo, "rmsnorm", lambda x, weight, eps: x * 1.01)
    assert "is wrong: its relative error is" in run("demo", exit_code=1).stderr


@pytest.mark.slow
def test_demo_fails_if_the_kernel_is_not_in_the_cache(cache_dir, monkeypatch):
    monkeypatch.setattr(
        demo, "rmsnorm", lambda x, weight, eps: torch.nn.functional.rms_norm(x, x.shape[1:], weight, eps)
    )
    printed = run("demo", exit_code=1).stderr
    assert printed.startswith("Error: a new process does not find the kernel in the cache") and printed.count("\n") == 1


def test_demo_of_a_process_that_prints_nothing(cache_dir, monkeypatch):
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "", ""))
    with pytest.raises(RuntimeError, match="it exited with status 0 and printed nothing"):
        demo._first_call_in_new_process(128, "cpu")
