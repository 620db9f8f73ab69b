"""The command `jitnorm`: the cache's care, the doctor, the demo, and how all of them fail."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result

import jitnorm
from jitnorm.cli import demo, filters, main, output, trial
from jitnorm.dispatch import wanted
from jitnorm.jit import cleanup, toolchain
from jitnorm.jit.cache import Cache
from jitnorm.jit.entry import MANIFEST, Entry

SIZES = (64, 512, 768)
DAY = 86400


def command(*words: object, exit_code: int = 0) -> Result:
    """`jitnorm ...`, in this process; an exit code is one that was meant, never a traceback's."""
    result = CliRunner().invoke(main, [*map(str, words)])
    assert isinstance(result.exception, (SystemExit, type(None))), result.exception
    assert result.exit_code == exit_code, result.output
    return result


def listed(*words: object) -> list[dict]:
    return json.loads(command("cache", "ls", "--format", "json", *words).stdout)


def names(*words: object) -> list[str]:
    return [row["name"] for row in listed(*words)]


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A cache of three kernels."""
    folder = tmp_path_factory.mktemp("stock") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JITNORM_CACHE_DIR", str(folder))
        assert not jitnorm.warmup(hidden_size=SIZES, dtype="bf16", device="cpu").failed
    return folder


@pytest.fixture
def kernels(stock, cache_dir) -> list[Entry]:
    """A copy of it as this test's cache; the entries in the order of their names: 512, 64, 768."""
    shutil.copytree(stock, cache_dir)
    return list(Cache(cache_dir).entries())


@pytest.fixture
def held(kernels) -> Iterator[Entry]:
    """One of the kernels, in use by some process."""
    fd = os.open(kernels[0].path / MANIFEST, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    yield kernels[0]
    os.close(fd)


def used_days_ago(entries: list[Entry], days: tuple[float, ...]) -> None:
    for entry, ago in zip(entries, days, strict=True):
        os.utime(entry.path / MANIFEST, (time.time() - ago * DAY,) * 2)


def leave_behind(cache: Path) -> tuple[Path, Path, Path]:
    """What an old unfinished build, a running one and a failed one leave."""
    kernel = "rmsnorm_64_bf16.cpu_x86_64"
    old, running = (
        cache / "staging" / f"{kernel}.host.0a1b2c3d.12.abcdefgh",
        cache / "staging" / f"{kernel}.host.0a1b2c3d.13.abcdefgh",
    )
    failed = cache / "quarantine" / f"failed.{kernel}.01234567"
    for folder in (old, running, failed):
        folder.mkdir(parents=True)
        (folder / "library.so").write_bytes(bytes(1000))
    os.utime(old, (time.time() - 2 * DAY,) * 2)
    return old, running, failed


# Where it is, what is in it


def test_dir(cache_dir, monkeypatch, tmp_path):
    assert command("cache", "dir").stdout == f"{cache_dir}\n" and not cache_dir.exists()
    monkeypatch.delenv("JITNORM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert command("cache", "dir").stdout == f"{tmp_path / 'xdg' / 'jitnorm'}\n"


def test_a_cache_that_does_not_exist(cache_dir):
    assert command("cache", "ls").stdout == f"empty: no kernels in {cache_dir}\n"
    assert listed() == []
    assert "empty" in command("cache", "verify").stdout
    for words in (["clear"], ["clear", "--yes"], ["prune"], ["prune", "--max-size", "0"]):
        assert "nothing to remove" in command("cache", *words).stdout
    assert not cache_dir.exists()


def test_ls(kernels, cache_dir):
    rows = listed()
    assert [row["name"] for row in rows] == ["rmsnorm_512_bf16", "rmsnorm_64_bf16", "rmsnorm_768_bf16"]
    row = rows[1]
    assert (row["op"], row["device"], row["kernel"]) == ("rmsnorm", "cpu", "RMSNormWarpKernel<64, bf16_t, bf16_t>")
    assert row["path"] == str(kernels[1].path) and not row["in_use"] and not row["prebuilt"]
    assert row["size"] == sum(f.stat().st_size for f in kernels[1].path.iterdir())
    table = command("cache", "ls").stdout
    assert re.search(
        r"^rmsnorm_64_bf16 +RMSNormWarpKernel<64, bf16_t, bf16_t> +cpu_\w+ +\d+\.\d KB +20.*just now$",
        table,
        re.MULTILINE,
    )
    assert f"3 kernels, {output.size(sum(r['size'] for r in rows))} in {cache_dir}" in table


@pytest.mark.parametrize(
    ("conditions", "sizes"),
    [
        (["name=rmsnorm_64_bf16"], {64}),
        (["name=*_5*"], {512}),
        (["name!=*_5*", "op=rmsnorm"], {64, 768}),
        (["device=cuda"], set()),
        (["arch=cpu_*"], set(SIZES)),
        (["size>10KB"], set(SIZES)),
        (["size>1MB"], set()),
        (["size > 1KB", "size<1GB", "name=*_768_*"], {768}),
    ],
)
def test_filters(kernels, conditions, sizes):
    words = [word for condition in conditions for word in ("--filter", condition)]
    assert set(names(*words)) == {f"rmsnorm_{size}_bf16" for size in sizes}


def test_older_than(kernels):
    used_days_ago(kernels[1:2], (40,))
    assert names("--older-than", "30d") == ["rmsnorm_64_bf16"]
    assert names("--older-than", "6w") == []
    assert "40d ago" in command("cache", "ls").stdout


@pytest.mark.parametrize("bad", ["size", "size>", "size>big", "size=1XB", "color=red", "name>a", "=x", ""])
def test_bad_filters(bad):
    said = command("cache", "ls", "--filter", bad, exit_code=2)
    assert "Invalid value for '--filter'" in said.stderr


@pytest.mark.parametrize(
    ("option", "bad"),
    [
        ("--older-than", "30"),
        ("--older-than", "soon"),
        ("--older-than", "99999999d"),
        ("--older-than", "9" * 400 + "w"),
        ("--older-than", "9" * 5000 + "s"),
        ("--max-size", "-1"),
        ("--max-size", "9" * 20 + "TB"),
        ("--max-size", "9" * 400 + "TB"),
        ("--max-size", "9" * 5000),
    ],
)
def test_bad_ages_and_sizes(cache_dir, option, bad):
    said = command("cache", "prune", option, bad, exit_code=2).stderr
    assert f"Invalid value for '{option}'" in said and len(said) < 400


@pytest.mark.parametrize(
    "values",
    [
        {"built": "9999-12-31T23:59:59-23:59"},
        {"built": "0001-01-01T00:00:00"},
        {"built": 10**400, "op": ["rmsnorm"], "kernel": {"a": 1}, "device": None, "includes": 5},
        {"built": "now\n\x1b[2J", "kernel": "\ud800\x1b]0;title\x07"},
    ],
)
def test_manifests_with_other_values(kernels, values):
    entry = kernels[1]
    (entry.path / MANIFEST).write_text(json.dumps({**entry.manifest, **values}))
    os.utime(entry.path / MANIFEST, (2**34, 2**34))  # of a clock that was wrong
    table = command("cache", "ls").stdout
    assert "rmsnorm_64_bf16" in table and "\x1b" not in table and "\x07" not in table
    assert len(table.splitlines()) == 2 + 3 + 2
    assert [row["name"] for row in listed()] == ["rmsnorm_512_bf16", "rmsnorm_64_bf16", "rmsnorm_768_bf16"]
    for words in (
        ["verify"],
        ["show", entry.label],
        ["prune", "--dry-run"],
        ["clear", "--older-than", "1d", "--dry-run"],
    ):
        command("cache", *words)
    command("doctor")


def test_a_time_beyond_the_calendar(kernels, monkeypatch):
    monkeypatch.setattr(Entry, "last_used", property(lambda entry: 2.0**60))
    assert [row["last_used"] for row in listed()] == [None] * 3
    assert "just now" in command("cache", "ls").stdout


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("arch=9.0", "arch must be such as sm_90a, sm_120 or cpu_x86_64, or a pattern such as sm_*, got '9.0'"),
        ("arch=90a", "arch must be such as sm_90a"),
        ("arch!=hopper", "arch must be such as sm_90a"),
        ("arch=9*", "arch must be such as sm_90a"),
        ("device=gpu", "device must be cuda or cpu, got 'gpu'"),
        ("device!=CPU", "device must be cuda or cpu, got 'CPU'"),
        ("device=g*", "device must be cuda or cpu"),
        ("op=rms_norm", "'rms_norm' is no operator with kernels: is rmsnorm meant?"),
        ("op=softmax", "one of rmsnorm, gemma_rmsnorm"),
        ("name=rmsnorm-64", "name must be a kernel's name such as rmsnorm_4096_bf16"),
        (f"size>{'9' * 29}TB", "more than a file system can hold"),
        (f"size>{'9' * 400}", "is not a size"),
    ],
)
def test_filters_that_no_kernel_can_meet(kernels, condition, says):
    for words in (["ls"], ["clear", "--yes"]):
        said = command("cache", *words, "--filter", condition, exit_code=2).stderr
        assert says in " ".join(said.split()) and len(said) < 800
    assert len(names()) == 3


@pytest.mark.parametrize(
    "condition", ["arch=*_90a", "arch=[sc]*", "device=c*", "op=*norm", "op=older_*", "name=?msnorm_*"]
)
def test_patterns_are_not_refused(kernels, condition):
    command("cache", "ls", "--filter", condition)


def test_units():
    assert [filters.parse_size(s) for s in ("300", "1KB", "1.5 MB", "2g", "1KiB")] == [
        300,
        1000,
        1500000,
        2 * 10**9,
        1024,
    ]
    assert [filters.parse_age(s) for s in ("90s", "2m", "1h", "1.5d", "1w")] == [90, 120, 3600, 129600, 604800]
    assert [output.size(n) for n in (0, 999, 1000, 999960, 2 * 10**12)] == [
        "0 B",
        "999 B",
        "1.0 KB",
        "1.0 MB",
        "2000.0 GB",
    ]


def test_show(kernels):
    entry = kernels[1]
    paths = (entry.path, entry.library)
    for name in ("rmsnorm_64_bf16", entry.label, entry.path.parent.name, *paths):
        said = command("cache", "show", name).stdout
        assert str(entry.path) in said and entry.manifest["sha256"] in said and entry.library.name in said
        assert (entry.path / "module.cc").read_text().strip() in said


def test_show_of_none_and_of_several(kernels, cache_dir):
    said = command("cache", "show", "rmsnorm_6", exit_code=1)  # no prefix of a name is a name
    assert said.stderr.count("\n") == 1 and "rmsnorm_6" in said.stderr and str(cache_dir) in said.stderr
    other = kernels[1].path.with_name("0123456789ab")
    shutil.copytree(kernels[1].path, other)
    said = command("cache", "show", "rmsnorm_64_bf16", exit_code=1)
    first, *lines = said.stderr.splitlines()
    assert "Give one of these" in first and sorted(lines) == sorted([kernels[1].label, Entry(other).label])
    assert str(other) in command("cache", "show", Entry(other).label).stdout


def test_entry_in_use(held):
    assert [row["in_use"] for row in listed()] == [True, False, False]
    assert command("cache", "ls").stdout.count("in use") == 1


def test_damaged_manifest(kernels):
    (kernels[0].path / MANIFEST).write_text("{")
    (kernels[1].path / MANIFEST).unlink()
    assert command("cache", "ls").stdout.count("unreadable") == 2
    assert command("cache", "verify", exit_code=1).stdout.count("bad  ") == 2
    assert "removed 3 kernels" in command("cache", "clear", "--yes").stdout


# Whether it is sound


def test_verify(kernels):
    assert command("cache", "verify").stdout.splitlines()[-1] == "3 kernels, 0 bad"
    libraries = [entry.library for entry in kernels]
    content = bytearray(kernels[0].library.read_bytes())
    content[len(content) // 2] ^= 1
    kernels[0].library.write_bytes(content)
    kernels[1].path.chmod(0o777)
    said = command("cache", "verify", exit_code=1).stdout.splitlines()
    assert said[0].startswith(f"bad  {kernels[0].label}: ") and "hash" in said[0]
    assert said[1].startswith(f"bad  {kernels[1].label}: ") and "other users" in said[1]
    assert said[2:] == [f"ok   {kernels[2].label}", "3 kernels, 2 bad"]
    assert [r["ok"] for r in json.loads(command("cache", "verify", "--format", "json", exit_code=1).stdout)] == [
        0,
        0,
        1,
    ]
    assert all(library.exists() for library in libraries)


# Removing


def test_clear_asks_first(kernels):
    said = command("cache", "clear", exit_code=1)
    assert "--yes" in said.stderr and len(names()) == 3
    said = command("cache", "clear", "--dry-run")
    assert said.stdout.count("would remove  rmsnorm_") == 3 and "nothing was removed" in said.stdout
    assert len(names()) == 3


def test_clear(kernels, cache_dir):
    old, running, failed = leave_behind(cache_dir)
    (remembered,) = cleanup.records(Cache(cache_dir))  # the compiler's version
    total = sum(row["size"] for row in listed()) + 2000 + remembered.stat().st_size
    said = command("cache", "clear", "--yes").stdout
    assert said.splitlines()[-1] == f"removed 3 kernels and 3 leftovers, freed {output.size(total)}"
    assert listed() == [] and running.exists() and not old.exists() and not failed.exists()
    assert not any((cache_dir / "kernels").iterdir())


def test_clear_of_some(kernels, cache_dir):
    _, _, failed = leave_behind(cache_dir)
    used_days_ago(kernels[:1], (3,))
    command("cache", "clear", "--filter", "name=*_64_*", "--yes")
    assert names() == ["rmsnorm_512_bf16", "rmsnorm_768_bf16"]
    command("cache", "clear", "--older-than", "2d", "--yes")
    assert names() == ["rmsnorm_768_bf16"] and failed.exists()


def test_clear_leaves_alone_what_is_in_use(held):
    said = command("cache", "clear", "--yes").stdout
    assert f"in use, left alone  {held.label}" in said and "removed 2 kernels" in said
    assert said.count(held.label) == 1  # and is not listed as about to go
    assert names() == ["rmsnorm_512_bf16"] and held.library.exists()


def test_prune_by_size(kernels, cache_dir):
    used_days_ago(kernels, (1, 3, 2))
    room = kernels[0].size + kernels[2].size
    assert "nothing to remove" in command("cache", "prune", "--max-size", "1GB", "--yes").stdout
    command("cache", "prune", "--max-size", room, "--yes")
    assert names() == ["rmsnorm_512_bf16", "rmsnorm_768_bf16"]
    command("cache", "prune", "--max-size", room - 1, "--yes")
    assert names() == ["rmsnorm_512_bf16"]


def test_prune_by_size_counts_an_old_kernel_in_use(kernels, held):
    used_days_ago(kernels, (9, 3, 2))
    command("cache", "prune", "--older-than", "5d", "--max-size", sum(k.size for k in kernels) - 1, "--yes")
    assert names() == ["rmsnorm_512_bf16", "rmsnorm_768_bf16"]


def test_prune_by_size_passes_over_what_is_in_use(kernels, held):
    used_days_ago([held], (9,))
    command("cache", "prune", "--max-size", held.size, "--yes")
    assert names() == ["rmsnorm_512_bf16"]


def test_prune_by_age_and_size(kernels):
    used_days_ago(kernels, (1, 40, 2))
    command("cache", "prune", "--older-than", "30d", "--max-size", kernels[0].size + kernels[2].size, "--yes")
    assert names() == ["rmsnorm_512_bf16", "rmsnorm_768_bf16"]  # what age removed counts for size


def test_prune_of_other_versions_and_leftovers(kernels, cache_dir):
    old, running, failed = leave_behind(cache_dir)
    for entry, field in ((kernels[0], "jitnorm"), (kernels[1], "tvm_ffi")):
        (entry.path / MANIFEST).write_text(json.dumps({**entry.manifest, field: "0.0.0"}))
    command("cache", "prune", "--older-than", "30d", "--yes")
    assert len(names()) == 3 and running.exists() and not old.exists() and not failed.exists()
    command("cache", "prune", "--yes")
    assert names() == ["rmsnorm_768_bf16"]


# The prebuilt layer


def test_prebuilt_layer_is_read_only(stock, kernels, tmp_path, monkeypatch):
    layer = tmp_path / "layer"
    shutil.copytree(stock, layer)
    monkeypatch.setenv("JITNORM_PREBUILT_DIR", str(layer))
    assert [row["prebuilt"] for row in listed()] == [False] * 3 + [True] * 3
    assert command("cache", "verify").stdout.splitlines()[-1] == "6 kernels, 0 bad"
    command("cache", "clear", "--yes")
    assert [row["prebuilt"] for row in listed()] == [True] * 3
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(layer))
    said = command("cache", "clear", "--yes", exit_code=1)
    assert "prebuilt" in said.stderr and len(names()) == 3


# The doctor


@pytest.fixture(autouse=True)
def trials(monkeypatch) -> list[dict]:
    """What the doctor would have tried to build: to do so takes seconds, which most tests are not about."""
    asked: list[dict] = []

    def try_builds(archs):
        asked.append(archs)
        return {device: trial.Trial(True, 0.1) for device in archs}

    monkeypatch.setattr("jitnorm.cli.diagnosis.try_builds", try_builds)
    return asked


@pytest.fixture
def real_trials(trials, tmp_path, monkeypatch) -> Path:
    """The folder in which the doctor does build."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr("jitnorm.cli.diagnosis.try_builds", trial.try_builds)
    return folder


def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """A host compiler that says its version, and runs `script` instead of building."""
    wrapper = tmp_path / "compiler"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo c++ 1.0; exit 0;; esac\n{script}\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    return wrapper


def test_doctor(cache_dir, tmp_path, monkeypatch, real_trials):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")  # which is about calls
    facts = json.loads(command("doctor", "--format", "json").stdout)
    assert facts["versions"]["jitnorm"] == jitnorm.__version__ and facts["can_build"]["cpu"]
    assert facts["compilers"]["c++"]["path"] == toolchain.find_cxx()
    free = facts["caches"][0].pop("free")
    assert free > 0 and facts["temporary"]["root"] == str(real_trials) and facts["temporary"]["free"] > 0
    assert facts["caches"][0] == {
        "root": str(cache_dir), "prebuilt": False, "exists": False, "problem": None, "kernels": 0, "size": 0,
    }  # fmt: skip
    for device in ("cpu", "cuda") if toolchain.find_nvcc() else ("cpu",):
        assert facts["builds"][device]["works"] and facts["builds"][device]["seconds"] > 0, facts["builds"]
    assert facts["environment"]["JITNORM_CACHE_DIR"] == str(cache_dir)
    assert [*tmp_path.iterdir()] == [real_trials] and not [*real_trials.iterdir()]  # it leaves nothing behind


def test_doctor_prints(cache_dir):
    said = command("doctor").stdout
    assert "no variable" not in said
    assert str(cache_dir) in said and torch.__version__ in said
    assert re.search(r"cpu +yes  built and loaded a kernel in 0\.10 s\n", said)
    assert re.search(rf"{cache_dir}  0 kernels, 0 B; \d+\.\d GB free; usable", said)
    assert re.search(rf"^temporary folder\n +{tempfile.gettempdir()} +\d+\.\d GB free$", said, re.MULTILINE)


def test_doctor_tries_what_a_compiler_only_claims(cache_dir, tmp_path, monkeypatch, real_trials):
    """It says its version, and that is all that it can do."""
    wrapper = compiler(tmp_path, monkeypatch, "echo 'x.h:1:2: error: boom'; echo later; exit 1")
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    said = command("doctor", exit_code=1).stdout
    assert re.search(r"^  cpu +no +jitnorm cannot build .*x\.h:1:2: error: boom$", said, re.MULTILINE), said
    assert re.search(r"^  cuda +no +no nvcc that works$", said, re.MULTILINE)
    advice = f"error: boom; CXX is {wrapper}: unset or mend CXX\n"
    assert re.search(rf"^advice: building for cpu fails: .*{re.escape(advice)}", said, re.MULTILINE)
    assert "apt-get" not in said and not cache_dir.exists() and not [*real_trials.iterdir()]


def test_doctor_does_not_wait_for_ever(cache_dir, tmp_path, monkeypatch, real_trials):
    monkeypatch.setattr(trial, "_SECONDS", 0.3)
    compiler(tmp_path, monkeypatch, "sleep 1000")
    assert trial.try_builds({"cpu": None, "cuda": "9.0a"}) == dict.fromkeys(
        ("cpu", "cuda"), trial.Trial(False, problem="not done after 0.3 s, and ended")
    )
    assert not [*real_trials.iterdir()]


def test_a_trial_that_kills_its_process(tmp_path):
    (tmp_path / "log").write_text("jitnorm: building\n")
    assert trial._outcome(-11, tmp_path / "log").problem == (
        "the process that built and loaded a kernel was ended by signal 11"
    )
    assert trial._outcome(1, tmp_path / "log") == trial.Trial(False, problem="jitnorm: building")
    assert trial._outcome(0, tmp_path / "log").works is False  # it ended before it was done


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("os.statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC), "is mounted noexec: TMPDIR names another"),
        ("tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left")), "No space left"),
    ],
)
def test_a_trial_that_is_not_possible(monkeypatch, name, value, says):
    monkeypatch.setattr(f"jitnorm.cli.trial.{name}", value)
    found = trial.try_builds({"cpu": None})["cpu"]
    assert found.works is None and found.problem.startswith("not tried, as") and says in found.problem


def test_doctor_without_a_trial(cache_dir, monkeypatch):
    """The compilers may work all the same."""
    monkeypatch.setattr(
        "jitnorm.cli.diagnosis.try_builds",
        lambda archs: dict.fromkeys(archs, trial.Trial(None, problem="not tried: x")),
    )
    said = command("doctor").stdout
    assert re.search(r"cpu +yes +not tried: x\n", said) and "advice: building for cpu was not tried: x\n" in said


@pytest.mark.parametrize(("inodes", "free"), [((0, 0), 5_000_000), ((100, 7), 5_000_000), ((100, 0), 0)])
def test_room_in_the_file_system(cache_dir, tmp_path, monkeypatch, inodes, free):
    asked = []

    def statvfs(place):
        asked.append(Path(place))
        if not Path(place).exists():
            raise FileNotFoundError
        return SimpleNamespace(f_files=inodes[0], f_favail=inodes[1], f_bavail=5000, f_frsize=1000, f_flag=0)

    monkeypatch.setattr("jitnorm.cli.diagnosis.os.statvfs", statvfs)
    facts = json.loads(command("doctor", "--format", "json").stdout)
    assert facts["caches"][0]["free"] == facts["temporary"]["free"] == free
    assert {cache_dir, tmp_path} <= {*asked}  # the cache is not there yet: its folder's file system is
    full = f"the file system of {cache_dir} is full, or nearly: {output.size(free)} can be written"
    assert full in facts["advice"]


def test_doctor_without_compilers(cache_dir, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    said = command("doctor", exit_code=1).stdout
    assert "advice: no C++ compiler" in said and re.search(r"cpu +no", said)


def test_doctor_with_a_broken_compiler(cache_dir, monkeypatch, trials):
    monkeypatch.setenv("CXX", "false")
    said = command("doctor", exit_code=1).stdout
    assert re.search(
        r"advice: CXX=false \(.*bin/false\) does not work, so nothing can be built: unset or mend CXX\n", said
    )
    assert re.search(r"c\+\+ +unknown .*bin/false", said) and "apt-get" not in said and trials == [{}]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("CXX", "/nowhere/g++", "CXX=/nowhere/g++ is not found, so nothing can be built: unset or mend CXX"),
        ("CXX", "g++ -m32", "CXX=g++ -m32 is not found, so nothing can be built: unset or mend CXX"),
        ("CXX", os.fsdecode(b"/\xff/c++"), "CXX=/\ufffd/c++ is not found, so nothing can be built: unset or mend CXX"),
        (
            "NVCC",
            "/nowhere/nvcc",
            "NVCC=/nowhere/nvcc is not found, so no CUDA kernel can be built: unset or mend NVCC",
        ),
        ("NVCC", "true", "does not work, so no CUDA kernel can be built: unset or mend NVCC"),
    ],
)
def test_doctor_with_a_variable_that_is_wrong(cache_dir, monkeypatch, variable, value, says):
    monkeypatch.setenv(variable, value)
    said = command("doctor", exit_code=int(variable == "CXX")).stdout
    assert says in said and "apt-get" not in said and "pip install 'jitnorm[nvcc]'" not in said


def test_doctor_of_a_folder_that_cannot_be_looked_at(monkeypatch):
    """What it can say of the rest, it says."""
    monkeypatch.setenv("JITNORM_CACHE_DIR", f"/tmp/{'a' * 5000}")
    said = command("doctor").stdout
    assert "File name too long. Set JITNORM_CACHE_DIR" in said and re.search(r"cpu +yes", said)


def test_doctor_shows_proofs_of_any_kind(cache_dir, monkeypatch):
    """They come from files."""
    fields = {"backend": "a", "problem": 5, "gpu": None, "driver": "\x1b[2J", "library": ["b"], "first_difference": 7}
    monkeypatch.setattr("jitnorm.cli.diagnosis.cached_results", lambda: iter([SimpleNamespace(**fields)]))
    assert "\x1b" not in command("doctor").stdout


def test_doctor_without_nvcc(cache_dir, monkeypatch):
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    said = command("doctor").stdout
    assert "advice: no nvcc, so no CUDA kernel can be built: pip install 'jitnorm[nvcc]'" in said
    assert re.search(r"cpu +yes .*\n +cuda +no +no nvcc that works\n", said)


def test_doctor_advises(cache_dir, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("JITNORM_PREBUILT_DIR", str(tmp_path / "nothing"))
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    monkeypatch.setenv("JITNORM_CASHE_DIR", "/fast")
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    advice = "\n".join(json.loads(command("doctor", "--format", "json").stdout)["advice"])
    for word in (
        "is not a folder. Set JITNORM_CACHE_DIR",
        "no such folder",
        "JITNORM_DISABLE_JIT",
        "torch-c-dlpack-ext",
        "JITNORM_CASHE_DIR is no variable of jitnorm's: is JITNORM_CACHE_DIR meant?",
    ):
        assert word in advice


def test_doctor_says_who_serves_which_call(cache_dir, monkeypatch):
    def dispatch():
        wanted._from_environment.cache_clear()
        return json.loads(command("doctor", "--format", "json").stdout)["dispatch"]

    monkeypatch.delenv("JITNORM_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = dispatch()
    assert (facts["backend"], facts["problem"]) == ("auto", None)
    assert [(call["call"], call["backend"]) for call in facts["calls"]] == [
        ("rmsnorm bf16 4096 cpu", "jit"),
        ("rmsnorm fp32 4096 cpu", "jit"),
        ("rmsnorm bf16 16384 cpu", "torch"),
        ("rmsnorm bf16 111 cpu", "torch"),
    ]
    assert facts["calls"][3]["why"] == "the input is not on CUDA, and jitnorm has no kernel for hidden size 111"
    said = command("doctor").stdout
    assert "jitnorm.dispatch, backend auto\n" in said and re.search(
        r"^rmsnorm bf16 4096 cpu +jit +the input", said, re.M
    )
    monkeypatch.setenv("JITNORM_BACKEND", "jit")
    facts = dispatch()
    assert [call["backend"] for call in facts["calls"]] == ["jit", "jit", None, None]
    assert "jit was asked for and cannot serve" in facts["calls"][2]["why"]
    assert re.search(r"^rmsnorm bf16 111 cpu +none +the backend jit", command("doctor").stdout, re.MULTILINE)
    monkeypatch.setenv("JITNORM_BACKEND", "fast")
    assert dispatch()["calls"] == []
    assert command("doctor").stdout.count("JITNORM_BACKEND must be one of auto, auto-fast, jit") == 2
    wanted._from_environment.cache_clear()


# The demo


def test_demo(cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_HIDDEN_SIZES", (128,))
    monkeypatch.setattr(demo, "_SHAPES", ((1, 128), (4, 128)))
    monkeypatch.setattr("jitnorm.cli.timing._BUDGET_S", 0.001)
    (tmp_path / "torch.py").write_text("raise ImportError('not that one')")  # in the folder it is run from
    monkeypatch.chdir(tmp_path)
    said = command("demo").stdout
    assert "not built yet, building" in said and "found hidden size 128 in the cache" in said
    error = float(re.search(r"relative error .*: (\S+)", said)[1])
    assert 1e-3 < error < 3e-3
    assert "microseconds" in said and re.search(r"^ +4 x 128( +\d+\.\d){4}$", said, re.MULTILINE)
    assert "already built" in command("demo").stdout


def test_demo_of_a_wrong_kernel(cache_dir, monkeypatch):
    monkeypatch.setattr(demo, "rmsnorm", lambda x, weight, eps: x * 1.01)
    assert "is wrong: relative error" in command("demo", exit_code=1).stderr


def test_demo_finds_that_nothing_was_kept(cache_dir, monkeypatch):
    monkeypatch.setattr(
        demo, "rmsnorm", lambda x, weight, eps: torch.nn.functional.rms_norm(x, x.shape[1:], weight, eps)
    )
    said = command("demo", exit_code=1).stderr
    assert said.startswith("Error: a new process does not find the kernel in the cache") and said.count("\n") == 1


def test_demo_of_a_process_that_says_nothing(cache_dir, monkeypatch):
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "", ""))
    with pytest.raises(RuntimeError, match="it ended with status 0 and said nothing"):
        demo._first_call_elsewhere(128, "cpu")


# How it is run, and how it fails


def test_errors_are_one_line(cache_dir, monkeypatch):
    for kind in (RuntimeError, ValueError, TypeError, PermissionError):

        def fail(kind=kind):
            raise kind("what is wrong")

        monkeypatch.setattr("jitnorm.cli.doctor.diagnose", fail)
        assert command("doctor", exit_code=1).stderr == "Error: what is wrong\n"


def test_every_command_has_help():
    groups = [(main, [])]
    for group, words in groups:
        for name, one in group.commands.items():
            said = command(*words, name, "--help").stdout
            assert one.help.split("\n")[0].rstrip(".") in " ".join(said.split())
            if hasattr(one, "commands"):
                groups.append((one, [*words, name]))


def test_as_a_module_and_light_to_import(cache_dir):
    done = subprocess.run([sys.executable, "-m", "jitnorm", "cache", "dir"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{cache_dir}\n", "")
    check = "import sys, torch; old = {*sys.modules}; import jitnorm; print(({*sys.modules} - old) & {'click', 'tqdm'})"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout == "set()\n", done


def test_terminal(cache_dir):
    """A bar while it builds, and a question before it removes."""
    said, status = on_a_terminal("warmup", "--hidden-size", "64", "--device", "cpu")
    assert status == 0 and "built    rmsnorm_64_bf16" in said and re.search(r"\r +\d+%\|", said), said
    said, status = on_a_terminal("cache", "clear", answer="n\n")
    assert status == 1 and "nothing removed" in said and len(names()) == 1
    said, status = on_a_terminal("cache", "clear", answer="y\n")
    assert status == 0 and "removed 1 kernel" in said and not names()


def on_a_terminal(*words: str, answer: str = "") -> tuple[str, int]:
    """What `jitnorm ...` says on a terminal of its own, and its exit status. The answer is typed once it asks."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    run = subprocess.Popen([sys.executable, "-m", "jitnorm", *words], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    ends = time.monotonic() + 60
    while select.select([ours], [], [], max(0, ends - time.monotonic()))[0]:
        try:
            said += os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if answer and said.endswith(b"[y/N]: "):
            os.write(ours, answer.encode())
            answer = ""
    os.close(ours)
    return said.decode(), run.wait(timeout=10)


@pytest.mark.parametrize("words", [("cache", "ls"), ("cache", "show", "none")])
def test_a_path_that_the_terminal_cannot_show_is_escaped(tmp_path, words):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1:strict", "JITNORM_CACHE_DIR": os.fsdecode(folder)}
    done = subprocess.run([sys.executable, "-m", "jitnorm", *words], env=environment, capture_output=True, text=True)
    assert "encode" not in done.stdout + done.stderr
    assert done.returncode == (words[1] == "show")
