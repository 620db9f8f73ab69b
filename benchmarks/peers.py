"""RMSNorm as others offer it: for each peer a `call(input, weight, out)`, or the reason why it is absent."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
EPS = 1e-6


def jitnorm_() -> Call:
    from jitnorm import rmsnorm

    return lambda x, w, out: rmsnorm(x, w, EPS, out)


def copy() -> Call:
    return lambda x, w, out: out.copy_(x)


def torch_() -> Call:
    return lambda x, w, out: F.rms_norm(x, (x.shape[-1],), w, EPS)


def torch_compile() -> Call:
    """A function of its own for every shape, so that each is compiled for just that."""
    compiled: dict[torch.Size, Call] = {}

    def call(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> object:
        if x.shape not in compiled:
            torch._dynamo.reset()
            compiled[x.shape] = torch.compile(
                lambda x, w, out: out.copy_(F.rms_norm(x, (x.shape[-1],), w, EPS)), dynamic=False
            )
        return compiled[x.shape](x, w, out)

    return call


def sglang_jit() -> Call:
    from sglang.jit_kernel.norm import rmsnorm

    return lambda x, w, out: rmsnorm(x, w, out, EPS)


def _flashinfer(cuda: bool) -> Call:
    import flashinfer.norm

    def call(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> object:
        flashinfer.norm._USE_CUDA_NORM = cuda
        return flashinfer.norm.rmsnorm(x, w, EPS, out=out, enable_pdl=True)

    return call


def quack() -> Call:
    from quack.rmsnorm import _rmsnorm_fwd

    return lambda x, w, out: _rmsnorm_fwd(x, w, out, None, None, None, None, None, EPS, False, 0.0)


PEERS: dict[str, Callable[[], Call]] = {
    "copy": copy,
    "jitnorm": jitnorm_,
    "sglang": sglang_jit,
    "fi_cuda": lambda: _flashinfer(cuda=True),
    "fi_cute": lambda: _flashinfer(cuda=False),
    "quack": quack,
    "compile": torch_compile,
    "torch": torch_,
}


def available(names: list[str]) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that can be made here, and why the others cannot."""
    calls, absent = {}, {}
    for name in names:
        try:
            calls[name] = PEERS[name]()
        except Exception as error:  # a broken peer is an absent one
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return calls, absent
