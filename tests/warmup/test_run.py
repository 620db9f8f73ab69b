"""What a warm-up builds, and what it reports."""

from __future__ import annotations

import _thread
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from processes import run_before_import
from tqdm import tqdm

import jitnorm
from jitnorm.jit import find, locations
from jitnorm.warmup import run

from .commands import command, config_file, refusal


def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A host compiler that runs `script` before each build."""
    real = shutil.which("c++")
    wrapper = tmp_path / "compiler"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *--version*) ;; *)\n{script}\n;; esac\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))


def test_builds_what_a_call_then_finds(cache_dir, monkeypatch):
    first = jitnorm.warmup(op="rmsnorm", hidden_size=[64, 512], dtype="bf16", device="cpu")
    assert [s.name for s in sorted(first.built, key=str)] == ["rmsnorm_512_bf16", "rmsnorm_64_bf16"]
    assert not (first.cached or first.refused or first.failed)
    again = jitnorm.warmup(hidden_size=[64, 512, 768], dtype="bf16", device="cpu")
    assert [s.name for s in again.cached] == ["rmsnorm_64_bf16", "rmsnorm_512_bf16"]
    assert [s.name for s in again.built] == ["rmsnorm_768_bf16"]
    assert str(again) == "1 built, 2 cached, 0 refused, 0 failed"
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    x, weight = torch.randn(3, 512).bfloat16(), torch.ones(512).bfloat16()
    assert jitnorm.rmsnorm(x, weight).isfinite().all()


def test_builds_what_a_call_on_heads_then_finds(cache_dir, monkeypatch):
    result = jitnorm.warmup(op="fused_inplace_qknorm", hidden_size=128, dtype="bf16", weight_dtype="fp32", device="cpu")
    assert [s.warmup for s in result.built] == [
        "--op fused_inplace_qknorm --hidden-size 128 --dtype bf16 --weight-dtype fp32"
    ]
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    q, k, weight = torch.randn(3, 4, 128).bfloat16(), torch.randn(3, 2, 128).bfloat16(), torch.ones(128)
    jitnorm.fused_inplace_qknorm(q, k, weight, weight)
    with pytest.raises(RuntimeError, match="--op fused_inplace_qknorm --hidden-size 128 --dtype bf16 --device cpu"):
        jitnorm.fused_inplace_qknorm(q, k, weight.bfloat16(), weight.bfloat16())


def test_disable_jit_does_not_forbid_it(cache_dir, monkeypatch):
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    assert len(jitnorm.warmup(hidden_size=64, device="cpu").built) == 1


def test_damaged_entry_is_built_again(cache_dir):
    spec = jitnorm.warmup(hidden_size=64, device="cpu").built[0]
    find.find(spec, mark_in_use=False).library.write_bytes(b"not a library")
    again = jitnorm.warmup(hidden_size=64, device="cpu")
    assert again.built == [spec] and find.find(spec, mark_in_use=False)


def test_loads_nothing_and_keeps_nothing_open(cache_dir, monkeypatch):
    monkeypatch.setattr(find, "_open", lambda *_: pytest.fail("a library was loaded"))
    jitnorm.warmup(hidden_size=64, device="cpu")  # what opens files once, such as the clock's zone
    before = len(os.listdir("/proc/self/fd"))
    jitnorm.warmup(hidden_size=[64, 128, 256, 512], device="cpu")
    assert len(os.listdir("/proc/self/fd")) == before
    assert not any(entry.in_use() for entry in locations.readable().entries())


@pytest.mark.parametrize(("jobs", "built"), [(2, 2), (1, 0)])
def test_jobs_run_together(cache_dir, tmp_path, monkeypatch, jobs, built):
    # Each build waits for another one, and fails where none starts.
    both = f"[ $(ls {tmp_path} | grep -c started) -ge 2 ]"
    wait = f"for i in $(seq 40); do {both} && break; sleep 0.02; done"
    rendezvous = f"touch {tmp_path}/$$.started; {wait}; {both} || {{ rm {tmp_path}/$$.started; exit 1; }}"
    compiler(tmp_path, monkeypatch, rendezvous)
    result = jitnorm.warmup(hidden_size=[64, 128], device="cpu", jobs=jobs)
    assert len(result.built) == built and len(result.failed) == 2 - built


def test_starts_no_thread_that_is_waited_for(cache_dir, monkeypatch):
    """A thread that runs out of memory before its first line leaves whoever called Thread.start waiting forever."""
    monkeypatch.setattr(threading.Thread, "start", lambda thread: pytest.fail(f"{thread} was started"))
    monkeypatch.setattr(tqdm, "monitor", None)
    said = command("--hidden-size", "64,128", "--device", "cpu")
    assert "2 built" in said.stdout


def refuse_thread(*_):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("start", [refuse_thread, lambda *_: None], ids=["refused", "ends before its first line"])
def test_builds_in_the_calling_thread_where_no_other_starts(cache_dir, monkeypatch, start):
    monkeypatch.setattr(_thread, "start_new_thread", start)
    assert len(jitnorm.warmup(hidden_size=[64, 128], device="cpu", jobs=2).built) == 2


@pytest.mark.parametrize("thread", ["other", "calling"])
def test_an_unexpected_exception_of_a_build_is_raised(cache_dir, monkeypatch, thread):
    other_began, calling_began = threading.Event(), threading.Event()

    def fail(spec):
        # Each thread waits until both have a kernel.
        is_calling = threading.current_thread() is threading.main_thread()
        (calling_began if is_calling else other_began).set()
        if not (other_began if is_calling else calling_began).wait(60):
            pytest.fail("only one thread began to build")
        if (thread == "calling") == is_calling:
            raise MemoryError(thread)
        return run.Outcome(spec, 0.0)

    monkeypatch.setattr(run, "_build", fail)
    with pytest.raises(MemoryError, match=thread):
        jitnorm.warmup(hidden_size=[64, 128, 256], device="cpu", jobs=2)


def test_one_failure_does_not_stop_the_others(cache_dir, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, 'grep -q "<128," module.cc && { echo "x.h:1:2: error: boom"; exit 1; }')
    said = command("--hidden-size", 64, "--hidden-size", 128, "--device", "cpu", exit_code=1)
    assert "built    rmsnorm_64_bf16" in said.stdout and "1 built, 0 cached, 0 refused, 1 failed" in said.stdout
    assert "failed   rmsnorm_128_bf16" in said.stderr and "boom" in said.stderr


def test_a_compiler_that_writes_nothing_is_named(cache_dir, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, "exit 0")
    (_, why), *_ = jitnorm.warmup(hidden_size=64, device="cpu").failed
    assert f"the compiler {tmp_path / 'compiler'} wrote no library" in why and "\n" not in why


def test_no_compiler_is_said_once(cache_dir, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    said = command("--hidden-size", 64, "--hidden-size", 128, "--device", "cpu", exit_code=1)
    assert said.stderr.count("C++ compiler") == 1 and "failed" not in said.output


@pytest.mark.parametrize(
    ("folder", "why"),
    [("file", "is not a folder"), ("file/cache", "is not a folder"), ("/proc/x", "No such file")],
)
def test_cache_that_cannot_be_kept_is_an_error(cache_dir, tmp_path, monkeypatch, folder, why):
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda *_: True)  # as /proc has it, for root
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(tmp_path / folder))
    said = command("--hidden-size", 64, "--device", "cpu", exit_code=1)
    assert why in said.stderr and "JITNORM_CACHE_DIR" in said.stderr and "built" not in said.output
    with pytest.raises(RuntimeError, match=f"cannot keep kernels in .*{why}"):
        jitnorm.warmup(hidden_size=64, device="cpu")


def test_config_with_an_unsupported_size(cache_dir, tmp_path):
    config = config_file(tmp_path, model_type="qwen3", hidden_size=512, head_dim=96, dtype="float16")
    said = command("--op", "rmsnorm", "--config", config, "--device", "cpu", exit_code=1)
    assert said.output.index(f"refused  {refusal(96)}") < said.output.index("built    rmsnorm_512_fp16")
    assert "1 built, 0 cached, 1 refused, 0 failed" in said.stdout
    said = command("--op", "rmsnorm", "--config", config.parent, "--device", "cpu", "--skip-unsupported")
    assert "cached   rmsnorm_512_fp16" in said.stdout and refusal(96) in said.stderr
    result = jitnorm.warmup(op="rmsnorm", config=config, device="cpu")
    assert result.refused == [refusal(96)] and len(result.cached) == 1


def test_words_for_dtypes_are_those_of_python(cache_dir):
    said = command("--hidden-size", 64, "--dtype", "bfloat16", "--weight-dtype", "float32", "--device", "cpu")
    assert "built    rmsnorm_64_bf16_fp32_weight" in said.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_architecture_without_a_gpu(cache_dir):
    said = command("--hidden-size", 64, "--device", "cuda", exit_code=1)
    assert "arch='9.0a' (--arch 9.0a)" in said.stderr


def test_skip_unsupported_sizes(cache_dir):
    said = command("--hidden-size", 64, "--hidden-size", 96, "--device", "cpu", "--skip-unsupported")
    assert "1 built, 0 cached, 1 refused, 0 failed" in said.stdout


def test_usage_errors(cache_dir):
    for words, says in (
        ([], "give --hidden-size or --config\n"),
        (["--hidden-size", 64, "--config", "x"], "give --hidden-size or --config, not both\n"),
        (["--hidden-size", 64, "--jobs", 0], "--jobs"),
        (["--op", "softmax"], "--op"),
    ):
        said = command(*words, exit_code=2).stderr
        assert "Usage:" in said and says in said
    said = command("--config", "nowhere", exit_code=1)
    assert said.stderr.startswith("Error: cannot read nowhere") and said.stderr.count("\n") == 1
    said = command("--config", "", exit_code=1)
    assert said.stderr == "Error: config must be a file or a folder, got ''\n"
    assert not cache_dir.exists()


def test_as_a_module(cache_dir):
    script = """
        import runpy, sys, warnings
        warnings.simplefilter("error")
        sys.argv[1:] = ["--hidden-size", "64", "--device", "cpu"]
        runpy.run_module("jitnorm.warmup", run_name="__main__", alter_sys=True)  # what `python -m jitnorm.warmup` does
    """
    done = run_before_import(script)
    assert done.returncode == 0 and "1 built" in done.stdout, done
    assert not done.stderr  # no warning of runpy's, and no bar where there is no terminal


@pytest.mark.nvcc
def test_cuda_without_a_gpu(cache_with_launcher):
    result = jitnorm.warmup(op="rmsnorm", hidden_size=4096, dtype="bf16", device="cuda", arch="9.0a")
    assert [s.target.sm for s in result.built] == ["sm_90a"] and not result.failed
    said = command("--hidden-size", 4096, "--dtype", "bf16", "--arch", "9.0a", "--arch", "9.9", exit_code=1)
    assert "cached   rmsnorm_4096_bf16  sm_90a" in said.stdout and "failed   rmsnorm_4096_bf16  sm_99" in said.stderr
