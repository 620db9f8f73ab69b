"""The key: everything a library is made from, and nothing else."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
import torch
import tvm_ffi

from jitnorm.jit import spec as module
from jitnorm.jit.spec import KernelSpec, Target
from jitnorm.rmsnorm import rmsnorm_spec


def make(target=None, hidden_size=4096, dtype=torch.bfloat16, weight_dtype=None):
    return rmsnorm_spec(hidden_size, dtype, weight_dtype or dtype, target or Target.cuda("9.0a"))


@pytest.fixture
def own_csrc(tmp_path, monkeypatch):
    """A copy of csrc that a test may change."""
    shutil.copytree(module.CSRC, tmp_path / "csrc")
    monkeypatch.setattr(module, "CSRC", tmp_path / "csrc")
    module._read.cache_clear()
    yield tmp_path / "csrc"
    module._read.cache_clear()


def fresh(spec: KernelSpec) -> str:
    module._read.cache_clear()
    return replace(spec).key


def test_different_kernels_have_different_keys():
    specs = [
        make(),
        make(hidden_size=4352),
        make(dtype=torch.float16),
        make(weight_dtype=torch.float32),
        make(Target.cuda("9.0")),
        make(Target.cuda("8.0")),
        make(Target("cpu")),
    ]
    assert len({s.key for s in specs}) == len(specs)
    assert len({s.name + s.target.sm for s in specs}) == len(specs)


@pytest.mark.parametrize("name", ["elementwise/rmsnorm.cuh", "elementwise/rmsnorm.h", "include/jitnorm/reduce.h"])
def test_a_changed_header_changes_the_key(own_csrc, name):
    before = fresh(make())
    (own_csrc / name).write_text((own_csrc / name).read_text() + "\n// changed\n")
    assert fresh(make()) != before


def test_modification_times_unrelated_files_and_places_do_not(own_csrc, monkeypatch):
    before = fresh(make())
    for file in own_csrc.rglob("*.h"):
        os.utime(file, (1, 1))
    (own_csrc / "elementwise" / "other.cuh").write_text("// another family")
    (own_csrc / "elementwise" / "rmsnorm_cpu.h").write_text("// not included by the CUDA source")
    assert fresh(make()) == before
    elsewhere = shutil.copytree(own_csrc, own_csrc.parent / "elsewhere")
    monkeypatch.setattr(module, "CSRC", elsewhere)
    assert fresh(make()) == before


def test_flags_processor_and_tvm_ffi_are_in_the_key(monkeypatch):
    cpu, cuda = make(Target("cpu")), make()
    keys = cpu.key, cuda.key
    monkeypatch.setattr(module, "cpu_features", lambda: "another processor")
    assert fresh(cpu) != keys[0]
    monkeypatch.setattr(module.platform, "machine", lambda: "another machine")
    assert fresh(cuda) == keys[1]  # a cubin depends on nothing of the host
    monkeypatch.setattr(tvm_ffi, "__version__", "9.9")
    assert fresh(cuda) == keys[1]
    monkeypatch.setattr(module, "NVRTC_OPTIONS", ("-G",))
    assert fresh(cuda) != keys[1]
    monkeypatch.undo()
    monkeypatch.setattr(tvm_ffi, "__version__", "9.9")
    assert fresh(cpu) != keys[0]
    monkeypatch.setattr(module.KernelSpec, "cuda_options", ("-O1",))
    assert fresh(cuda) != keys[1]


def test_includes_are_followed():
    assert {"elementwise/rmsnorm.cuh", "elementwise/rmsnorm.h", "include/jitnorm/ffi.h"} <= set(make().includes)
    assert "elementwise/rmsnorm_cpu.h" in make(Target("cpu")).includes
    assert not any(name.endswith(".cuh") for name in make(Target("cpu")).includes)


@pytest.mark.parametrize(
    ("arch", "sm"), [("9.0a", "sm_90a"), ("90a", "sm_90a"), ("sm_90a", "sm_90a"), ("7.5", "sm_75"), ("12.0", "sm_120")]
)
def test_architectures(arch, sm):
    assert Target.cuda(arch).sm == sm


@pytest.mark.parametrize("arch", ["", "hopper", "9", "9.0b", "sm90.a.1", None])
def test_what_is_no_architecture(arch):
    with pytest.raises(ValueError, match="arch must be a CUDA architecture"):
        Target.cuda(arch)


def test_nothing_of_this_machine_is_in_the_build_files():
    for spec in (make(), make(Target("cpu"))):
        assert str(module.CSRC) not in spec.source + spec.ninja
        assert "/" not in spec.ninja.replace("$csrc/include", "")
