"""RMSNorm: `out[i] = input[i] / sqrt(mean(input[i]^2) + eps) * weight`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from jitnorm import checks, torch_ops
from jitnorm.jit.load import load
from jitnorm.jit.spec import KernelSpec, Target
from jitnorm.targets import resolve_target, target_of

_WARP_SIZES = (64, 128, 256)
_BLOCK_SIZES = range(512, 8192 + 1, 256)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# The last kernel used for (hidden size, input's dtype, weight's dtype). Which device it is for stays out of the key: a
# kernel refuses tensors that are elsewhere, and processes that mix devices call is a detour, not a mistake.
_kernels: dict[tuple[int, torch.dtype, torch.dtype], Any] = {}
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """Root mean square layer normalisation over the last dimension, accumulated in float32 and rounded once.

    `out[i] = input[i] / sqrt(mean(input[i]^2) + eps) * weight` (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).
    A row's result has the same bits alone and in any batch. The first call of a size compiles its kernel.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device. The last stride is 1 and
            the leading dimensions collapse to one row stride; on CUDA every row is aligned to 16 bytes.
            hidden_size is 64, 128, 256 or a multiple of 256 from 512 to 8192.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape, dtype and device. The input itself for a call in place; otherwise it shares
            no memory with the input. Allocated where None.
        enable_pdl: programmatic dependent launch. None means on where the GPU has it (sm_90 and later); on others, and
            on the CPU, it has no effect. The bits are the same.

    Returns:
        `out`.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, stride, device, alignment or overlap that is not accepted, or a bad eps.
        RuntimeError: hidden_size is not supported (nothing is built then), or the kernel cannot be built or launched.
    """
    if _is_dynamo_compiling():
        return _traced(input, weight, eps, out, enable_pdl)
    try:
        to = torch.empty_like(input) if out is None else out
        if not _kernels[weight.numel(), input.dtype, weight.dtype](input, weight, to, eps, enable_pdl):
            return to
    except Exception:  # no kernel yet, or arguments that have no such attributes: the way below says what it was
        pass
    return _first_call(input, weight, eps, out, enable_pdl)


def _first_call(
    input: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None, enable_pdl: bool | None
) -> torch.Tensor:
    """The way of a call that finds no kernel or is refused by it: says what is wrong, or gets the right kernel."""
    if torch_ops.is_traced(input, weight, out):
        return _traced(input, weight, eps, out, enable_pdl)
    _check(input, weight, eps, out, enable_pdl)
    target = target_of(input)
    kernel = _jit_rmsnorm_module(input.shape[-1], input.dtype, weight.dtype, target.device, target.arch).rmsnorm
    # A launch takes microseconds: to hand the interpreter to another thread meanwhile is to wait for it afterwards.
    kernel.release_gil = target.device == "cpu"
    to = torch.empty_like(input) if out is None else out
    if kernel(input, weight, to, eps, enable_pdl):
        raise RuntimeError("jitnorm: rmsnorm's kernel refused arguments that its checks accept; please report this")
    _kernels[input.shape[-1], input.dtype, weight.dtype] = kernel
    return to


def _check(input: Any, weight: Any, eps: Any, out: Any, enable_pdl: Any) -> None:
    """Raises for what csrc/elementwise/rmsnorm.h refuses."""
    checks.tensor("input", input)
    checks.tensor("weight", weight)
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    checks.dtype("input", input, _DTYPES)
    checks.dtype("weight", weight, (input.dtype, torch.float32))
    hidden_size = input.shape[-1]
    _rmsnorm_kernel_class(hidden_size)
    checks.shape("weight", weight, [hidden_size], "one factor for each element of input's last dimension")
    checks.supported_device("input", input)
    checks.device("weight", weight, "input", input)
    checks.eps(eps)
    checks.enable_pdl(enable_pdl)
    checks.rows("input", input)
    checks.rows("weight", weight)
    if out is None:
        return
    checks.tensor("out", out)
    checks.dtype("out", out, (input.dtype,))
    checks.shape("out", out, input.shape, "like input")
    checks.device("out", out, "input", input)
    checks.rows("out", out)
    checks.written_rows("out", out)
    checks.no_overlap("out", out, "input", input)
    checks.no_shared_memory("out", out, "weight", weight)


def _is_supported_rmsnorm_hidden_size(hidden_size: int) -> bool:
    return hidden_size in _WARP_SIZES or hidden_size in _BLOCK_SIZES


def _rmsnorm_kernel_class(hidden_size: int) -> str:
    """The class in csrc/elementwise/rmsnorm.cuh and rmsnorm_cpu.h that serves `hidden_size`."""
    if hidden_size in _WARP_SIZES:
        return "RMSNormWarpKernel"
    if hidden_size in _BLOCK_SIZES:
        return "RMSNormKernel"
    raise RuntimeError(
        f"rmsnorm does not support hidden_size {hidden_size}: "
        "supported are 64, 128, 256 and the multiples of 256 from 512 to 8192"
    )


@functools.cache
def _jit_rmsnorm_module(
    hidden_size: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    device: str = "cuda",
    arch: str | None = None,
) -> Any:
    """The loaded module of one instance, built if need be. `arch` as in "9.0a"; None for this machine's own."""
    return load(rmsnorm_spec(hidden_size, dtype, weight_dtype or dtype, resolve_target(device, arch)))


def rmsnorm_spec(hidden_size: int, dtype: torch.dtype, weight_dtype: torch.dtype, target: Target) -> KernelSpec:
    """What to build for one size. RuntimeError for a size that is not supported, TypeError for such a dtype."""
    kernel_class = _rmsnorm_kernel_class(hidden_size)
    if dtype not in _DTYPES or weight_dtype not in (dtype, torch.float32):
        raise TypeError(
            "rmsnorm takes float16, bfloat16 and float32, with weights of the same dtype or float32, "
            f"got {dtype} with weights of {weight_dtype}"
        )
    name, weight_name = checks.DTYPE_NAMES[dtype], checks.DTYPE_NAMES[weight_dtype]
    cpp = {"fp16": "fp16_t", "bf16": "bf16_t", "fp32": "float"}
    warmup = f"--op rmsnorm --hidden-size {hidden_size} --dtype {name}"
    suffix = ""
    if weight_name != name:
        warmup += f" --weight-dtype {weight_name}"
        suffix = f"_{weight_name}_weight"
    return KernelSpec(
        op="rmsnorm",
        name=f"rmsnorm_{hidden_size}_{name}{suffix}",
        kernel=f"{kernel_class}<{hidden_size}, {cpp[name]}, {cpp[weight_name]}>",
        target=target,
        warmup=warmup,
    )


# Under torch.compile, and for FakeTensors: the operators torch.ops.jitnorm.rmsnorm and rmsnorm_out.


def _traced(
    input: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None, enable_pdl: bool | None
) -> torch.Tensor:
    if out is None:
        result: torch.Tensor = torch.ops.jitnorm.rmsnorm(input, weight, eps, enable_pdl)
        return result
    torch.ops.jitnorm.rmsnorm_out(input, weight, out, eps, enable_pdl)
    return out


def _op(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, enable_pdl: bool | None = None) -> torch.Tensor:
    return rmsnorm(input, weight, eps, None, enable_pdl)


def _op_out(
    input: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    rmsnorm(input, weight, eps, out, enable_pdl)


def _fake(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, enable_pdl: bool | None = None) -> torch.Tensor:
    _build_while_tracing(input, weight)
    return torch.empty_like(input)


def _fake_out(
    input: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    _build_while_tracing(input, weight)


def _build_while_tracing(input: torch.Tensor, weight: torch.Tensor) -> None:
    """Not in the middle of the compiled graph's first run; RuntimeError for a size that no kernel serves."""
    hidden_size = int(input.shape[-1])
    _rmsnorm_kernel_class(hidden_size)
    if not input.is_meta:
        load(rmsnorm_spec(hidden_size, input.dtype, weight.dtype, target_of(input)))


torch_ops.register("rmsnorm(Tensor input, Tensor weight, float eps=1e-6, bool? enable_pdl=None) -> Tensor", _op, _fake)
torch_ops.register(
    "rmsnorm_out(Tensor input, Tensor weight, Tensor(a!) out, float eps=1e-6, bool? enable_pdl=None) -> ()",
    _op_out,
    _fake_out,
)
