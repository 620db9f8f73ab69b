"""`jitnorm wheel`, and finding the kernels of an installed wheel."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from documentation.pages import ROOT
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename
from packaging.version import Version
from packed_entries import fake

import jitnorm
from cli.run import run
from jitnorm.cli.wheel import make_wheel
from jitnorm.jit import archive, find, locations
from jitnorm.jit.archive import PackedEntry
from jitnorm.jit.build import build
from jitnorm.jit.cache import Cache
from jitnorm.jit.entry import Entry
from jitnorm.jit.spec import Target
from jitnorm.rmsnorm import rmsnorm_spec

SPEC = rmsnorm_spec(512, torch.float32, torch.float32, Target("cpu"))
X86, ARM = b"\x7fELF".ljust(18) + b"\x3e\0", b"\x7fELF".ljust(18) + b"\xb7\0"
CALL = """
import torch, jitnorm
print(jitnorm.rmsnorm(torch.ones(2, 512), torch.ones(512)).mean().round().item())
"""


@pytest.fixture
def built(cache_dir) -> Entry:
    return build(SPEC)


@pytest.fixture
def layer(built, cache_dir, tmp_path, monkeypatch) -> Path:
    """Return the root of a layer that is installed in a site-packages of the test's own. The cache is empty."""
    packages = tmp_path / "site-packages"
    root = packages / locations.PACKAGES / "own_kernels"
    root.parent.mkdir(parents=True)
    shutil.move(cache_dir, root)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(packages)])
    monkeypatch.syspath_prepend(str(packages))
    return root


@pytest.mark.slow
def test_pip_installs_a_wheel_that_every_process_finds(built, cache_dir, tmp_path):
    printed = run("wheel", "--output", tmp_path / "dist", "--name", "Own.kernels").stdout
    (wheel,) = (tmp_path / "dist").iterdir()
    assert re.fullmatch(
        rf"own_kernels-{jitnorm.__version__}\+k[0-9a-f]{{8}}-py3-none-(manylinux_2_\d+|linux)_\w+\.whl", wheel.name
    )
    assert str(wheel) in printed
    build(rmsnorm_spec(64, torch.float32, torch.float32, Target("cpu")))
    updated = json.loads(
        run("wheel", "--output", tmp_path / "dist", "--name", "Own.kernels", "--format", "json").stdout
    )
    shutil.rmtree(cache_dir)

    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "outer.pth").write_text("\n".join([str(Path(jitnorm.__file__).parents[1]), *site.getsitepackages()]))
    environment = {"JITNORM_CACHE_DIR": str(cache_dir), "JITNORM_DISABLE_JIT": "1", "PATH": "", "HOME": str(tmp_path)}

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, "-c", CALL], capture_output=True, text=True, env=environment, timeout=120)

    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True, timeout=120)
    (label,) = (packages / locations.PACKAGES / "own_kernels" / "kernels").glob("*/*")
    assert f"{label.parent.name}/{label.name}" == built.label
    done = call()
    assert (done.stdout, done.stderr) == ("1.0\n", "") and not cache_dir.exists()
    subprocess.run([*pip, "install", "--no-deps", "--no-index", updated["file"]], check=True, timeout=120)
    assert len([*(packages / locations.PACKAGES / "own_kernels" / "kernels").glob("*/*")]) == 2
    subprocess.run([*pip, "uninstall", "--yes", "Own.kernels"], check=True, timeout=120)
    assert not [path for path in (packages / locations.PACKAGES).rglob("*") if path.is_file()]
    done = call()
    assert "JITNORM_DISABLE_JIT forbids building it" in done.stderr and "is not used" not in done.stderr


def test_the_record_has_every_file():
    name, content = make_wheel("jitnorm-kernels", [fake(content=X86)])
    version = name.split("-")[1]
    assert re.fullmatch(r"0\.1\.0\+k[0-9a-f]{8}", version)
    assert name == f"jitnorm_kernels-{version}-py3-none-linux_x86_64.whl"
    wheel = zipfile.ZipFile(io.BytesIO(content))
    record = list(csv.reader(wheel.read(f"jitnorm_kernels-{version}.dist-info/RECORD").decode().splitlines()))
    assert [row[0] for row in record] == wheel.namelist()
    for file, digest, size in record[:-1]:
        data = wheel.read(file)
        expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        assert (digest, int(size)) == (f"sha256={expected}", len(data))
    assert record[-1] == [f"jitnorm_kernels-{version}.dist-info/RECORD", "", ""]
    metadata = wheel.read(f"jitnorm_kernels-{version}.dist-info/METADATA").decode().splitlines()
    assert {f"Version: {version}", "Requires-Dist: jitnorm ==0.1.0", "Requires-Dist: apache-tvm-ffi ==0.1.2"} <= {
        *metadata
    }


def test_the_same_kernels_give_the_same_wheel():
    packed = [fake(content=X86), fake("rmsnorm_128_bf16", content=X86)]
    assert make_wheel("a", packed) == make_wheel("a", packed[::-1])
    assert make_wheel("a", packed)[1] != make_wheel("b", packed)[1]
    assert make_wheel("a", [fake(content=ARM)])[0].endswith("-linux_aarch64.whl")


def version_of(*packed: PackedEntry) -> str:
    return make_wheel("a", packed)[0].split("-")[1]


def test_another_version_for_other_kernels():
    """Otherwise pip takes an updated wheel as installed already."""
    one, two = fake(content=X86), fake("rmsnorm_128_bf16", content=X86)
    rebuilt = fake(content=X86 + b"x")
    assert rebuilt.label == one.label
    assert len({version_of(one), version_of(two), version_of(one, two), version_of(rebuilt)}) == 4


@pytest.mark.parametrize("release", ["0.1.0", "0.1.0+cu130", "0.2.0rc1.post1.dev2+cu130.2"])
def test_versions_are_in_normal_form(release):
    for number in range(40):  # a hash that is all digits, with a leading zero, would be another version for pip
        version = version_of(fake(content=X86 + bytes([number]), jitnorm=release))
        assert str(Version(version)) == version and Version(version) > Version(release)
    metadata = zipfile.ZipFile(io.BytesIO(make_wheel("a", [fake(content=X86, jitnorm=release)])[1]))
    (file,) = (name for name in metadata.namelist() if name.endswith("METADATA"))
    assert f"Requires-Dist: jitnorm =={release}\n" in metadata.read(file).decode()


@pytest.mark.parametrize(
    ("needed", "tag"),
    [
        (["GLIBC_2.2.5", "GLIBC_2.4", "GLIBC_2.34", "GLIBC_2.9", "GLIBCXX_3.4.99"], "manylinux_2_34_x86_64"),
        (["GLIBC_2.2.5"], "manylinux_2_17_x86_64"),
        (["GLIBC_2.4", "GLIBC_ABI_DT_RELR"], "manylinux_2_36_x86_64"),
        (["GLIBC_PRIVATE"], "linux_x86_64"),
        ([], "linux_x86_64"),
    ],
)
def test_the_tag_names_the_glibc_that_is_needed(needed, tag):
    library = X86 + b"\0" + b"".join(text.encode() + b"\0" for text in needed)
    assert make_wheel("a", [fake(content=library)])[0].endswith(f"-py3-none-{tag}.whl")


def test_the_tag_is_that_of_the_kernel_with_the_newest_glibc():
    libraries = [X86 + f"\0GLIBC_2.{minor}\0".encode() for minor in (34, 38, 4)]
    packed = [fake(f"rmsnorm_{number}_bf16", content=library) for number, library in enumerate(libraries)]
    assert make_wheel("a", packed)[0].endswith("-py3-none-manylinux_2_38_x86_64.whl")


def test_pip_accepts_the_tag_of_what_was_built_here(built):
    name, _ = make_wheel("a", archive.pack([built]))
    assert parse_wheel_filename(name)[3] & {*sys_tags()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"jitnorm": "0.2.0"}, "kernels of one release of jitnorm, got 0.1.0, 0.2.0: select others with --filter"),
        ({"tvm_ffi": "0.1.3"}, "kernels of one release of tvm-ffi, got 0.1.2, 0.1.3"),
        ({"content": ARM}, "kernels of one host processor, got aarch64, x86_64"),
    ],
)
def test_kernels_that_do_not_go_together(fields, message):
    with pytest.raises(RuntimeError, match=message):
        make_wheel("a", [fake(content=X86), fake("rmsnorm_128_bf16", **{"content": X86, **fields})])


@pytest.mark.parametrize(
    "fields", [{"jitnorm": "1\nName: x"}, {"jitnorm": None}, {"jitnorm": "0..1"}, {"content": b"?" * 20}]
)
def test_kernels_without_a_release_or_a_processor(fields):
    with pytest.raises(RuntimeError, match="a wheel has kernels of one") as caught:
        make_wheel("a", [fake(**{"content": X86, **fields})])
    assert "\n" not in str(caught.value)


def test_options(cache_dir, tmp_path):
    locations.create(cache_dir)
    archive.add(Cache(cache_dir), [fake(content=X86), fake("rmsnorm_128_bf16", content=X86)])
    facts = json.loads(run("wheel", "--output", tmp_path, "--filter", "name=*_128_*", "--format", "json").stdout)
    assert facts["packed"] == [fake("rmsnorm_128_bf16", content=X86).label]
    assert Path(facts["file"]).stat().st_size == facts["size"]
    assert "no kernel to export" in run("wheel", "--filter", "name=x", exit_code=1).stderr
    for name in ("", "-x", "a b", "../x", "x\n", "x" * 101):
        printed = run("wheel", "--name", name, exit_code=2).stderr
        assert "--name must be a package's name such as jitnorm-kernels" in printed
    assert run("wheel", "--output", tmp_path, "--name", "x" * 100).stdout.startswith("packed 2 kernels")
    (tmp_path / "file").touch()
    assert "cannot write" in run("wheel", "--output", tmp_path / "file", exit_code=1).stderr


def test_names_of_other_packages(built, tmp_path):
    project = (ROOT / "pyproject.toml").read_text()
    required = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)[1]
    names = re.findall(r'^  "([\w-]+)', required, re.MULTILINE)
    assert {"torch", "apache-tvm-ffi", "ninja", "platformdirs"} <= {*names}
    for name in (*names, "jitnorm", "JitNorm", "Apache_TVM.-ffi", "tvm-ffi"):
        printed = run("wheel", "--output", tmp_path / "dist", "--name", name, exit_code=2).stderr
        assert f"--name must not be that of another package, which the wheel would replace, got '{name}'" in printed
    assert not (tmp_path / "dist").exists()


def test_a_wheel_has_the_limit_of_an_export(built, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_ARCHIVE_BYTES", built.size - 1)
    printed = run("wheel", "--output", tmp_path / "dist", exit_code=1).stderr
    assert f"an export may have {built.size - 1} bytes" in printed and not (tmp_path / "dist").exists()


def test_only_the_own_cache_is_packed(layer, cache_dir, tmp_path, monkeypatch):
    """An installed wheel may be of another release, with which the new one cannot be packed."""
    assert "no kernel to export in" in run("wheel", "--output", tmp_path, exit_code=1).stderr
    own, prebuilt = fake(content=X86), fake("rmsnorm_128_bf16", content=X86, jitnorm="0.0.1")
    for root, packed in ((cache_dir, own), (tmp_path / "prebuilt", prebuilt)):
        locations.create(root)
        archive.add(Cache(root), [packed])
    monkeypatch.setenv("JITNORM_PREBUILT_DIR", str(tmp_path / "prebuilt"))
    assert json.loads(run("wheel", "--output", tmp_path, "--format", "json").stdout)["packed"] == [own.label]
    exported = json.loads(run("cache", "export", tmp_path / "file", "--format", "json").stdout)["exported"]
    assert len(exported) == 3
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(tmp_path / "prebuilt"))
    assert json.loads(run("wheel", "--output", tmp_path, "--format", "json").stdout)["packed"] == [prebuilt.label]


def test_an_installed_kernel_is_used_if_the_cache_has_none(layer, cache_dir, monkeypatch):
    found = find.find(SPEC)
    assert found.root == layer and found.prebuilt and not cache_dir.exists()
    build(SPEC)
    monkeypatch.setattr(locations, "installed", lambda: pytest.fail("a hit looked for installed packages"))
    assert find.find(SPEC).root == cache_dir


def test_commands_show_installed_kernels_and_leave_them(layer, cache_dir):
    (row,) = json.loads(run("cache", "ls", "--format", "json").stdout)
    assert row["prebuilt"] and row["path"].startswith(str(layer))
    run("cache", "clear", "--yes")
    assert run("cache", "verify").stdout.splitlines()[-1] == "1 kernel, 0 bad"
    assert jitnorm.cache.save() == archive.write(archive.pack(Cache(layer, prebuilt=True).entries()))


def test_several_packages(layer):
    (layer.parent / "empty").mkdir()
    (layer.parent / "file").touch()
    shutil.copytree(layer, layer.with_name("another"))
    assert [cache.root.name for cache in locations.installed()] == ["another", "own_kernels"]


def test_a_second_path_to_the_same_packages(layer, tmp_path, monkeypatch):
    """As lib64/python3.12/site-packages, where lib64 is a link to lib."""
    shutil.copytree(layer, layer.with_name("another"))
    first, second = layer.parents[1], tmp_path / "lib64"
    second.symlink_to(first)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(first), str(second)])
    monkeypatch.setattr(sys, "path", [*sys.path, str(second)])
    assert [cache.root for cache in locations.installed()] == [layer.with_name("another"), layer]
    assert len(json.loads(run("cache", "ls", "--format", "json").stdout)) == 2


def test_a_folder_that_is_no_site_packages_is_not_searched(layer, tmp_path, monkeypatch):
    """The working directory may belong to another user, and Python puts it on sys.path."""
    monkeypatch.chdir(layer.parents[1])
    monkeypatch.syspath_prepend("")
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(tmp_path / "none")])
    assert locations.installed() == []


def test_site_packages_that_python_ignores_are_not_searched(layer, monkeypatch):
    """With `python -S`, for example."""
    monkeypatch.setattr(sys, "path", [])
    assert locations.installed() == []


def test_an_installed_kernel_that_others_can_write_is_not_used(layer, cache_dir, caplog):
    """As after pip with umask 002."""
    for path in (layer, *layer.rglob("*")):
        os.chmod(path, path.stat().st_mode | 0o020)
    assert find.find(SPEC) is None
    assert "is not used" in caplog.text and "can be written by other users" in caplog.text
