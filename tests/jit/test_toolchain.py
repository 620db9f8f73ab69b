"""Finding compilers, and storing their versions."""

from __future__ import annotations

import os
import shutil

import pytest

from jitnorm.jit import toolchain
from jitnorm.jit.cache import Cache


@pytest.fixture
def asked(monkeypatch):
    """The compilers that were started."""
    started = []
    real = toolchain._output
    monkeypatch.setattr(toolchain, "_output", lambda path, *a: started.append(path) or real(path, *a))
    return started


def test_a_compiler_is_asked_once(tmp_path, asked):
    first = toolchain.identify("cpu", Cache(tmp_path))
    assert len(asked) == 1 and first.cxx.version
    assert toolchain.identify("cpu", Cache(tmp_path)) == first
    assert len(asked) == 1


def test_an_exchanged_compiler_is_asked_again(tmp_path, asked, monkeypatch):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho my compiler 1.0\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    old = toolchain.identify("cpu", Cache(tmp_path))
    compiler.write_text("#!/bin/sh\necho my compiler 2.0 and longer\n")
    new = toolchain.identify("cpu", Cache(tmp_path))
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
        keys.add(toolchain.identify("cpu", Cache(tmp_path)).key)
    assert len(keys) == 1


def test_another_environment_looks_again(tmp_path, asked, monkeypatch):
    toolchain.identify("cpu", Cache(tmp_path))
    monkeypatch.setenv("CXX", shutil.which("g++") or shutil.which("c++"))
    toolchain.identify("cpu", Cache(tmp_path))
    assert len(asked) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cxx": {}}', '{"cxx": null, "nvcc": null}'])
def test_a_spoilt_memory_is_no_memory(tmp_path, asked, content):
    toolchain.identify("cpu", Cache(tmp_path))
    (file,) = (tmp_path / "toolchains").iterdir()
    file.write_text(content)
    assert toolchain.identify("cpu", Cache(tmp_path)).cxx.version
    assert len(asked) == 2


def test_a_memory_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "toolchains").write_text("a file where the folder should be")
    assert toolchain.identify("cpu", Cache(tmp_path)).cxx.version
    assert toolchain.identify("cpu", None).cxx.version


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("script", "why"),
    [("#!/bin/sh\nexit 3", "--version exited 3"), ("#!/bin/sh", "--version printed nothing"), ("#!/x", "No such file")],
)
def test_what_does_not_answer_is_no_compiler(tmp_path, monkeypatch, device, script, why):
    broken = tmp_path / "g++"
    broken.write_text(f"{script}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert toolchain.identify(device, None) is None
    with pytest.raises(RuntimeError, match=rf"CXX is .*/g\+\+, which does not work \(.*{why}") as raised:
        toolchain.require(device, None)
    assert "nvcc" not in str(raised.value)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"the C\+\+ compiler is .*/g\+\+, which does not work"):
        toolchain.require(device, None)


def test_a_compiler_with_arguments_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "ccache g++")
    with pytest.raises(RuntimeError, match=r"CXX must be .* without arguments, got 'ccache g\+\+'"):
        toolchain.require("cpu", None)


@pytest.mark.nvcc
def test_nvcc_says_where_its_toolkit_is():
    nvcc = toolchain.identify("cuda", None).nvcc
    assert os.path.isfile(os.path.join(nvcc.top, "include", "cuda.h"))
    assert nvcc.version.count(".") == 2
