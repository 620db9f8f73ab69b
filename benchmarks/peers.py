"""The RMSNorm family as others offer it. Each peer gives, for an operator's name, a function of tensors, or raises.

rmsnorm and gemma_rmsnorm: `call(input, weight, out)`, whose result is in `out` or returned.
fused_add_rmsnorm and gemma_fused_add_rmsnorm: `call(input, residual, weight)`, both written in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Call = Callable[..., object]
EPS = 1e-6


def copy(op: str) -> Call:
    """The same bytes, read and written once: one tensor, or the two of a residual form."""
    if "fused" in op:
        raise LookupError("the benchmark copies tensors of twice the rows instead")
    return lambda x, w, out: out.copy_(x)


def jitnorm_(op: str) -> Call:
    import jitnorm

    function = getattr(jitnorm, op)
    if "fused" in op:
        return lambda x, residual, w: function(x, residual, w, EPS)
    return lambda x, w, out: function(x, w, EPS, out)


def _formula(x: torch.Tensor, w: torch.Tensor, op: str) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), 1 + w if "gemma" in op else w, EPS)


def torch_(op: str) -> Call:
    def fused(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> object:
        return x.copy_(_formula(residual.add_(x), w, op))

    return fused if "fused" in op else lambda x, w, out: _formula(x, w, op)


def torch_compile(op: str) -> Call:
    """A function of its own for every shape, so that each is compiled for just that."""
    compiled: dict[torch.Size, Call] = {}
    eager = torch_(op) if "fused" in op else lambda x, w, out: out.copy_(_formula(x, w, op))

    def call(x: torch.Tensor, *rest: torch.Tensor) -> object:
        if x.shape not in compiled:
            torch._dynamo.reset()
            compiled[x.shape] = torch.compile(lambda *tensors: eager(*tensors), dynamic=False)
        return compiled[x.shape](x, *rest)

    return call


def sglang_jit(op: str) -> Call:
    from sglang.jit_kernel import norm

    function = getattr(norm, op)
    if "fused" in op:
        return lambda x, residual, w: function(x, residual, w, EPS)
    return lambda x, w, out: function(x, w, out, EPS)


def _flashinfer(op: str, cuda: bool) -> Call:
    import flashinfer.norm

    function = getattr(flashinfer.norm, op)

    def fused(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> object:
        flashinfer.norm._USE_CUDA_NORM = cuda
        return function(x, residual, w, EPS, enable_pdl=True)

    def plain(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> object:
        flashinfer.norm._USE_CUDA_NORM = cuda
        return function(x, w, EPS, out=out, enable_pdl=True)

    return fused if "fused" in op else plain


def quack(op: str) -> Call:
    from quack.rmsnorm import _rmsnorm_fwd

    offset = 1.0 if "gemma" in op else 0.0

    def run(x: Any, w: Any, out: Any, residual: Any = None) -> object:
        return _rmsnorm_fwd(x, w, out, None, None, None, residual, residual, EPS, False, offset)

    return (lambda x, residual, w: run(x, w, x, residual)) if "fused" in op else run


PEERS: dict[str, Callable[[str], Call]] = {
    "copy": copy,
    "jitnorm": jitnorm_,
    "sglang": sglang_jit,
    "fi_cuda": lambda op: _flashinfer(op, cuda=True),
    "fi_cute": lambda op: _flashinfer(op, cuda=False),
    "quack": quack,
    "compile": torch_compile,
    "torch": torch_,
}


def available(names: list[str], op: str) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that can be made here, and why the others cannot."""
    calls, absent = {}, {}
    for name in names:
        try:
            calls[name] = PEERS[name](op)
        except Exception as error:  # a broken peer is an absent one
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return calls, absent
