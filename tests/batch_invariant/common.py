"""What tests of batch-invariant mode share.

Tests of Triton kernels run on a GPU if there is one, otherwise in Triton's interpreter, which tests/conftest.py
enables. It computes tl.dot with numpy, whose order of additions is its own, and supports no bfloat16 in them. So it
shows that results, offsets, ragged ends and strides are right, and for reductions that the schedule does not depend on
the number of rows.
"""

from __future__ import annotations

import torch

# Relative: half a unit in the last place, because a result may be a single number. float32 has sums that nearly cancel.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-5}

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TRITON_TEST_DTYPES = (torch.float16, torch.float32, *((torch.bfloat16,) if GPU else ()))


def random(*shape, dtype=torch.float16):
    """Return random numbers on the device of the kernels."""
    return torch.randn(shape, device=DEVICE).to(dtype)


def empty(*shape, dtype):
    """Return NaNs, of which a kernel that forgets to write an element leaves some."""
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)
