"""`jitnorm doctor`."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import jitnorm
from cli.run import run
from jitnorm.cli import output, trial_build
from jitnorm.dispatch import selection
from jitnorm.jit import nvrtc, toolchain

pytestmark = pytest.mark.usefixtures("trial_builds")


@pytest.fixture
def real_trial_builds(trial_builds, tmp_path, monkeypatch) -> Path:
    """Let the command build, and return the folder that it builds in."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr("jitnorm.cli.diagnostics.try_builds", trial_build.try_builds)
    return folder


def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Select a host compiler that prints its version, and runs `script` instead of building."""
    wrapper = tmp_path / "compiler"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo c++ 1.0; exit 0;; esac\n{script}\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    return wrapper


def remove_cuda_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> str:
        raise nvrtc.NvrtcError("it is not installed")

    monkeypatch.setattr(nvrtc, "find", find)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)


@pytest.mark.slow
def test_doctor(cache_dir, tmp_path, monkeypatch, real_trial_builds):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")  # it applies to calls only
    facts = json.loads(run("doctor", "--format", "json").stdout)
    assert facts["versions"]["jitnorm"] == jitnorm.__version__ and facts["can_build"]["cpu"]
    assert facts["compilers"]["c++"]["path"] == toolchain.find_cxx()
    free = facts["caches"][0].pop("free")
    assert free > 0 and facts["temporary"]["root"] == str(real_trial_builds) and facts["temporary"]["free"] > 0
    assert facts["caches"][0] == {
        "root": str(cache_dir), "prebuilt": False, "exists": False, "problem": None, "kernels": 0, "size": 0,
    }  # fmt: skip
    for device in ("cpu", "cuda") if toolchain.find_nvrtc() else ("cpu",):
        assert facts["builds"][device]["works"] and facts["builds"][device]["seconds"] > 0, facts["builds"]
    assert facts["environment"]["JITNORM_CACHE_DIR"] == str(cache_dir)
    assert [*tmp_path.iterdir()] == [real_trial_builds] and not [
        *real_trial_builds.iterdir()
    ]  # everything else was removed


def test_doctor_prints(cache_dir):
    printed = run("doctor").stdout
    assert "not a variable" not in printed
    assert str(cache_dir) in printed and torch.__version__ in printed
    assert re.search(r"cpu +yes  built and loaded a kernel in 0\.10 s\n", printed)
    cuda = r"cuda +yes  built and loaded a kernel in 0\.10 s(, for a device that is not here)?\n"
    if toolchain.find_nvrtc():
        assert bool(re.search(cuda, printed)[1]) != torch.cuda.is_available()
    assert re.search(rf"{cache_dir}  0 kernels, 0 B; \d+\.\d GB free; usable", printed)
    assert re.search(rf"^temporary folder\n +{tempfile.gettempdir()} +\d+\.\d GB free$", printed, re.MULTILINE)


@pytest.mark.slow
def test_doctor_builds_with_a_compiler_that_prints_its_version(cache_dir, tmp_path, monkeypatch, real_trial_builds):
    """A compiler may print its version and do nothing else."""
    wrapper = compiler(tmp_path, monkeypatch, "echo 'x.h:1:2: error: boom'; echo later; exit 1")
    remove_cuda_compilers(monkeypatch)
    printed = run("doctor", exit_code=1).stdout
    assert re.search(r"^  cpu +no +jitnorm cannot build .*x\.h:1:2: error: boom$", printed, re.MULTILINE), printed
    assert re.search(r"^  cuda +no +no nvrtc that works$", printed, re.MULTILINE)
    advice = f"error: boom; CXX is {wrapper}: unset or correct CXX\n"
    assert re.search(rf"^advice: building for cpu fails: .*{re.escape(advice)}", printed, re.MULTILINE)
    assert "apt-get" not in printed and not cache_dir.exists() and not [*real_trial_builds.iterdir()]


def test_doctor_kills_a_build_that_hangs(cache_dir, tmp_path, monkeypatch, real_trial_builds):
    monkeypatch.setattr(trial_build, "_TIMEOUT_S", 0.3)
    compiler(tmp_path, monkeypatch, "sleep 1000")
    assert trial_build.try_builds({"cpu": None, "cuda": "9.0a"}) == dict.fromkeys(
        ("cpu", "cuda"), trial_build.TrialBuild(False, problem="not done after 0.3 s, and killed")
    )
    assert not [*real_trial_builds.iterdir()]


def test_a_trial_build_that_kills_its_process(tmp_path):
    (tmp_path / "log").write_text("jitnorm: building\n")
    assert trial_build._result(-11, tmp_path / "log").problem == (
        "the process that built and loaded a kernel was killed by signal 11"
    )
    assert trial_build._result(1, tmp_path / "log") == trial_build.TrialBuild(False, problem="jitnorm: building")
    assert trial_build._result(0, tmp_path / "log").works is False  # it ended before it was done


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "os.statvfs",
            lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC),
            "is mounted noexec: set TMPDIR to another folder",
        ),
        ("tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left")), "No space left"),
    ],
)
def test_a_trial_build_that_is_not_possible(monkeypatch, name, value, message):
    monkeypatch.setattr(f"jitnorm.cli.trial_build.{name}", value)
    found = trial_build.try_builds({"cpu": None})["cpu"]
    assert found.works is None and found.problem.startswith("not tried, as") and message in found.problem


def test_doctor_without_a_trial_build(cache_dir, monkeypatch):
    """The compilers may work nevertheless."""
    monkeypatch.setattr(
        "jitnorm.cli.diagnostics.try_builds",
        lambda archs: dict.fromkeys(archs, trial_build.TrialBuild(None, problem="not tried: x")),
    )
    printed = run("doctor").stdout
    assert re.search(r"cpu +yes +not tried: x\n", printed) and "advice: building for cpu was not tried: x\n" in printed


@pytest.mark.parametrize(("inodes", "free"), [((0, 0), 5_000_000), ((100, 7), 5_000_000), ((100, 0), 0)])
def test_room_in_the_file_system(cache_dir, tmp_path, monkeypatch, inodes, free):
    asked = []

    def statvfs(place):
        asked.append(Path(place))
        if not Path(place).exists():
            raise FileNotFoundError
        return SimpleNamespace(f_files=inodes[0], f_favail=inodes[1], f_bavail=5000, f_frsize=1000, f_flag=0)

    monkeypatch.setattr("jitnorm.cli.diagnostics.os.statvfs", statvfs)
    facts = json.loads(run("doctor", "--format", "json").stdout)
    assert facts["caches"][0]["free"] == facts["temporary"]["free"] == free
    assert {cache_dir, tmp_path} <= {*asked}  # the cache is not there yet: its folder's file system is
    full = f"the file system of {cache_dir} is full, or nearly: {output.size(free)} can be written"
    assert full in facts["advice"]


def test_doctor_without_compilers(cache_dir, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    printed = run("doctor", exit_code=1).stdout
    assert "advice: no C++ compiler" in printed and re.search(r"cpu +no", printed)


def test_doctor_with_a_broken_compiler(cache_dir, monkeypatch, trial_builds):
    monkeypatch.setenv("CXX", "false")
    printed = run("doctor", exit_code=1).stdout
    assert re.search(
        r"advice: CXX=false \(.*bin/false\) does not work, so nothing can be built: unset or correct CXX\n", printed
    )
    assert re.search(r"c\+\+ +unknown .*bin/false", printed) and "apt-get" not in printed and trial_builds == [{}]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CXX", "/nowhere/g++", "CXX=/nowhere/g++ is not found, so nothing can be built: unset or correct CXX"),
        ("CXX", "g++ -m32", "CXX=g++ -m32 is not found, so nothing can be built: unset or correct CXX"),
        (
            "CXX",
            os.fsdecode(b"/\xff/c++"),
            "CXX=/\ufffd/c++ is not found, so nothing can be built: unset or correct CXX",
        ),
        (
            "NVCC",
            "/nowhere/nvcc",
            "NVCC=/nowhere/nvcc is not found, so no CUDA kernel can be built: unset or correct NVCC",
        ),
        ("NVCC", "true", "does not work, so no CUDA kernel can be built: unset or correct NVCC"),
    ],
)
def test_doctor_with_a_variable_that_is_wrong(cache_dir, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("JITNORM_CUDA_COMPILER", "nvcc" if variable == "NVCC" else "auto")
    printed = run("doctor", exit_code=int(variable == "CXX")).stdout
    assert message in printed and "apt-get" not in printed and "pip install 'jitnorm[nvcc]'" not in printed


def test_doctor_with_a_cache_folder_that_cannot_be_read(monkeypatch):
    """The rest is reported."""
    monkeypatch.setenv("JITNORM_CACHE_DIR", f"/tmp/{'a' * 5000}")
    printed = run("doctor").stdout
    assert "File name too long. Set JITNORM_CACHE_DIR" in printed and re.search(r"cpu +yes", printed)


def test_doctor_shows_records_of_any_content(cache_dir, monkeypatch):
    """They come from files, which may hold anything."""
    fields = {"backend": "a", "problem": 5, "gpu": None, "driver": "\x1b[2J", "library": ["b"], "first_difference": 7}
    monkeypatch.setattr("jitnorm.cli.diagnostics.cached_results", lambda: iter([SimpleNamespace(**fields)]))
    assert "\x1b" not in run("doctor").stdout


def test_doctor_without_a_cuda_compiler(cache_dir, monkeypatch):
    remove_cuda_compilers(monkeypatch)
    printed = run("doctor").stdout
    assert "advice: no NVRTC, so no CUDA kernel can be built: pip install 'jitnorm[nvrtc]'" in printed
    assert re.search(r"cpu +yes .*\n +cuda +no +no nvrtc that works\n", printed)


def test_doctor_is_content_with_nvcc(cache_dir, monkeypatch):
    remove_cuda_compilers(monkeypatch)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: "/opt/nvcc")
    monkeypatch.setattr(toolchain, "_identify_nvcc", lambda path: toolchain.Compiler(path, "13.0.88", 0, 0))
    printed = run("doctor").stdout
    assert "NVRTC, so" not in printed and re.search(r"cuda +yes ", printed)


def test_doctor_advises(cache_dir, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("JITNORM_PREBUILT_DIR", str(tmp_path / "nothing"))
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    monkeypatch.setenv("JITNORM_CASHE_DIR", "/fast")
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    advice = "\n".join(json.loads(run("doctor", "--format", "json").stdout)["advice"])
    for word in (
        "is not a folder. Set JITNORM_CACHE_DIR",
        "no such folder",
        "JITNORM_DISABLE_JIT",
        "torch-c-dlpack-ext",
        "JITNORM_CASHE_DIR is not a variable of jitnorm: did you mean JITNORM_CACHE_DIR?",
    ):
        assert word in advice


def test_doctor_reports_which_backend_serves_a_call(cache_dir, monkeypatch):
    def dispatch():
        selection._backend_from_environment.cache_clear()
        return json.loads(run("doctor", "--format", "json").stdout)["dispatch"]

    monkeypatch.delenv("JITNORM_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = dispatch()
    assert (facts["backend"], facts["problem"]) == ("auto", None)
    assert [(call["call"], call["backend"]) for call in facts["calls"]] == [
        ("rmsnorm bf16 4096 cpu", "jit"),
        ("rmsnorm fp32 4096 cpu", "jit"),
        ("rmsnorm bf16 16384 cpu", "jit"),
        ("rmsnorm bf16 111 cpu", "jit"),
    ]
    assert facts["calls"][3]["why"] == "the input is not on CUDA"
    printed = run("doctor").stdout
    assert "jitnorm.dispatch, backend auto\n" in printed and re.search(
        r"^rmsnorm bf16 4096 cpu +jit +the input", printed, re.M
    )
    monkeypatch.setenv("JITNORM_BACKEND", "flashinfer")
    facts = dispatch()
    assert [call["backend"] for call in facts["calls"]] == [None] * 4
    assert "flashinfer was requested and does not support" in facts["calls"][2]["why"]
    assert re.search(r"^rmsnorm bf16 111 cpu +none +the backend flashinfer", run("doctor").stdout, re.MULTILINE)
    monkeypatch.setenv("JITNORM_BACKEND", "fast")
    assert dispatch()["calls"] == []
    assert run("doctor").stdout.count("JITNORM_BACKEND must be one of auto, auto-fast, jit") == 2
    selection._backend_from_environment.cache_clear()
