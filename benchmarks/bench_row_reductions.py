"""Measure batch-invariant RMSNorm, softmax and mean, and those of torch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from jitnorm.batch_invariant import log_softmax, mean_dim, rms_norm_batch_invariant, softmax
from jitnorm.benchmark import marker

Call = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
JITNORM: dict[str, Call] = {
    "rms_norm": lambda x, w: rms_norm_batch_invariant(x, w, 1e-6),
    "softmax": lambda x, w: softmax(x),
    "log_softmax": lambda x, w: log_softmax(x),
    "mean": lambda x, w: mean_dim(x, -1),
}
TORCH: dict[str, Call] = {
    "rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
    "softmax": lambda x, w: torch.softmax(x, -1),
    "log_softmax": lambda x, w: torch.log_softmax(x, -1),
    "mean": lambda x, w: x.mean(-1),
}


def compiled(op: str) -> Call:
    torch.compiler.reset()
    return torch.compile(TORCH[op], dynamic=False)


IMPLS: dict[str, Callable[[str], Call]] = {
    "jitnorm": JITNORM.__getitem__,
    "torch": TORCH.__getitem__,
    "compile": compiled,
}


@marker.parametrize("op", list(TORCH), ["softmax", "mean"])
@marker.parametrize(
    "num_rows,size",
    [(1, 4096), (64, 4096), (4096, 128), (4096, 4096), (16384, 8192), (1, 128256), (64, 128256)],
    [(64, 4096)],
)
@marker.benchmark("impl", list(IMPLS))
def bench(op: str, num_rows: int, size: int, impl: str) -> marker.BenchResult:
    """Measure batch-invariant RMSNorm, softmax and mean, and those of torch and torch.compile."""
    if op == "rms_norm" and size > 8192:
        marker.skip("no model has this hidden size")
    x, w = marker.create_random(num_rows, size), marker.create_random(size)
    memory = (x, w) if op == "rms_norm" else (x,)
    return marker.do_bench(
        IMPLS[impl](op), input_args=(x, w), memory_args=memory, check=lambda x, w: TORCH[op](x.double(), w.double())
    )


if __name__ == "__main__":
    bench.main(copy=True)
