"""`.cache-example` shows the content of a cache as text. `python tests/jit/test_cache_example.py` writes it."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch

from jitnorm.jit import build as engine
from jitnorm.jit.cache import Cache
from jitnorm.jit.entry import MANIFEST, write_entry
from jitnorm.jit.spec import KernelSpec, Target
from jitnorm.jit.toolchain import Compiler, Toolchain
from jitnorm.rmsnorm import rmsnorm_spec

EXAMPLE = Path(__file__).parents[2] / ".cache-example"
# Capitals stand for what differs between machines.
CXX, NVRTC = Compiler("CXX", "VERSION", 0, 0), Compiler("NVRTC", "VERSION", 0, 0)
PLACES = {
    "CSRC": "JITNORM/csrc",
    "libinfo.find_include_path": lambda: "TVM_FFI/include",
    "libinfo.find_dlpack_include_path": lambda: "TVM_FFI/include",
    "libinfo.find_libtvm_ffi": lambda: "TVM_FFI/lib/libtvm_ffi.so",
}
IN_MANIFEST = {"tvm_ffi": "VERSION", "jitnorm": "VERSION", "built": "TIME", "seconds": "SECONDS", "size": "BYTES"}


def kernels() -> list[tuple[KernelSpec, Toolchain]]:
    """One kernel of each class and device, with its toolchain."""
    bf16 = torch.bfloat16
    return [
        (rmsnorm_spec(128, bf16, bf16, Target.cuda("9.0a")), Toolchain(nvrtc=NVRTC)),
        (rmsnorm_spec(4096, bf16, bf16, Target("cpu")), Toolchain(CXX)),
    ]


def write(root: Path) -> None:
    """Writes the cache as the engine does, without compiling anything, and without the library, which is binary."""
    cache = Cache(root)
    with ExitStack() as patches:
        patches.enter_context(mock.patch("platform.machine", lambda: "x86_64"))
        for name, value in PLACES.items():
            patches.enter_context(mock.patch(f"{engine.__name__}.{name}", value))
        for spec, tools in kernels():
            with cache.staging(spec) as staging:
                engine.write_sources(spec, staging, tools)
                write_entry(staging, b"", engine.manifest(spec, tools, 0))
                entry = cache.publish(staging.path, cache.entry(spec, tools.key))
            entry.release()
            entry.library.unlink()
            words = {spec.key: "KEY", entry.manifest["sha256"]: "SHA256", entry.manifest["sha256"][:16]: "SHA256"}
            text = json.dumps({**entry.manifest, **IN_MANIFEST}, indent=2) + "\n"
            for value, word in words.items():
                text = text.replace(value, word)
            (entry.path / MANIFEST).write_text(text)
            home = entry.path.parent
            entry.path.rename(home / "TOOLCHAIN")
            home.rename(home.with_suffix(".KEY"))
    (root / "staging").rmdir()


def texts(root: Path) -> dict[str, str]:
    return {str(f.relative_to(root)): f.read_text() for f in root.rglob("*") if f.is_file() and f.name != "README.md"}


def test_the_example_is_true(tmp_path):
    write(tmp_path)
    assert texts(EXAMPLE) == texts(tmp_path), "to update it: python tests/jit/test_cache_example.py"


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.nvcc), 1])
def test_a_real_build_holds_the_same(cache_dir, number):
    spec, _ = kernels()[number]
    real = engine.build(spec)
    home = next(EXAMPLE.glob(f"kernels/{spec.name}.*"))
    example = home / "TOOLCHAIN"
    names = {f.name for f in real.path.iterdir()} - {real.library.name}
    assert names == {f.name for f in example.iterdir()}
    assert real.manifest.keys() == json.loads((example / MANIFEST).read_text()).keys()
    for name in names - {MANIFEST, "paths.ninja", spec.source_name}:
        assert (real.path / name).read_text() == (example / name).read_text()


if __name__ == "__main__":
    shutil.rmtree(EXAMPLE / "kernels", ignore_errors=True)
    write(EXAMPLE)
