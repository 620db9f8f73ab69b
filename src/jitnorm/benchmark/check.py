"""Whether a call computes what a reference says: nobody is fast by being wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jitnorm.benchmark.arguments import Call, returned

# Relative error of a whole tensor. Rounding once costs a third of it; the rest is for those who round twice.
_TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-5}


def relative_error(
    call: Call,
    outputs: Sequence[int | str],
    poisoned: Sequence[int | str],
    reference: Callable[..., Any],
    tolerance: float | None,
) -> float:
    """The worst error among the call's results: what it returns or, where that is no tensor, its arguments `outputs`.

    Tensors at `poisoned` hold NaN before the call. The reference gets the same arguments, and returns the tensors that
    are right, in the same order. `call` is used up: it must be a copy.

    Raises:
        ValueError: a result is wrong by more than `tolerance` (None: what its dtype explains), or there are not as
            many as the reference has.
    """
    tensors = call.tensors()
    expected = returned(_on_copies(call, reference))
    for key in poisoned:
        tensors[key].fill_(float("nan") if tensors[key].is_floating_point() else -1)
    results = returned(call()) or [tensors[key] for key in outputs]
    if len(results) != len(expected) or not expected:
        raise ValueError(f"the call has {len(results)} results to check, and the reference {len(expected)}")
    errors = [_error(result, right) for result, right in zip(results, expected, strict=True)]
    for result, error in zip(results, errors, strict=True):
        allowed = _TOLERANCE.get(result.dtype, 0.0) if tolerance is None else tolerance
        if not error <= allowed:  # NaN is not
            raise ValueError(
                f"wrong result, relative error {error:.1e}, of which {result.dtype} explains {allowed:.0e}"
            )
    return max(errors)


def _on_copies(call: Call, reference: Callable[..., Any]) -> Any:
    """The reference may write to its arguments, too."""
    copies = {key: tensor.clone() for key, tensor in call.tensors().items()}
    call = call.replaced(copies)
    return reference(*call.args, **call.kwargs)


def _error(result: torch.Tensor, expected: torch.Tensor) -> float:
    if result.shape != expected.shape:
        raise ValueError(f"wrong result, of shape {tuple(result.shape)} instead of {tuple(expected.shape)}")
    exact = expected.double()
    size = float(exact.norm())
    return float((result.double() - exact).norm()) / size if size else float(result.double().norm())
