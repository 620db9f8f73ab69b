"""Provide each operator as jitnorm, PyTorch and other packages implement it: `find(op, impl)` is a function of tensors.

rmsnorm, gemma_rmsnorm                          (input, weight, out); the result is in `out` or returned
fused_add_rmsnorm, gemma_fused_add_rmsnorm      (input, residual, weight); both written in place
  with _round_sum behind the name               the same, for peers that normalise the rounded sum
  with _fp32_residual behind the name           the same, with a float32 residual beside an input in half precision
fused_inplace_qknorm                            (q, k, q_weight, k_weight); q and k written in place
dual_rmsnorm                                    (input1, input2, weight1, weight2, out1, out2)
those of ACTIVATIONS                            (input, out); the result is in `out` or returned
  with _hf behind the name                      the same, with the activation's result rounded before the product
store_cache                                     (k, v, k_cache, v_cache, indices)

Some peers compile for minutes at their first calls. `Builds` lets them do so in processes with a time limit.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F

from jitnorm.benchmark import marker

Call = Callable[..., object]
EPS = 1e-6
ROUND_SUM = "_round_sum"  # the end of the names of operators that normalise the sum as rounded into the residual
FP32_RESIDUAL = "_fp32_residual"  # the end of the names of those with a float32 residual
HF = "_hf"  # the end of the names of activations that round before the product
LIMIT = 7.0  # of the activations that clamp, as in gpt-oss


def find(op: str, impl: str) -> Call:
    """Return an operator of an implementation, or make the cell N/A with the reason."""
    found = _find(op, impl)
    if isinstance(found, str):
        marker.skip(found)
    if failure := _BUILDS.wait(impl):
        marker.skip(failure)
    return found


@functools.cache  # so that a package that fails to import is not imported again for every row
def _find(op: str, impl: str) -> Call | str:
    """Return an operator, or why there is none."""
    return create(_PEERS[impl], op, impl)


def create(implementation: Callable[[str], Call], op: str, impl: str) -> Call | str:
    """Return `implementation(op)`, or its exception as text: a broken package counts as one that is missing."""
    try:
        return implementation(op)
    except ModuleNotFoundError as error:
        return str(error)  # the same for every op
    except Exception as error:
        return f"{impl} has no {op} here: {type(error).__name__}: {error}".partition("\n")[0]


class Builds:
    """Make the first calls of peers in processes of their own, so that their kernels are in their caches.

    All of them start when the first is waited for, and have `JITNORM_BENCH_BUILD_SECONDS` (150) from then. A process
    that takes longer is killed, with the compilers that it started.

    Args:
        first_calls: called with the name of a peer, in its process. It belongs to a module, as processes are spawned.
        names: the peers that compile for long.
    """

    start_method = "spawn"  # of multiprocessing: a forked process cannot use CUDA

    def __init__(self, first_calls: Callable[[str], object], names: Sequence[str]) -> None:
        self.first_calls, self.names = first_calls, names
        self.seconds = float(os.environ.get("JITNORM_BENCH_BUILD_SECONDS", "150"))
        self._failures: dict[str, str | None] = {}
        self._processes: dict[str, tuple[Any, Connection]] = {}
        self._end = 0.0

    def wait(self, name: str) -> str | None:
        """Return None once the kernels of a peer are built, or why they are not."""
        if name not in self.names:
            return None
        if not self._processes:
            self._start()
        if name not in self._failures:
            self._failures[name] = self._result(name)
        return self._failures[name]

    def _start(self) -> None:
        context = multiprocessing.get_context(self.start_method)
        self._end = time.monotonic() + self.seconds
        atexit.register(self.kill)
        for name in self.names:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send_failure, args=(self.first_calls, name, sender))
            process.start()
            sender.close()
            self._processes[name] = process, receiver

    def _result(self, name: str) -> str | None:
        process, receiver = self._processes[name]
        try:
            if receiver.poll(max(0.0, self._end - time.monotonic())):
                failure = receiver.recv()
                return failure and f"{name} cannot be built here: {failure}"
        except EOFError:
            process.join()
            return f"{name} cannot be built here: its process ended with status {process.exitcode}"
        self._kill(name)
        return f"{name} was not built within {self.seconds:g} s (JITNORM_BENCH_BUILD_SECONDS)"

    def kill(self) -> None:
        """Kill the processes that still run."""
        for name in self._processes:
            self._kill(name)

    def _kill(self, name: str) -> None:
        process, _ = self._processes[name]
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it has no group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def _send_failure(first_calls: Callable[[str], object], name: str, sender: Connection) -> None:
    """Call `first_calls`, and send None or its exception as text."""
    os.setpgrp()  # so that the compilers that it starts can be killed with it
    try:
        first_calls(name)
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}".partition("\n")[0])
    else:
        sender.send(None)


def _make_first_calls(impl: str) -> None:
    """Compile FlashInfer's norms, all of which are one library, and an activation."""
    x, out, weight = marker.create_random(1, 2048), marker.create_empty(1, 1024), marker.create_random(2048)
    _flashinfer("rmsnorm", cuda=True)(x, weight, torch.empty_like(x))
    _flashinfer("silu_and_mul", cuda=True)(x, out)


_BUILDS = Builds(_make_first_calls, ["fi_cuda"])


def rmsnorm_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return RMSNorm by its definition, in float64."""
    x = x.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()


def _jitnorm(op: str) -> Call:
    import jitnorm

    function = getattr(jitnorm, op.removesuffix(ROUND_SUM).removesuffix(FP32_RESIDUAL).removesuffix(HF))
    if op in ("rmsnorm", "gemma_rmsnorm"):
        return lambda x, w, out: function(x, w, EPS, out)
    if op == "dual_rmsnorm":
        return lambda *tensors: function(*tensors[:4], EPS, *tensors[4:])
    if op.endswith(ROUND_SUM):
        return lambda *tensors: function(*tensors, EPS, round_sum=True)
    if "norm" in op:
        return lambda *tensors: function(*tensors, EPS)
    if op.endswith(HF):
        return lambda x, out: function(x, out, rounding="hf")
    if op in ("fatrelu_and_mul", "swigluoai_and_mul"):
        return lambda x, out: function(x, out=out)
    return (lambda x, out: function(x, LIMIT, out)) if op == "silu_and_mul_with_clamp" else function


def _rms_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], w, EPS)


def _add_norm(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> None:
    x.copy_(_rms_norm(residual.add_(x), w))


def _qk_norm(q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor) -> None:
    q.copy_(_rms_norm(q, q_weight))
    k.copy_(_rms_norm(k, k_weight))


def _dual_norm(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, v: torch.Tensor, *outs: torch.Tensor) -> None:
    outs[0].copy_(_rms_norm(x, w))
    outs[1].copy_(_rms_norm(y, v))


def _store(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, indices: Any) -> None:
    k_cache[indices] = k
    v_cache[indices] = v


def _gated(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def call(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return activation(gate) * up

    return call


def _mul_and_silu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return gate * F.silu(up)


def _clamped(gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


# Activations as functions of the input in PyTorch, with the parameters with which `find` calls them.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu_and_mul": _gated(F.silu),
    "gelu_and_mul": _gated(F.gelu),
    "gelu_tanh_and_mul": _gated(_gelu_tanh),
    "silu_and_mul_hf": _gated(F.silu),
    "gelu_and_mul_hf": _gated(F.gelu),
    "gelu_tanh_and_mul_hf": _gated(_gelu_tanh),
    "mul_and_silu": _mul_and_silu,
    "fatrelu_and_mul": _gated(lambda x: F.threshold(x, 0.0, 0.0)),
    "silu_and_mul_with_clamp": lambda x: _clamped(*x.chunk(2, -1), 1.0, 0.0),
    "swigluoai_and_mul": lambda x: _clamped(x[..., ::2], x[..., 1::2], 1.702, 1.0),
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: torch.square(F.relu(x)),
}


def _gemma_add_norm(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> None:
    _add_norm(x, residual, 1 + w)


def _add_norm_fp32(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> None:
    _add_norm(x, residual, w.float())


def _gemma_add_norm_fp32(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> None:
    _add_norm(x, residual, 1 + w.float())


def _returned(activation: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    return lambda x, out: activation(x)


# In eager mode torch rounds the sum, and when compiled it does not, unless `_torch_compile` tells it to.
_TORCH: dict[str, Call] = {
    "rmsnorm": lambda x, w, out: _rms_norm(x, w),
    "gemma_rmsnorm": lambda x, w, out: _rms_norm(x, 1 + w),
    "fused_add_rmsnorm": _add_norm,
    f"fused_add_rmsnorm{ROUND_SUM}": _add_norm,
    "gemma_fused_add_rmsnorm": _gemma_add_norm,
    f"gemma_fused_add_rmsnorm{ROUND_SUM}": _gemma_add_norm,
    f"fused_add_rmsnorm{FP32_RESIDUAL}": _add_norm_fp32,
    f"gemma_fused_add_rmsnorm{FP32_RESIDUAL}": _gemma_add_norm_fp32,
    "fused_inplace_qknorm": _qk_norm,
    "dual_rmsnorm": _dual_norm,
    "store_cache": _store,
    **{op: _returned(activation) for op, activation in ACTIVATIONS.items()},
}


def _torch_compile(op: str) -> Call:
    """Return the operator compiled by torch, once for each shape; the result is copied to `out` where there is one."""
    eager, compiled = _TORCH[op], {}
    options = {"emulate_precision_casts": True} if op.endswith(ROUND_SUM) else None

    def into_out(*tensors: torch.Tensor) -> None:
        result = eager(*tensors)
        if result is not None:
            tensors[-1].copy_(result)

    def call(*tensors: torch.Tensor) -> None:
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in compiled:
            torch._dynamo.reset()
            compiled[shapes] = torch.compile(lambda *t: into_out(*t), dynamic=False, options=options)
        compiled[shapes](*tensors)

    return call


def _sglang(op: str) -> Call:
    if op == "store_cache":
        from sglang.jit_kernel import kvcache as module
    elif op.endswith("_and_mul"):
        from sglang.jit_kernel import activation as module
    else:
        from sglang.jit_kernel import norm as module
    function = getattr(module, op.removesuffix(ROUND_SUM))  # its fused_add_rmsnorm rounds the sum
    if op in ("rmsnorm", "gemma_rmsnorm"):
        return lambda x, w, out: function(x, w, out, EPS)
    if "norm" in op:
        return lambda *tensors: function(*tensors, EPS)
    return function


def _flashinfer(op: str, cuda: bool) -> Call:
    import flashinfer.norm

    if op.endswith("_and_mul"):
        if not cuda:
            raise LookupError("its activations have a CUDA implementation only")
        function = getattr(flashinfer, op)
        return lambda x, out: function(x, out, enable_pdl=True)
    function = getattr(flashinfer.norm, op)  # none with ROUND_SUM: it normalises the unrounded sum

    def fused(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> None:
        flashinfer.norm._USE_CUDA_NORM = cuda
        function(x, residual, w, EPS, enable_pdl=True)

    def plain(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
        flashinfer.norm._USE_CUDA_NORM = cuda
        function(x, w, EPS, out=out, enable_pdl=True)

    return fused if "fused" in op else plain


def _quack(op: str) -> Call:
    if not op.removesuffix(FP32_RESIDUAL).endswith("rmsnorm"):
        raise LookupError("quack has no such operator")
    from quack.rmsnorm import _rmsnorm_fwd

    offset = 1.0 if "gemma" in op else 0.0

    def run(x: Any, w: Any, out: Any, residual: Any = None) -> None:
        _rmsnorm_fwd(x, w, out, None, None, None, residual, residual, EPS, False, offset)

    return (lambda x, residual, w: run(x, w, x, residual)) if "fused" in op else run


def _liger(op: str) -> Call:
    """Return Liger's forward pass, which returns new tensors and writes none in place, with a residual too."""
    if op in ("rmsnorm", "gemma_rmsnorm"):
        from liger_kernel.ops.rms_norm import rms_norm_forward

        gemma = "gemma" in op
        options = (EPS, float(gemma), "gemma" if gemma else "llama", None)
        return lambda x, w, out: rms_norm_forward(x, w, *options)[0]
    if op.endswith(FP32_RESIDUAL):
        raise LookupError("Liger stores the sum in the input's dtype")
    if "fused_add_rmsnorm" in op:  # which rounds the sum
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

        gemma = "gemma" in op
        options = (EPS, float(gemma), "gemma" if gemma else "llama")
        return lambda x, residual, w: fused_add_rms_norm_forward(x, residual, w, *options)[:2]
    if op in ("silu_and_mul", "gelu_tanh_and_mul"):
        from liger_kernel.ops.geglu import geglu_forward
        from liger_kernel.ops.swiglu import swiglu_forward

        function = swiglu_forward if op == "silu_and_mul" else geglu_forward
        return lambda x, out: function(*(half.contiguous() for half in x.chunk(2, -1)))[2]
    raise LookupError("Liger has no such operator")


_PEERS: dict[str, Callable[[str], Call]] = {
    "jitnorm": _jitnorm,
    "sglang": _sglang,
    "fi_cuda": lambda op: _flashinfer(op, cuda=True),
    "fi_cute": lambda op: _flashinfer(op, cuda=False),
    "quack": _quack,
    "liger": _liger,
    "compile": _torch_compile,
    "torch": _TORCH.__getitem__,
}
IMPLS = list(_PEERS)
