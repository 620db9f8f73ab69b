"""`jitnorm cache`."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import jitnorm
from cli.run import run
from jitnorm.cli import filters, output
from jitnorm.jit import cleanup
from jitnorm.jit.cache import Cache
from jitnorm.jit.entry import MANIFEST, Entry

SIZES = (64, 512, 768)
DAY = 86400


def listed(*words: object) -> list[dict]:
    return json.loads(run("cache", "ls", "--format", "json", *words).stdout)


def names(*words: object) -> list[str]:
    return [row["name"] for row in listed(*words)]


@pytest.fixture(scope="module")
def three_kernels(tmp_path_factory) -> Path:
    """Build a cache of three kernels."""
    folder = tmp_path_factory.mktemp("three_kernels") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JITNORM_CACHE_DIR", str(folder))
        assert not jitnorm.warmup(hidden_size=SIZES, dtype="bf16", device="cpu").failed
    return folder


@pytest.fixture
def kernels(three_kernels, cache_dir) -> list[Entry]:
    """Copy that cache for one test, and return its entries in the order of their names: 512, 64, 768."""
    shutil.copytree(three_kernels, cache_dir)
    return list(Cache(cache_dir).entries())


@pytest.fixture
def kernel_in_use(kernels) -> Iterator[Entry]:
    """Lock one of the kernels, as a process does that has loaded it."""
    fd = os.open(kernels[0].path / MANIFEST, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    yield kernels[0]
    os.close(fd)


def used_days_ago(entries: list[Entry], days: tuple[float, ...]) -> None:
    for entry, ago in zip(entries, days, strict=True):
        os.utime(entry.path / MANIFEST, (time.time() - ago * DAY,) * 2)


def leave_behind(cache: Path) -> tuple[Path, Path, Path]:
    """Create the folders of an abandoned build, a running one and a failed one."""
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


# dir, ls, show


def test_dir(cache_dir, monkeypatch, tmp_path):
    assert run("cache", "dir").stdout == f"{cache_dir}\n" and not cache_dir.exists()
    monkeypatch.delenv("JITNORM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert run("cache", "dir").stdout == f"{tmp_path / 'xdg' / 'jitnorm'}\n"


def test_a_cache_that_does_not_exist(cache_dir):
    assert run("cache", "ls").stdout == f"empty: no kernels in {cache_dir}\n"
    assert listed() == []
    assert "empty" in run("cache", "verify").stdout
    for words in (["clear"], ["clear", "--yes"], ["prune"], ["prune", "--max-size", "0"]):
        assert "nothing to remove" in run("cache", *words).stdout
    assert not cache_dir.exists()


def test_ls(kernels, cache_dir):
    rows = listed()
    assert [row["name"] for row in rows] == ["rmsnorm_512_bf16", "rmsnorm_64_bf16", "rmsnorm_768_bf16"]
    row = rows[1]
    assert (row["op"], row["device"], row["kernel"]) == ("rmsnorm", "cpu", "RMSNormWarpKernel<64, bf16_t, bf16_t>")
    assert row["path"] == str(kernels[1].path) and not row["in_use"] and not row["prebuilt"]
    assert row["size"] == sum(f.stat().st_size for f in kernels[1].path.iterdir())
    table = run("cache", "ls").stdout
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
    assert "40d ago" in run("cache", "ls").stdout


@pytest.mark.parametrize("bad", ["size", "size>", "size>big", "size=1XB", "color=red", "name>a", "=x", ""])
def test_bad_filters(bad):
    printed = run("cache", "ls", "--filter", bad, exit_code=2)
    assert "Invalid value for '--filter'" in printed.stderr


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
    printed = run("cache", "prune", option, bad, exit_code=2).stderr
    assert f"Invalid value for '{option}'" in printed and len(printed) < 400


@pytest.mark.parametrize(
    "values",
    [
        {"built": "9999-12-31T23:59:59-23:59"},
        {"built": "0001-01-01T00:00:00"},
        {"built": 10**400, "op": ["rmsnorm"], "kernel": {"a": 1}, "device": None, "includes": 5},
        {"built": "now\n\x1b[2J", "kernel": "\ud800\x1b]0;title\x07"},
    ],
)
def test_manifests_with_other_values(kernels, trial_builds, values):
    entry = kernels[1]
    (entry.path / MANIFEST).write_text(json.dumps({**entry.manifest, **values}))
    os.utime(entry.path / MANIFEST, (2**34, 2**34))  # of a clock that was wrong
    table = run("cache", "ls").stdout
    assert "rmsnorm_64_bf16" in table and "\x1b" not in table and "\x07" not in table
    assert len(table.splitlines()) == 2 + 3 + 2
    assert [row["name"] for row in listed()] == ["rmsnorm_512_bf16", "rmsnorm_64_bf16", "rmsnorm_768_bf16"]
    for words in (
        ["verify"],
        ["show", entry.label],
        ["prune", "--dry-run"],
        ["clear", "--older-than", "1d", "--dry-run"],
    ):
        run("cache", *words)
    run("doctor")


def test_a_time_beyond_the_calendar(kernels, monkeypatch):
    monkeypatch.setattr(Entry, "last_used", property(lambda entry: 2.0**60))
    assert [row["last_used"] for row in listed()] == [None] * 3
    assert "just now" in run("cache", "ls").stdout


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("arch=9.0", "arch must be such as sm_90a, sm_120 or cpu_x86_64, or a pattern such as sm_*, got '9.0'"),
        ("arch=90a", "arch must be such as sm_90a"),
        ("arch!=hopper", "arch must be such as sm_90a"),
        ("arch=9*", "arch must be such as sm_90a"),
        ("device=gpu", "device must be cuda or cpu, got 'gpu'"),
        ("device!=CPU", "device must be cuda or cpu, got 'CPU'"),
        ("device=g*", "device must be cuda or cpu"),
        ("op=rms_norm", "'rms_norm' is not an operator with kernels: did you mean rmsnorm?"),
        ("op=softmax", "'softmax' is not an operator with kernels: use one of"),
        ("name=rmsnorm-64", "name must be a kernel's name such as rmsnorm_4096_bf16"),
        (f"size>{'9' * 29}TB", "more than a file system can hold"),
        (f"size>{'9' * 400}", "is not a size"),
    ],
)
def test_filters_that_no_kernel_can_meet(kernels, condition, message):
    for words in (["ls"], ["clear", "--yes"]):
        printed = run("cache", *words, "--filter", condition, exit_code=2).stderr
        assert message in " ".join(printed.split()) and len(printed) < 1600
    assert len(names()) == 3


@pytest.mark.parametrize(
    "condition", ["arch=*_90a", "arch=[sc]*", "device=c*", "op=*norm", "op=older_*", "name=?msnorm_*"]
)
def test_patterns_are_not_refused(kernels, condition):
    run("cache", "ls", "--filter", condition)


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
        printed = run("cache", "show", name).stdout
        assert str(entry.path) in printed and entry.manifest["sha256"] in printed and entry.library.name in printed
        assert (entry.path / "module.cc").read_text().strip() in printed


def test_show_as_json(kernels):
    (row,) = [row for row in listed() if row["name"] == "rmsnorm_64_bf16"]
    shown = json.loads(run("cache", "show", "rmsnorm_64_bf16", "--format", "json").stdout)
    assert row.items() <= shown.items() and sum(shown["files"].values()) == row["size"]
    assert json.loads(shown["contents"][MANIFEST]) == kernels[1].manifest and "module.cc" in shown["contents"]


def test_show_of_none_and_of_several(kernels, cache_dir):
    printed = run("cache", "show", "rmsnorm_6", exit_code=1)  # a prefix of a name is not a name
    assert printed.stderr.count("\n") == 1 and "rmsnorm_6" in printed.stderr and str(cache_dir) in printed.stderr
    other = kernels[1].path.with_name("0123456789ab")
    shutil.copytree(kernels[1].path, other)
    printed = run("cache", "show", "rmsnorm_64_bf16", exit_code=1)
    first, *lines = printed.stderr.splitlines()
    assert "Give one of these" in first and sorted(lines) == sorted([kernels[1].label, Entry(other).label])
    assert str(other) in run("cache", "show", Entry(other).label).stdout


def test_entry_in_use(kernel_in_use):
    assert [row["in_use"] for row in listed()] == [True, False, False]
    assert run("cache", "ls").stdout.count("in use") == 1


def test_damaged_manifest(kernels):
    (kernels[0].path / MANIFEST).write_text("{")
    (kernels[1].path / MANIFEST).unlink()
    assert run("cache", "ls").stdout.count("unreadable") == 2
    assert run("cache", "verify", exit_code=1).stdout.count("bad  ") == 2
    assert "removed 3 kernels" in run("cache", "clear", "--yes").stdout


# verify


def test_verify(kernels):
    assert run("cache", "verify").stdout.splitlines()[-1] == "3 kernels, 0 bad"
    libraries = [entry.library for entry in kernels]
    content = bytearray(kernels[0].library.read_bytes())
    content[len(content) // 2] ^= 1
    kernels[0].library.write_bytes(content)
    kernels[1].path.chmod(0o777)
    printed = run("cache", "verify", exit_code=1).stdout.splitlines()
    assert printed[0].startswith(f"bad  {kernels[0].label}: ") and "hash" in printed[0]
    assert printed[1].startswith(f"bad  {kernels[1].label}: ") and "other users" in printed[1]
    assert printed[2:] == [f"ok   {kernels[2].label}", "3 kernels, 2 bad"]
    assert [r["ok"] for r in json.loads(run("cache", "verify", "--format", "json", exit_code=1).stdout)] == [
        0,
        0,
        1,
    ]
    assert all(library.exists() for library in libraries)


@pytest.mark.slow
@pytest.mark.nvcc
def test_verify_in_a_process_of_its_own(cache_dir):
    """The command loads neither torch nor tvm-ffi at its start, and CPU kernels depend on tvm-ffi's library."""
    assert not jitnorm.warmup(hidden_size=64, dtype="bf16", device="cuda", arch="9.0a").failed
    assert not jitnorm.warmup(hidden_size=64, dtype="bf16", device="cpu").failed
    command = "import _jitnorm_command, sys; sys.argv[1:] = ['cache', 'verify']; _jitnorm_command.main()"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "3 kernels, 0 bad", done  # with the launcher


# clear, prune


def test_clear_asks_first(kernels):
    printed = run("cache", "clear", exit_code=1)
    assert "--yes" in printed.stderr and len(names()) == 3
    printed = run("cache", "clear", "--dry-run")
    assert printed.stdout.count("would remove  rmsnorm_") == 3 and "nothing was removed" in printed.stdout
    assert len(names()) == 3


def test_clear(kernels, cache_dir):
    old, running, failed = leave_behind(cache_dir)
    (remembered,) = cleanup.records(Cache(cache_dir))  # the compiler's version
    total = sum(row["size"] for row in listed()) + 2000 + remembered.stat().st_size
    printed = run("cache", "clear", "--yes").stdout
    assert printed.splitlines()[-1] == f"removed 3 kernels and 3 leftovers, freed {output.size(total)}"
    assert listed() == [] and running.exists() and not old.exists() and not failed.exists()
    assert not any((cache_dir / "kernels").iterdir())


def test_clear_of_some(kernels, cache_dir):
    _, _, failed = leave_behind(cache_dir)
    used_days_ago(kernels[:1], (3,))
    run("cache", "clear", "--filter", "name=*_64_*", "--yes")
    assert names() == ["rmsnorm_512_bf16", "rmsnorm_768_bf16"]
    run("cache", "clear", "--older-than", "2d", "--yes")
    assert names() == ["rmsnorm_768_bf16"] and failed.exists()


def test_clear_keeps_a_kernel_in_use(kernel_in_use):
    printed = run("cache", "clear", "--yes").stdout
    assert f"in use, not removed  {kernel_in_use.label}" in printed and "removed 2 kernels" in printed
    assert printed.count(kernel_in_use.label) == 1  # it is not listed as to be removed
    assert names() == ["rmsnorm_512_bf16"] and kernel_in_use.library.exists()


def test_prune_by_size(kernels, cache_dir):
    used_days_ago(kernels, (1, 3, 2))
    room = kernels[0].size + kernels[2].size
    assert "nothing to remove" in run("cache", "prune", "--max-size", "1GB", "--yes").stdout
    run("cache", "prune", "--max-size", room, "--yes")
    assert names() == ["rmsnorm_512_bf16", "rmsnorm_768_bf16"]
    run("cache", "prune", "--max-size", room - 1, "--yes")
    assert names() == ["rmsnorm_512_bf16"]


def test_prune_by_size_counts_an_old_kernel_in_use(kernels, kernel_in_use):
    used_days_ago(kernels, (9, 3, 2))
    run("cache", "prune", "--older-than", "5d", "--max-size", sum(k.size for k in kernels) - 1, "--yes")
    assert names() == ["rmsnorm_512_bf16", "rmsnorm_768_bf16"]


def test_prune_by_size_keeps_a_kernel_in_use(kernels, kernel_in_use):
    used_days_ago([kernel_in_use], (9,))
    run("cache", "prune", "--max-size", kernel_in_use.size, "--yes")
    assert names() == ["rmsnorm_512_bf16"]


def test_prune_by_age_and_size(kernels):
    used_days_ago(kernels, (1, 40, 2))
    run("cache", "prune", "--older-than", "30d", "--max-size", kernels[0].size + kernels[2].size, "--yes")
    assert names() == ["rmsnorm_512_bf16", "rmsnorm_768_bf16"]  # what age removed counts for size


def test_prune_of_other_versions_and_leftovers(kernels, cache_dir):
    old, running, failed = leave_behind(cache_dir)
    for entry, field in ((kernels[0], "jitnorm"), (kernels[1], "tvm_ffi")):
        (entry.path / MANIFEST).write_text(json.dumps({**entry.manifest, field: "0.0.0"}))
    run("cache", "prune", "--older-than", "30d", "--yes")
    assert len(names()) == 3 and running.exists() and not old.exists() and not failed.exists()
    run("cache", "prune", "--yes")
    assert names() == ["rmsnorm_768_bf16"]


# The prebuilt layer


def test_prebuilt_layer_is_read_only(three_kernels, kernels, tmp_path, monkeypatch):
    layer = tmp_path / "layer"
    shutil.copytree(three_kernels, layer)
    monkeypatch.setenv("JITNORM_PREBUILT_DIR", str(layer))
    assert [row["prebuilt"] for row in listed()] == [False] * 3 + [True] * 3
    assert run("cache", "verify").stdout.splitlines()[-1] == "6 kernels, 0 bad"
    run("cache", "clear", "--yes")
    assert [row["prebuilt"] for row in listed()] == [True] * 3
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(layer))
    printed = run("cache", "clear", "--yes", exit_code=1)
    assert "prebuilt" in printed.stderr and len(names()) == 3
