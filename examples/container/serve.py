"""Stands for a service: calls the kernels of a model once, as its first request would.

    python serve.py config.json

With JITNORM_DISABLE_JIT=1 a kernel that the image lacks is an error here, and not a delay.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import jitnorm


def main(config: Path) -> None:
    sizes = json.loads(config.read_text())
    hidden, intermediate, eps = sizes["hidden_size"], sizes["intermediate_size"], sizes["rms_norm_eps"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.ones(hidden, dtype=torch.bfloat16, device=device)
    x = torch.randn(4, hidden, dtype=torch.bfloat16, device=device)
    x, residual = jitnorm.rmsnorm(x, weight, eps=eps), x
    jitnorm.fused_add_rmsnorm(x, residual, weight, eps=eps)
    gates = torch.randn(4, 2 * intermediate, dtype=torch.bfloat16, device=device)
    finite = x.isfinite().all() and jitnorm.silu_and_mul(gates).isfinite().all()
    if not finite:
        sys.exit("the kernels computed values that are not finite")
    print(f"ready on {device}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
