"""What tests of several modules use: dtypes and tolerances, a reference of the norm, and comparisons."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Relative error over a whole tensor: of one rounding to the dtype, and of float32 arithmetic before it.
TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 3e-3, torch.float32: 1e-6}
# Dtypes of an input and its weight: all that the norms accept.
WEIGHTS = [(d, d) for d in DTYPES] + [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]


def sizes_and_dtypes(sizes: Sequence[int], dtypes: Sequence[tuple[torch.dtype, ...]]) -> pytest.MarkDecorator:
    """Parametrise a test by device, hidden size, dtype and the dtype of the weight.

    On CUDA every size is tested in every pair of dtypes, because both decide how a row is divided among threads. A CPU
    kernel is the same loop for all sizes and each is a build, so there each size has one pair, and each pair a size,
    and those after the third are slow tests.
    """
    count = max(len(sizes), len(dtypes))
    cpu = [
        pytest.param("cpu", sizes[i % len(sizes)], *dtypes[i % len(dtypes)], marks=pytest.mark.slow if i > 2 else ())
        for i in range(count)
    ]
    cuda = [pytest.param("cuda", size, *pair, marks=pytest.mark.gpu) for size in sizes for pair in dtypes]
    return pytest.mark.parametrize(("device", "hidden_size", "dtype", "weight_dtype"), [*cpu, *cuda])


def rmsnorm_reference(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the norm in float64, from its definition."""
    x = input.double()
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight.double()


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the reference, or NaN if either contains one."""
    return float((out.double() - reference).norm() / reference.norm())


def assert_refused(calls, name: str) -> None:
    """Assert that the call of that name raises, with a message of one line.

    `calls` are (name, exception, pattern of the message, call).
    """
    _, kind, pattern, call = next(c for c in calls if c[0] == name)
    with pytest.raises(kind, match=pattern) as caught:
        call()
    assert "\n" not in str(caught.value)


def compiled(function, dynamic: bool = True):
    """Return `function` compiled into one graph, without inductor, after forgetting all earlier graphs."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have the same bytes, NaNs included."""
    a, b = torch.atleast_1d(a, b)
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
