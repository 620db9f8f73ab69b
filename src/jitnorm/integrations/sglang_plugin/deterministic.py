"""Replace the operators of SGLang's deterministic mode by jitnorm's batch-invariant ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import torch

from jitnorm.batch_invariant import (
    bmm_batch_invariant,
    log_softmax,
    matmul_persistent,
    mean_dim,
    rms_norm_batch_invariant,
)
from jitnorm.batch_invariant.aten_patches import PATCHES
from jitnorm.integrations.sglang_plugin.replacement import Report

MODULE = "sglang.srt.batch_invariant_ops.batch_invariant_ops"


def _mean_dim(input: torch.Tensor, dim: int, keepdim: bool = False, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Call `jitnorm.batch_invariant.mean_dim`; the mean of integers is float32, as SGLang's."""
    is_float = input.dtype.is_floating_point or input.dtype.is_complex
    return mean_dim(input, dim, keepdim, dtype or (None if is_float else torch.float32))


def _bmm(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Call `jitnorm.batch_invariant.bmm_batch_invariant`; a compiled graph gets ATen's operator, which it overrides."""
    if torch.compiler.is_compiling():
        product: torch.Tensor = torch.ops.aten.bmm.default(a, b)
        return product if out is None else out.copy_(product)
    return bmm_batch_invariant(a, b, out)


# By their names in MODULE: the functions that models call, and those that SGLang registers for ATen's operators.
FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "matmul_persistent": matmul_persistent,
    "bmm_batch_invariant": _bmm,
    "log_softmax": log_softmax,
    "mean_dim": _mean_dim,
    "rms_norm_batch_invariant": rms_norm_batch_invariant,
    "mm_batch_invariant": PATCHES["mm"],
    "_mm_dtype_compat": PATCHES["mm.dtype"],
    "addmm_batch_invariant": PATCHES["addmm"],
    "_log_softmax_batch_invariant": PATCHES["_log_softmax"],
    "mean_batch_invariant": PATCHES["mean.dim"],
}


def replace_operators() -> None:
    """Put jitnorm's operators in place of SGLang's, in every module of SGLang that has imported them.

    Call it before the mode is enabled: then SGLang registers them for ATen's operators itself. A second call changes
    nothing. MODULE is imported, and its source has been checked.
    """
    originals = {name: getattr(sys.modules[MODULE], name) for name in FUNCTIONS}
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("sglang") and isinstance(m, ModuleType)]
    for module in modules:
        for attribute, value in list(vars(module).items()):
            for name, original in originals.items():
                if value is original:
                    setattr(module, attribute, FUNCTIONS[name])


def replaced_names() -> list[str]:
    """Return which of FUNCTIONS are in place in MODULE."""
    module = sys.modules.get(MODULE)
    return [name for name, function in FUNCTIONS.items() if getattr(module, name, None) is function]


def select_gemms(model: torch.nn.Module, dtype: torch.dtype, report: Report) -> None:
    """Multiply once by each shape of a model's weights, in the mode.

    The first product of a shape selects its GEMM backend and checks that it is batch-invariant, which cannot be done
    while a CUDA graph is captured and would delay a request.
    """
    seen = set()
    heads = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "lm_head"]
    heads += [head] if isinstance(head := getattr(model, "lm_head", None), torch.nn.Module) else []  # a tied embedding
    for module in model.modules():
        weight = getattr(module, "weight", None)
        is_linear = type(getattr(module, "quant_method", None)).__name__ == "UnquantizedLinearMethod"
        if not (is_linear or module in heads) or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            continue
        bias = getattr(module, "bias", None)
        key = weight.shape, weight.stride(), weight.dtype, bias is None
        if key in seen or weight.dtype != dtype:
            continue
        seen.add(key)
        with torch.no_grad():
            torch.nn.functional.linear(weight.new_zeros(1, weight.shape[1]), weight.data, bias)
    report.replaced["shape of the linear layers", "matmul_persistent"] += len(seen)
