"""`jitnorm cache push`, and the remote cache in `jitnorm doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from packed_entries import fake

from cli.run import run
from jitnorm.jit import archive, locations, remote
from jitnorm.jit.cache import Cache

ONE = fake(content=b"machine code".ljust(18))
TWO = fake("silu_and_mul_bf16", content=b"other code".ljust(18))


@pytest.fixture
def url(cache_dir, tmp_path, monkeypatch) -> str:
    """Return the URL of an empty remote cache. The cache has two kernels."""
    for name in ("JITNORM_REMOTE_CACHE", "JITNORM_REMOTE_KEY", "JITNORM_REMOTE_TRUST"):
        monkeypatch.delenv(name, raising=False)
    locations.create(cache_dir)
    archive.add(Cache(cache_dir), [ONE, TWO])
    return f"file://{tmp_path}/remote"


@pytest.fixture
def key_file(tmp_path) -> Path:
    file = tmp_path / "kernels.key"
    file.write_text("0f" * 32)
    file.chmod(0o600)
    return file


def manifests(tmp_path: Path) -> dict[str, bytes]:
    """Return the content of the manifest of each kernel's name."""
    return {path.parent.name.partition(".")[0]: path.read_bytes() for path in tmp_path.glob("remote/kernels/*/*.json")}


def test_what_it_prints_is_a_list_of_trusted_digests(url, tmp_path, monkeypatch):
    first = run("cache", "push", "--url", url)
    assert first.stderr == f"pushed 2 kernels, 0 already there; the remote cache is {url}\n"
    labels = [line.split("  ")[1] for line in first.stdout.splitlines()]
    assert labels == [ONE.label, TWO.label]
    again = run("cache", "push", "--url", url)
    assert again.stdout == first.stdout and again.stderr.startswith("pushed 0 kernels, 2 already there")
    (tmp_path / "trusted.txt").write_text(first.stdout)
    monkeypatch.setenv("JITNORM_REMOTE_TRUST", str(tmp_path / "trusted.txt"))
    assert remote.read_trust() == ({line[:64] for line in first.stdout.splitlines()}, None)
    assert all(remote.read_trust().accepts(content, b"") for content in manifests(tmp_path).values())


def test_json(url):
    first = json.loads(run("cache", "push", "--url", url, "--format", "json").stdout)
    assert [each["id"] for each in first["pushed"]] == [ONE.label, TWO.label] and first["present"] == []
    second = json.loads(run("cache", "push", "--url", url, "--format", "json").stdout)
    assert second == {"url": url, "pushed": [], "present": first["pushed"]}


def test_some_kernels(url, tmp_path):
    assert TWO.label in run("cache", "push", "--url", url, "--filter", "name=silu_*").stdout
    assert [*manifests(tmp_path)] == ["silu_and_mul_bf16"]
    assert "no kernel to export" in run("cache", "push", "--url", url, "--older-than", "1d", exit_code=1).stderr


def test_signed(url, key_file, tmp_path, monkeypatch):
    run("cache", "push", "--url", url, "--key", key_file)
    by_option = manifests(tmp_path)
    assert all(b"\nhmac-sha256 " in content for content in by_option.values())
    monkeypatch.setenv("JITNORM_REMOTE_KEY", str(key_file))
    monkeypatch.setenv("JITNORM_REMOTE_CACHE", f"file://{tmp_path}/second")
    run("cache", "push")
    assert {path.read_bytes() for path in tmp_path.glob("second/kernels/*/*.json")} == {*by_option.values()}


def test_refusals(url, key_file, tmp_path):
    missing = run("cache", "push", exit_code=2)
    assert "--url must name the remote cache, unless JITNORM_REMOTE_CACHE is set" in missing.stderr
    key_file.chmod(0o644)
    said = run("cache", "push", "--url", url, "--key", key_file, exit_code=1).stderr
    assert "can be read by other users (mode 644): chmod 600 it" in said and not (tmp_path / "remote").exists()
    said = run("cache", "push", "--url", "nosuch://user:secret@host", exit_code=1).stderr
    assert "the remote cache nosuch://host cannot be opened" in said and "secret" not in said


def test_doctor(cache_dir, key_file, trial_builds, monkeypatch):
    monkeypatch.delenv("JITNORM_REMOTE_CACHE", raising=False)
    assert json.loads(run("doctor", "--format", "json").stdout)["remote"] is None
    monkeypatch.setenv("JITNORM_REMOTE_CACHE", "memory://user:secret@x")
    facts = json.loads(run("doctor", "--format", "json").stdout)
    assert facts["remote"]["url"] == facts["environment"]["JITNORM_REMOTE_CACHE"] == "memory://x"
    assert any("memory://x: nothing in it is trusted: set JITNORM_REMOTE_TRUST" in line for line in facts["advice"])
    monkeypatch.setenv("JITNORM_REMOTE_KEY", str(key_file))
    printed = run("doctor").stdout
    assert "remote cache\n  memory://x           read where no cache has a kernel; not tried" in printed
    assert "secret" not in printed and "read from the remote cache" not in printed
