"""The launcher of CUDA kernels and NVRTC, on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import struct
import subprocess
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import jitnorm
from jitnorm.jit import find, locations, nvrtc, toolchain
from jitnorm.jit import load as loaded
from jitnorm.jit import spec as spec_module
from jitnorm.jit.build import BuildError, build
from jitnorm.jit.launcher import CudaModule
from jitnorm.jit.library import KERNEL_INFO, BadLibrary, Elf
from jitnorm.jit.spec import CSRC, LAUNCHER, Target
from jitnorm.rmsnorm import rmsnorm_spec

from .conftest import entries

ROOT = Path(__file__).parents[2]
HOPPER = Target.cuda("9.0a")


def spec(hidden_size: int = 512):
    return rmsnorm_spec(hidden_size, torch.bfloat16, torch.bfloat16, HOPPER)


@pytest.fixture(scope="module")
def cubin() -> bytes:
    if not toolchain.find_nvrtc():
        pytest.skip("no NVRTC")
    return build(spec()).verify()


# The launcher


def test_a_cubin_describes_its_kernel(cubin):
    """The fields of LaunchInfo, the types, the alignments and the hidden size, as csrc/include/jitnorm has them."""
    info = Elf(cubin).variable(KERNEL_INFO)
    arch, threads, _, _, blocks_per_cluster, shared_bytes = struct.unpack_from("<IIIIII", info)
    assert arch == 90 and threads % 32 == 0 and blocks_per_cluster == 1 and shared_bytes == 0
    bfloat16 = (4, 16, 1)
    assert [struct.unpack_from("<BBH", info, 24 + 4 * i) for i in range(4)] == [bfloat16] * 4
    assert struct.unpack_from("<IIIIi", info, 40) == (16, 16, 16, 16, 512)


def test_a_module_refuses_what_is_not_on_a_gpu(cubin):
    module = CudaModule(loaded.load(LAUNCHER), "rmsnorm", cubin, spec().symbols)
    x = torch.randn(2, 512).bfloat16()
    out = torch.full_like(x, 7)
    assert module.rmsnorm(x, x[0], out, 1e-6, None) == 1 and bool((out == 7).all())
    assert module.rmsnorm_fast_path(x, x[0], out, 1e-6, None) == 1


def test_modules_that_cannot_be_made(cubin):
    launcher = loaded.load(LAUNCHER)
    with pytest.raises(RuntimeError, match="does not know the bindings function"):
        CudaModule(launcher, "softmax", cubin, spec().symbols)
    with pytest.raises(RuntimeError, match="has another size than the launcher's"):
        CudaModule(launcher, "activation", cubin, spec().symbols)
    with pytest.raises(BadLibrary, match="truncated"):
        CudaModule(launcher, "rmsnorm", cubin[:-100], spec().symbols)
    with pytest.raises(BadLibrary, match="does not define jitnorm_info"):
        CudaModule(launcher, "rmsnorm", cubin.replace(b"\0jitnorm_info\0", b"\0another_name\0"), spec().symbols)


def test_the_wheels_launcher_is_used_and_none_is_built(cache_with_launcher, tmp_path, monkeypatch):
    own = build(LAUNCHER)
    file = tmp_path / "launcher.so"
    file.write_bytes(own.verify())
    shutil.rmtree(cache_with_launcher)
    monkeypatch.setattr(find, "launcher_file", lambda: file)
    assert loaded.load(LAUNCHER).make_kernel and not cache_with_launcher.exists()


@pytest.mark.slow
def test_a_launcher_of_the_wheel_that_cannot_be_loaded(cache_dir, tmp_path, monkeypatch, caplog):
    file = tmp_path / "launcher.so"
    file.write_bytes(b"not a library")
    monkeypatch.setattr(find, "launcher_file", lambda: file)
    assert loaded.load(LAUNCHER).make_kernel and entries(cache_dir)
    assert f"the launcher of the installed package is not used: {file}" in caplog.text


def test_a_launcher_of_other_sources_has_another_name(monkeypatch):
    name = spec_module.launcher_file().name
    read = spec_module._read
    name_of_file = "elementwise/rmsnorm.h"
    changed = {name_of_file: read(name_of_file)._replace(content=b"// another order of the parameters")}
    monkeypatch.setattr(spec_module, "_read", lambda file: changed.get(file) or read(file))
    monkeypatch.setattr(spec_module, "LAUNCHER", replace(LAUNCHER))  # without the key that was computed
    assert spec_module.launcher_file().name != name


@pytest.mark.slow
@pytest.mark.parametrize("is_cached", [False, True], ids=["built", "cached"])
def test_a_warm_up_for_cuda_builds_the_launcher(cache_dir, monkeypatch, cubin, is_cached):
    if is_cached:
        build(spec())
    report = jitnorm.warmup(hidden_size=512, dtype="bf16", arch="9.0a")
    assert not report.failed and len(report.cached) == int(is_cached)
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    assert loaded.load(spec()).rmsnorm


def test_a_warm_up_fails_if_the_launcher_cannot_be_built(cache_dir, monkeypatch, cubin):
    monkeypatch.setattr(toolchain, "find_cxx", lambda: None)
    report = jitnorm.warmup(hidden_size=512, dtype="bf16", arch="9.0a")
    ((failed, error),) = report.failed
    assert failed is LAUNCHER and "needs a C++ compiler" in error and len(report.built) == 1


@pytest.mark.nvcc
def test_the_drivers_interface_is_that_of_cuda_h(tmp_path):
    include = Path(toolchain.find_nvcc()).resolve().parents[1] / "include"
    if not (include / "cuda.h").is_file():
        pytest.skip("nvcc's folder has no cuda.h")
    functions = {
        "device_get": "cuDeviceGet",
        "device_attribute": "cuDeviceGetAttribute",
        "primary_retain": "cuDevicePrimaryCtxRetain",
        "current_device": "cuCtxGetDevice",
        "exchange_capture_mode": "cuThreadExchangeStreamCaptureMode",
        "library_load": "cuLibraryLoadData",
        "library_kernel": "cuLibraryGetKernel",
        "kernel_function": "cuKernelGetFunction",
        "set_function_attribute": "cuFuncSetAttribute",
        "launch": "cuLaunchKernelEx",
        "encode_tensor_map": "cuTensorMapEncodeTiled",
    }
    numbers = {
        "kComputeCapabilityMajor": "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
        "kComputeCapabilityMinor": "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR",
        "kMaxDynamicSharedBytes": "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES",
        "kRelaxedCapture": "CU_STREAM_CAPTURE_MODE_RELAXED",
        "kClusterDimension": "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION",
        "kProgrammaticStreamSerialization": "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION",
        "kTensorMapUint16": "CU_TENSOR_MAP_DATA_TYPE_UINT16",
        "kTensorMapSwizzle128B": "CU_TENSOR_MAP_SWIZZLE_128B",
        "kTensorMapPromotion128B": "CU_TENSOR_MAP_L2_PROMOTION_L2_128B",
        "CU_TENSOR_MAP_INTERLEAVE_NONE": "0",
        "CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE": "0",
        "CUDA_SUCCESS": "0",
    }
    fields = {"grid_x": "gridDimX", "block_z": "blockDimZ", "stream": "hStream", "attributes": "attrs"}
    fields |= {"num_attributes": "numAttrs", "shared_bytes": "sharedMemBytes"}
    lines = ['#include <cuda.h>\n#include "launcher/cuda_driver.h"\nusing namespace jitnorm;']
    lines += ["template <typename R, typename... A> constexpr int count(R (*)(A...)) { return sizeof...(A); }"]
    lines += [f"static_assert(int({ours}) == int({theirs}));" for ours, theirs in numbers.items()]
    lines += [
        f"static_assert(count(decltype(Driver::{ours}){{}}) == count(decltype(&{theirs}){{}}));"
        for ours, theirs in functions.items()
    ]
    lines += [
        f"static_assert(offsetof(LaunchConfig, {ours}) == offsetof(CUlaunchConfig, {theirs}));"
        for ours, theirs in fields.items()
    ]
    lines += [
        "static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig) && sizeof(LaunchAttribute) == "
        "sizeof(CUlaunchAttribute) && offsetof(LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));"
    ]
    lines += [
        '#include "jitnorm/kernel_info.h"\n'
        "static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));"
    ]
    source = tmp_path / "check.cc"
    source.write_text("\n".join(lines))
    command = [toolchain.find_cxx(), "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{CSRC}", f"-I{CSRC}/include"]
    command += [str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheels_launcher_needs_no_new_glibc(tmp_path):
    """What hatch_build.py adds to the wheel, which is for manylinux_2_28."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel")
    module_spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hatch_build = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(hatch_build)
    file = hatch_build.build_launcher(platform.machine(), tmp_path)
    assert file.name == spec_module.launcher_file().name
    content = file.read_bytes()
    assert max(hatch_build.glibc_versions(content)) <= hatch_build.MAX_GLIBC
    assert {"libtvm_ffi.so", "libdl.so.2"} <= set(Elf(content).needed())
    with pytest.raises(RuntimeError, match="does not compile for another: set CXX"):
        hatch_build.build_launcher("another", tmp_path)
    assert not any("cuda" in name or "python" in name or "torch" in name for name in Elf(content).needed())


# NVRTC


@pytest.fixture
def library() -> nvrtc.Nvrtc:
    try:
        return nvrtc.load(nvrtc.find())
    except nvrtc.NvrtcError as error:
        pytest.skip(f"no NVRTC: {error}")


KERNEL = 'extern "C" __global__ void f() {}'


def test_nvrtc_compiles(library):
    cubin = library.compile(KERNEL, "f.cu", ["-arch=sm_90a"])
    assert "f" in Elf(cubin).symbols()
    assert 90 in library.archs and float(library.version) >= 12


def test_options_that_an_older_nvrtc_does_not_know(library, monkeypatch):
    monkeypatch.setattr(library, "_optional", ("-an-option-of-tomorrow",))
    assert "f" in Elf(library.compile(KERNEL, "f.cu", ["-arch=sm_90"])).symbols()
    assert library._optional == ()


def test_nvrtc_names_the_line_of_an_error(library):
    with pytest.raises(nvrtc.CompileError, match=r"f\.cu\(2\): error: .*undefined"):
        library.compile('extern "C" __global__ void f() {\nunknown();\n}', "f.cu", ["-arch=sm_90a"])
    with pytest.raises(nvrtc.NvrtcError, match="arch"):
        library.compile("", "f.cu", ["-arch=sm_1"])


@pytest.mark.parametrize(
    ("cuda", "expected"), [("12.8", "libnvrtc.so.12"), ("13.0", "libnvrtc.so.13"), (None, "libnvrtc.so.13")]
)
def test_nvrtc_of_the_wheels_is_that_of_torchs_version(tmp_path, monkeypatch, cuda, expected):
    for name in ("cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc.so.13", "cu13/lib/libnvrtc-builtins.so.13.0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert Path(nvrtc.find()).name == expected


def test_nvrtc_that_is_no_library(tmp_path):
    (tmp_path / "libnvrtc.so").write_bytes(b"not a library")
    with pytest.raises(nvrtc.NvrtcError, match=r"libnvrtc\.so"):
        nvrtc.Nvrtc(str(tmp_path / "libnvrtc.so"))
    with pytest.raises(nvrtc.NvrtcError, match="nvrtcGetCUBIN"):
        nvrtc.Nvrtc("libc.so.6")


def test_a_build_by_nvrtc_starts_no_process(cache_dir, monkeypatch, library):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    entry = build(spec())
    assert entry.manifest["compilers"]["nvrtc"].startswith(f"{library.version}, build ")
    assert entry.library.suffix == ".cubin" and Elf(entry.verify()).variable(KERNEL_INFO)


def test_a_source_that_nvrtc_refuses(cache_dir, monkeypatch, library):
    with pytest.raises(BuildError, match=r"cannot build NoSuchKernel for sm_90a: module\.cu\(\d+\): error") as caught:
        build(replace(spec(), kernel="NoSuchKernel"))
    assert "NoSuchKernel" in Path(str(caught.value).rpartition("The whole log: ")[2]).read_text()
    assert not entries(cache_dir)


@pytest.mark.nvcc
def test_nvcc_builds_what_nvrtc_cannot(cache_dir, monkeypatch, caplog, library):
    def fail(*_, **__):
        raise nvrtc.NvrtcError("out of memory")

    monkeypatch.setattr(nvrtc.Nvrtc, "compile", fail)
    first = build(spec())
    assert [*first.manifest["compilers"]] == ["c++", "nvcc"]
    assert (
        "NVRTC cannot build RMSNormKernel<512, bf16_t, bf16_t> for sm_90a: out of memory. nvcc builds it" in caplog.text
    )
    assert build(spec()).path == first.path
    # A later process, which finds the same compilers, takes it without another try.
    toolchain.require(HOPPER, locations.writable())
    assert find.find(spec()).path == first.path
    monkeypatch.setenv("JITNORM_CUDA_COMPILER", "nvrtc")
    with pytest.raises(RuntimeError, match=r"NVRTC cannot build .*out of memory\. .*so nvcc is not tried: unset it"):
        build(spec())
