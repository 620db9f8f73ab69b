"""What all tests share: one cache of built kernels for the session, and the skips of gpu and nvcc."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
import torch

# Before anything is built. Tests that are about the cache itself take a folder of their own.
_CACHE = tempfile.mkdtemp(prefix="jitnorm-tests-")
os.environ["JITNORM_CACHE_DIR"] = _CACHE
for name in ("JITNORM_PREBUILT_DIR", "JITNORM_DISABLE_JIT"):
    os.environ.pop(name, None)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch may do at any time

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Relative, over a whole tensor: one rounding to the dtype, and float32's own on the way.
TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 3e-3, torch.float32: 1e-6}
# Dtypes of an input and its weight.
WEIGHTS = [(d, d) for d in DTYPES] + [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from jitnorm.jit.toolchain import find_nvcc

    lacking = {}
    if not torch.cuda.is_available():
        lacking["gpu"] = "no CUDA device"
    if not find_nvcc():
        lacking["nvcc"] = "no nvcc"
    for item in items:
        for marker, why in lacking.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    """An empty cache of the test's own, and an engine that remembers nothing of the session's."""
    import jitnorm.rmsnorm  # noqa: F401
    from jitnorm.jit import load
    from jitnorm.operators import OPERATORS
    from jitnorm.rmsnorm import _jit_rmsnorm_module

    folder = tmp_path / "cache"
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(folder))
    monkeypatch.setattr(load, "_loaded", {})
    monkeypatch.setattr(load, "_failed", {})
    known = [table for operator in OPERATORS for table in (operator.kernels, operator.dispatched, operator.exact)]
    before = [dict(table) for table in known]
    for table in known:
        table.clear()
    _jit_rmsnorm_module.cache_clear()
    yield folder
    for table, content in zip(known, before, strict=True):
        table.clear()
        table.update(content)
    _jit_rmsnorm_module.cache_clear()


def rmsnorm_reference(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In float64, from the definition."""
    x = input.double()
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight.double()


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference; NaN where a NaN is in either."""
    return float((out.double() - reference).norm() / reference.norm())


def assert_refused(calls, name: str) -> None:
    """Of `calls`, (name, exception, words that the message holds, a call), the one of that name is, in one line."""
    _, kind, words, call = next(c for c in calls if c[0] == name)
    with pytest.raises(kind, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def compiled(function, dynamic: bool = True):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = torch.atleast_1d(a, b)
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
