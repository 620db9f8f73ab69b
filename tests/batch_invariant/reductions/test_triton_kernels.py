"""Test the Triton reduction kernels, on a GPU or in Triton's interpreter: see the parent package's `common.py`."""

from __future__ import annotations

import pytest
import torch
from helpers import rmsnorm_reference, same_bits

from ..common import TOLERANCE, TRITON_TEST_DTYPES, empty, random

pytest.importorskip("triton")
from jitnorm.batch_invariant.reductions import triton_kernels


@pytest.mark.parametrize("dtype", TRITON_TEST_DTYPES)
# One element, less than a vector, whole, ragged, and more than a program holds.
@pytest.mark.parametrize("columns", [1, 7, 1024, 1500, 33000])
def test_rows_alone_and_among_others(columns, dtype):
    """Results are compared with float64, and those of a row alone with the same row among others in a program."""
    rows = 9 if columns <= 1024 else 3  # only short rows share a program
    x, weight = random(rows, columns, dtype=dtype), random(columns, dtype=dtype)

    def softmax(x, log):
        out = empty(*x.shape, dtype=dtype)
        triton_kernels.softmax(x, out, log)
        return out

    def mean(x):
        out = empty(x.shape[0], dtype=dtype)
        triton_kernels.mean(x, out)
        return out

    def rms_norm(x):
        out = empty(*x.shape, dtype=dtype)
        triton_kernels.rms_norm(x, weight, 1e-6, out)
        return out

    exact = x.double()
    for call, reference in (
        (lambda x: softmax(x, False), torch.softmax(exact, -1)),
        (lambda x: softmax(x, True), torch.log_softmax(exact, -1)),
        (mean, exact.mean(-1)),
        (rms_norm, rmsnorm_reference(x, weight, 1e-6)),
    ):
        out = call(x)
        assert float((out - reference).abs().max()) <= 2 * TOLERANCE[dtype] * max(1, float(reference.abs().max()))
        assert same_bits(call(x[1:2].clone()), out[1:2])


def test_softmax_of_special_values():
    for columns in (100, 33000):
        x = random(4, columns, dtype=torch.float32)
        x[0, 5], x[1, 7], x[2] = float("nan"), float("inf"), float("-inf")
        x[3, 1:] = float("-inf")
        out = empty(4, columns, dtype=torch.float32)
        triton_kernels.softmax(x, out, False)
        assert out[:3].isnan().all()
        assert out[3, 0] == 1 and not out[3, 1:].any()
