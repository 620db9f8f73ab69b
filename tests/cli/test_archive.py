"""`jitnorm cache export` and `jitnorm cache import`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

import jitnorm
from cli.run import run
from jitnorm.cli import output
from jitnorm.jit import archive
from jitnorm.jit.cache import Cache
from jitnorm.jit.entry import MANIFEST

NAMES = ("rmsnorm_512_bf16", "rmsnorm_64_bf16")


@pytest.fixture(scope="module")
def two_kernels(tmp_path_factory) -> Path:
    """Build a cache of two kernels, which no test changes."""
    folder = tmp_path_factory.mktemp("two_kernels") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JITNORM_CACHE_DIR", str(folder))
        assert not jitnorm.warmup(hidden_size=(64, 512), dtype="bf16", device="cpu").failed
    return folder


@pytest.fixture
def exported(two_kernels, cache_dir, tmp_path, monkeypatch) -> Path:
    """Export these kernels, and return the file. The test's own cache is empty."""
    file = tmp_path / "kernels.tar"
    with monkeypatch.context() as patch:
        patch.setenv("JITNORM_CACHE_DIR", str(two_kernels))
        printed = run("cache", "export", file).stdout
    assert printed == f"exported 2 kernels, {output.size(file.stat().st_size)}, to {file}\n"
    return file


def listed() -> list[str]:
    return [row["name"] for row in json.loads(run("cache", "ls", "--format", "json").stdout)]


def test_export_and_import(exported, cache_dir):
    assert run("cache", "import", exported).stdout == f"imported 2 kernels, 0 already there; the cache is {cache_dir}\n"
    assert listed() == [*NAMES]
    assert run("cache", "verify").stdout.splitlines()[-1] == "2 kernels, 0 bad"
    assert run("cache", "import", exported).stdout == f"imported 0 kernels, 2 already there; the cache is {cache_dir}\n"
    again = exported.with_name("again")
    run("cache", "export", again)
    assert again.read_bytes() == exported.read_bytes()


def test_json(exported, cache_dir):
    labels = [entry.label for entry in archive.read(exported.read_bytes())]
    first = json.loads(run("cache", "import", exported, "--format", "json").stdout)
    assert first == {"cache": str(cache_dir), "imported": labels, "present": []}
    second = json.loads(run("cache", "import", exported, "--format", "json").stdout)
    assert second == {"cache": str(cache_dir), "imported": [], "present": labels}
    facts = json.loads(run("cache", "export", exported, "--format", "json").stdout)
    assert facts == {"file": str(exported), "size": exported.stat().st_size, "exported": labels}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--filter", "name=*_64_*"], ["rmsnorm_64_bf16"]),
        (["--filter", "arch=cpu_*", "--filter", "op=rmsnorm"], [*NAMES]),
        (["--filter", "device=cuda"], []),
        (["--older-than", "30d"], []),
    ],
)
def test_export_of_some(two_kernels, tmp_path, monkeypatch, words, names):
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(two_kernels))
    file = tmp_path / "some.tar"
    printed = run("cache", "export", file, *words, exit_code=0 if names else 1)
    if names:
        assert [entry.label.partition(".")[0] for entry in archive.read(file.read_bytes())] == names
    else:
        assert f"no kernel to export in {two_kernels}" in printed.stderr and not file.exists()


def test_the_file_follows_the_umask(two_kernels, tmp_path, monkeypatch):
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(two_kernels))
    before = os.umask(0o022)
    try:
        run("cache", "export", tmp_path / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("damage", ["library", MANIFEST])
def test_a_damaged_kernel_is_not_exported(exported, cache_dir, damage):
    """An older file stays as it was."""
    run("cache", "import", exported)
    before = exported.read_bytes()
    entry = next(Cache(cache_dir).entries())
    (entry.library if damage == "library" else entry.path / MANIFEST).write_bytes(b"{")
    printed = run("cache", "export", exported, exit_code=1).stderr
    assert printed.startswith(f"Error: {entry.path} cannot be exported: its ") and printed.count("\n") == 1
    assert exported.read_bytes() == before and {*os.listdir(exported.parent)} == {"cache", exported.name}
    assert run("cache", "import", exported).stdout.startswith("imported 1 kernel, 1 already there")
    run("cache", "export", exported)
    assert exported.read_bytes() == before


def test_an_export_that_cannot_be_written(two_kernels, tmp_path, monkeypatch):
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(two_kernels))
    printed = run("cache", "export", tmp_path / "none" / "file", exit_code=1).stderr
    assert printed == f"Error: cannot write {tmp_path / 'none' / 'file'}: No such file or directory\n"
    run("cache", "export", tmp_path, exit_code=2)


def test_a_refused_file(exported, cache_dir):
    exported.write_bytes(exported.read_bytes().replace(b"\x7fELF", b"\x7fElf"))
    printed = run("cache", "import", exported, exit_code=1).stderr
    assert printed.startswith(
        f"Error: nothing was imported from {exported}: member 'kernels/00000/library.so' was altered"
    )
    assert printed.count("\n") == 1 and not cache_dir.exists()


def test_files_that_are_none(cache_dir, tmp_path):
    assert "does not exist" in run("cache", "import", tmp_path / "none", exit_code=2).stderr
    assert "is a directory" in run("cache", "import", tmp_path, exit_code=2).stderr
    (tmp_path / "text").write_text("text")
    assert "it is not a tar archive" in run("cache", "import", tmp_path / "text", exit_code=1).stderr
    assert not cache_dir.exists()


def test_a_file_without_an_end(cache_dir, monkeypatch):
    """Reading stops at the limit."""
    monkeypatch.setattr(archive, "MAX_ARCHIVE_BYTES", 1 << 20)
    printed = run("cache", "import", "/dev/zero", exit_code=1).stderr
    assert printed == "Error: nothing was imported from /dev/zero: it has more than 1048576 bytes\n"


def test_a_large_file_is_not_read(cache_dir, tmp_path, monkeypatch):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(archive.MAX_ARCHIVE_BYTES + 1)
    monkeypatch.setattr(archive, "read", lambda data: pytest.fail("it was read"))
    printed = run("cache", "import", tmp_path / "sparse", exit_code=1).stderr
    assert printed == f"Error: nothing was imported from {tmp_path / 'sparse'}: it has more than 1073741824 bytes\n"


def test_a_small_file_takes_little_memory(exported, cache_dir):
    tracemalloc.start()
    try:
        run("cache", "import", exported)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (1 << 26)


def test_too_little_memory(exported, cache_dir, monkeypatch):
    def read(data: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(archive, "read", read)
    printed = run("cache", "import", exported, exit_code=1).stderr
    assert printed == f"Error: nothing was imported from {exported}: there is not enough memory\n"


@pytest.mark.slow
def test_export_to_the_standard_output(exported, two_kernels):
    """The pipe has the archive and nothing else. JSON has no place to go."""
    environment = {**os.environ, "JITNORM_CACHE_DIR": str(two_kernels)}
    command = [sys.executable, "-m", "jitnorm", "cache", "export", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    assert done.stdout == exported.read_bytes()
    assert done.stderr.startswith(b"exported 2 kernels, ") and done.stderr.endswith(b", to /dev/stdout\n")
    done = subprocess.run([*command, "--format", "json"], capture_output=True, timeout=120, env=environment)
    assert done.returncode == 2 and done.stdout == b"" and done.stderr.count(b"\n") == 1
    assert b"--format json prints to the standard output, which /dev/stdout is" in done.stderr


def test_a_cache_that_cannot_be_written(exported, cache_dir, monkeypatch):
    cache_dir.write_text("a file")
    printed = run("cache", "import", exported, exit_code=1).stderr
    assert printed == f"Error: kernels cannot be added to {cache_dir}: {cache_dir} is not a folder\n"


def test_the_prebuilt_layer_is_exported_and_never_written(exported, two_kernels, cache_dir, monkeypatch):
    monkeypatch.setenv("JITNORM_PREBUILT_DIR", str(two_kernels))
    run("cache", "import", exported)
    assert listed() == [*NAMES, *NAMES]
    run("cache", "export", exported.with_name("both"))
    assert exported.with_name("both").read_bytes() == exported.read_bytes()
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(two_kernels))
    assert "the prebuilt layer is never written" in run("cache", "import", exported, exit_code=1).stderr
