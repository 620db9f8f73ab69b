"""Finding compilers, and storing their versions."""

from __future__ import annotations

import os
import shutil

import pytest

from jitnorm.jit import nvrtc, toolchain
from jitnorm.jit.cache import Cache
from jitnorm.jit.spec import Target

CPU, HOPPER = Target("cpu"), Target.cuda("9.0a")


@pytest.fixture
def asked(monkeypatch):
    """The compilers that were started."""
    started = []
    real = toolchain._output
    monkeypatch.setattr(toolchain, "_output", lambda path, *a: started.append(path) or real(path, *a))
    return started


def test_a_compiler_is_asked_once(tmp_path, asked):
    first = toolchain.identify(CPU, Cache(tmp_path))
    assert len(asked) == 1 and first.cxx.version
    assert toolchain.identify(CPU, Cache(tmp_path)) == first
    assert len(asked) == 1


def test_an_exchanged_compiler_is_asked_again(tmp_path, asked, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho my compiler 1.0\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    old = toolchain.identify(CPU, Cache(tmp_path))
    compiler.write_text("#!/bin/sh\necho my compiler 2.0 and longer\n")
    new = toolchain.identify(CPU, Cache(tmp_path))
    assert (old.cxx.version, new.cxx.version) == ("my compiler 1.0", "my compiler 2.0 and longer")
    assert old.key != new.key


def test_one_version_has_one_key_wherever_it_lies(tmp_path, monkeypatch):
    keys = set()
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        compiler = tmp_path / place / "c++"
        compiler.write_text("#!/bin/sh\necho my compiler 1.0\n")
        compiler.chmod(0o755)
        os.utime(compiler, (1, len(keys)))
        monkeypatch.setenv("CXX", str(compiler))
        keys.add(toolchain.identify(CPU, Cache(tmp_path)).key)
    assert len(keys) == 1


def test_another_environment_looks_again(tmp_path, asked, monkeypatch):
    toolchain.identify(CPU, Cache(tmp_path))
    monkeypatch.setenv("CXX", shutil.which("g++") or shutil.which("c++"))
    toolchain.identify(CPU, Cache(tmp_path))
    assert len(asked) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"cxx": {}}', '{"cxx": null, "nvcc": null, "nvrtc": null}', '{"gcc": null}']
)
def test_a_spoilt_memory_is_no_memory(tmp_path, asked, content):
    toolchain.identify(CPU, Cache(tmp_path))
    (file,) = (tmp_path / "toolchains").iterdir()
    file.write_text(content)
    assert toolchain.identify(CPU, Cache(tmp_path)).cxx.version
    assert len(asked) == 2


def test_a_memory_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "toolchains").write_text("a file where the folder should be")
    assert toolchain.identify(CPU, Cache(tmp_path)).cxx.version
    assert toolchain.identify(CPU, None).cxx.version


@pytest.mark.parametrize("target", [CPU, pytest.param(HOPPER, marks=pytest.mark.nvcc)], ids=["cpu", "nvcc"])
@pytest.mark.parametrize(
    ("script", "why"),
    [("#!/bin/sh\nexit 3", "--version exited 3"), ("#!/bin/sh", "--version printed nothing"), ("#!/x", "No such file")],
)
def test_what_does_not_answer_is_no_compiler(tmp_path, monkeypatch, target, script, why):
    monkeypatch.setenv("JITNORM_CUDA_COMPILER", "nvcc")
    broken = tmp_path / "g++"
    broken.write_text(f"{script}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert toolchain.identify(target, None) is None
    with pytest.raises(RuntimeError, match=rf"CXX is .*/g\+\+, which does not work \(.*{why}") as raised:
        toolchain.require(target, None)
    assert "nvcc" not in str(raised.value)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"the C\+\+ compiler is .*/g\+\+, which does not work"):
        toolchain.require(target, None)


def test_a_compiler_with_arguments_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "ccache g++")
    with pytest.raises(RuntimeError, match=r"CXX must be .* without arguments, got 'ccache g\+\+'"):
        toolchain.require(CPU, None)


@pytest.mark.nvcc
def test_nvcc_is_asked_for_its_version(monkeypatch):
    monkeypatch.setenv("JITNORM_CUDA_COMPILER", "nvcc")
    found = toolchain.identify(HOPPER, None)
    assert found.nvcc.version.count(".") == 2 and found.cxx.version and not found.nvrtc
    assert [*found.versions()] == ["c++", "nvcc"]


class FakeNvrtc:
    """NVRTC for some architectures, which is found where a file is."""

    def __init__(self, monkeypatch, tmp_path, archs=(80, 90)):
        self.path, self.version, self.archs = tmp_path / "libnvrtc.so", "12.3", archs
        self.path.write_bytes(b"a library")
        self.searches = 0
        monkeypatch.setattr(nvrtc, "find", self.find)
        monkeypatch.setattr(nvrtc, "load", lambda path: self)

    def find(self):
        self.searches += 1
        if not self.path.exists():
            raise nvrtc.NvrtcError("it is not installed")
        return str(self.path)


@pytest.fixture
def fake_nvrtc(monkeypatch, tmp_path):
    return FakeNvrtc(monkeypatch, tmp_path)


def test_nvrtc_is_preferred_and_remembered(tmp_path, fake_nvrtc):
    first = toolchain.identify(HOPPER, Cache(tmp_path))
    assert first.versions()["nvrtc"].startswith("12.3, build ") and fake_nvrtc.searches == 1
    assert toolchain.identify(HOPPER, Cache(tmp_path)) == first and fake_nvrtc.searches == 1
    fake_nvrtc.path.write_bytes(b"Another library, of another build")
    assert toolchain.identify(HOPPER, Cache(tmp_path)).key != first.key


def test_nvcc_where_nvrtc_does_not_know_the_architecture(tmp_path, fake_nvrtc, monkeypatch):
    monkeypatch.setattr(toolchain, "_identify_nvcc", lambda path: toolchain.Compiler("nvcc", "13.0.88", 0, 0))
    blackwell = Target.cuda("10.0a")
    for find in (toolchain.identify, toolchain.require):
        assert find(blackwell, Cache(tmp_path)).nvcc and not find(blackwell, Cache(tmp_path)).nvrtc
        assert find(HOPPER, Cache(tmp_path)).nvrtc
        monkeypatch.setenv("JITNORM_CUDA_COMPILER", "nvcc")
        assert find(HOPPER, Cache(tmp_path)).nvcc
        monkeypatch.delenv("JITNORM_CUDA_COMPILER")
    assert toolchain.require(HOPPER, None, without_nvrtc=True).nvcc


def test_no_cuda_compiler_is_one_error(tmp_path, fake_nvrtc, monkeypatch):
    fake_nvrtc.path.unlink()
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    assert toolchain.identify(HOPPER, None) is None
    found = (
        r"needs a CUDA compiler for sm_90a and found none: looked for NVRTC .*\(it is not installed\) and for an nvcc"
    )
    with pytest.raises(RuntimeError, match=found + r".*CUDA_HOME.*pip install 'jitnorm\[nvrtc\]'"):
        toolchain.require(HOPPER, None)
    monkeypatch.setenv("JITNORM_CUDA_COMPILER", "nvcc")
    with pytest.raises(RuntimeError, match=r"looked for an nvcc .*pip install 'jitnorm\[nvcc\]'"):
        toolchain.require(HOPPER, None)


def test_another_name_of_a_cuda_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("JITNORM_CUDA_COMPILER", "clang")
    with pytest.raises(RuntimeError, match="JITNORM_CUDA_COMPILER must be one of auto, nvrtc, nvcc, got 'clang'"):
        toolchain.identify(HOPPER, None)
