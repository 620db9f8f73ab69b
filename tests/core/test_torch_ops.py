"""The operators as torch.compile sees them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import compiled, relative_error, rmsnorm_reference, same_bits
from torch.fx.experimental.proxy_tensor import make_fx

from jitnorm import (
    fused_add_rmsnorm,
    fused_inplace_qknorm,
    nn,
    rmsnorm,
    rmsnorm_quant_fp8,
    silu_and_mul,
    store_cache,
)
from jitnorm.jit.environment import is_on


def test_compiles_without_a_graph_break(device):
    w = torch.randn(256, device=device)

    def block(x):
        y = rmsnorm(x + 1, w)
        return rmsnorm(y, w, eps=1e-5) * 2

    run = compiled(block)
    for rows in (3, 5, 64):
        x = torch.randn(rows, 256, device=device)
        assert same_bits(run(x), block(x))


def test_written_outputs_are_seen_by_the_compiler(device):
    w = torch.randn(256, device=device)

    def block(x, out):
        rmsnorm(x, w, out=out)
        x = x + out
        rmsnorm(x, w, out=x)
        return x, out + 1

    x, out, expected_out = (torch.randn(7, 256, device=device) for _ in range(3))
    expected = block(x, expected_out)
    result = compiled(block)(x, out)
    for got, want in zip((*result, out), (*expected, expected_out), strict=True):
        assert same_bits(got, want)


def test_a_size_that_is_not_supported_fails_while_tracing(cache_dir):
    with pytest.raises(RuntimeError, match="hidden_size 300: supported are 64, 128, 256 and the multiples"):
        compiled(rmsnorm)(torch.randn(2, 300), torch.ones(300))
    assert not cache_dir.exists()


def test_kernels_are_built_while_tracing(cache_dir):
    with torch._subclasses.FakeTensorMode() as mode:
        torch.ops.jitnorm.rmsnorm(mode.from_tensor(torch.randn(2, 512)), mode.from_tensor(torch.ones(512)))
    assert len(list(cache_dir.glob("kernels/*/*/*.so"))) == 1


def test_opcheck(device):
    x, w = torch.randn(3, 256, device=device), torch.randn(256, device=device)
    torch.library.opcheck(torch.ops.jitnorm.rmsnorm.default, (x, w))
    torch.library.opcheck(torch.ops.jitnorm.rmsnorm_out.default, (x, w, torch.empty_like(x), 1e-5, False))


def test_meta_tensors_are_checked():
    """A bad call on tensors without storage is refused, although the fake implementation could answer it."""
    x, w = torch.randn(4, 64), torch.randn(64)
    for arguments in ((x, w.to("meta")), (x.to("meta"), w), (x.to("meta"), w[:7].to("meta"))):
        with pytest.raises((ValueError, RuntimeError), match="weight must"):
            rmsnorm(*arguments)
    with pytest.raises((ValueError, RuntimeError), match="weight must"):
        fused_add_rmsnorm(x, x.clone(), w.to("meta"))


def test_forward_mode_is_refused_not_lost():
    x, w = torch.randn(4, 64), torch.randn(64)
    with pytest.raises(RuntimeError, match="rmsnorm has no forward-mode derivative"):
        torch.func.jvp(lambda a: rmsnorm(a, w), (x,), (torch.ones_like(x),))
    for call in (lambda a: torch.ops.jitnorm.rmsnorm(a, w), lambda a: torch.ops.jitnorm.silu_and_mul(a)):
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            torch.func.jvp(call, (x,), (torch.ones_like(x),))
    module, residual, tangent = nn.RMSNorm(64), torch.randn(4, 64), torch.randn(4, 64)
    _, got = torch.func.jvp(lambda a: module(a, residual)[0], (x,), (tangent,))  # computed by PyTorch's operators
    total = x.double() + residual.double()
    exact = lambda a: rmsnorm_reference(a, torch.ones(64), torch.finfo(x.dtype).eps)  # noqa: E731
    _, want = torch.func.jvp(exact, (total,), (tangent.double(),))
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize(
    "write",
    [
        lambda x, y: torch.ops.jitnorm.fused_add_rmsnorm(x, y, torch.ones(64)),
        lambda x, y: torch.ops.jitnorm.fused_add_rmsnorm(y, x, torch.ones(64)),
        lambda x, y: torch.ops.jitnorm.silu_and_mul_out(torch.randn(4, 128), y),
    ],
)
def test_operators_in_place_count_versions(write):
    y, leaf = torch.randn(4, 64), torch.randn(4, 64, requires_grad=True)
    product = (leaf * y).sum()
    write(torch.randn(4, 64), y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_windows_one_element_apart():
    """Overlapping windows, whose strides torch.empty_like takes for those of columns."""
    windows, w = torch.randn(600).unfold(0, 512, 1), torch.randn(512)
    expected = rmsnorm_reference(windows, w, 1e-6)
    for norm in (rmsnorm, torch.ops.jitnorm.rmsnorm):
        assert relative_error(norm(windows, w), expected) < 1e-6
    scale = torch.ones(1)
    assert same_bits(rmsnorm_quant_fp8(windows, w, scale)[0], rmsnorm_quant_fp8(windows.contiguous(), w, scale)[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda x: rmsnorm(x, torch.ones(64)),
        lambda x: rmsnorm(torch.randn(4, 64), torch.ones(64), out=x),
        lambda x: fused_add_rmsnorm(x, torch.randn(4, 64), torch.ones(64)),
        lambda x: fused_inplace_qknorm(x.view(4, 1, 64), torch.randn(4, 1, 64), torch.ones(64), torch.ones(64)),
        lambda x: silu_and_mul(x),
        lambda x: rmsnorm_quant_fp8(x, torch.ones(64)),
        lambda x: store_cache(x, torch.randn(4, 64), torch.randn(9, 64), torch.randn(9, 64), torch.arange(4)),
    ],
)
def test_storage_that_was_freed(call):
    call(torch.randn(4, 64))  # so that a kernel is cached
    x = torch.randn(4, 64)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="must have storage"):
        call(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda shifted: rmsnorm_quant_fp8(torch.randn(4, 64), torch.ones(64), shifted(torch.ones(1))),
        lambda shifted: silu_and_mul(torch.randn(4, 64), expert_ids=shifted(torch.zeros(4, dtype=torch.int64))),
        lambda shifted: store_cache(*torch.randn(2, 4, 64), *torch.randn(2, 9, 64), shifted(torch.arange(4))),
    ],
)
def test_views_that_are_not_aligned_to_their_dtype(call):
    def shifted(tensor):
        buffer = bytearray(tensor.nbytes + 1)
        buffer[1:] = tensor.numpy().tobytes()
        return torch.frombuffer(buffer, dtype=tensor.dtype, offset=1)

    call(lambda tensor: tensor)  # so that a kernel is cached
    with pytest.raises(ValueError, match=r"must be aligned to . bytes, got an address of 1 modulo"):
        call(shifted)


def test_numbers_of_numpy(cache_dir):
    """The first call of a size, which builds, accepts the same numbers as the second."""
    eps, one, size = np.float32(1e-6), np.int64(1), np.int32(64)
    x, w = torch.randn(4, 64), torch.randn(64)
    heads = [x.clone().view(4, 1, 64) for _ in range(2)]
    for _ in range(2):
        assert same_bits(rmsnorm(x, w, eps), rmsnorm(x, w, float(eps)))
        silu_and_mul(x, expert_ids=torch.zeros(4, dtype=torch.int64), expert_step=one)
        fused_inplace_qknorm(*heads, w, w, eps, head_dim=size)
        store_cache(x, x.clone(), torch.randn(9, 64), torch.randn(9, 64), torch.arange(4), skip_index=one)
    for bad in (True, np.array(1e-6), "1e-6"):
        with pytest.raises(TypeError, match="eps must be a float"):
            rmsnorm(torch.randn(4, 128), torch.randn(128), bad)


def test_numbers_beyond_a_dtype_or_a_float(cache_dir):
    """A comparison in NumPy's types would overflow for np.uint8(2), and the kernel's for a fraction beyond float."""
    x, w = torch.randn(4, 64), torch.randn(64)
    ids, caches = torch.zeros(4, dtype=torch.int64), (torch.zeros(9, 64), torch.zeros(9, 64))
    two = np.uint8(2)
    for _ in range(2):
        silu_and_mul(x, expert_ids=ids, expert_step=two)
        store_cache(x, x, *caches, torch.arange(4), num_split=two, skip_index=two)
        assert not caches[0][2].any() and same_bits(caches[0][3], x[3])
        assert same_bits(rmsnorm(x, w, Fraction(1, 4)), rmsnorm(x, w, 0.25))
        for huge in (Fraction(10**400), 10**400):
            with pytest.raises(ValueError, match="eps must be a float"):
                rmsnorm(x, w, huge)
        for name, call in (
            ("expert_step", lambda huge: silu_and_mul(x, expert_step=huge)),
            ("skip_index", lambda huge: store_cache(x, x, *caches, torch.arange(4), skip_index=huge)),
        ):
            with pytest.raises(ValueError, match=f"{name} must fit 64 bits"):
                call(np.uint64(2**64 - 1))
    y = x.requires_grad_()  # which needs torch's dispatcher
    assert same_bits(rmsnorm(y, w, Fraction(1, 4)).detach(), rmsnorm(y, w, 0.25).detach())


def test_a_scalar_is_refused_by_the_operators_too():
    scalar, w = torch.tensor(1.0), torch.randn(64)
    ops = torch.ops.jitnorm
    for call in (
        lambda: ops.rmsnorm(scalar, w),
        lambda: ops.gemma_rmsnorm(scalar, w),
        lambda: ops.fused_add_rmsnorm(scalar, scalar.clone(), w),
        lambda: ops.fused_add_rmsnorm_functional(scalar, scalar.clone(), w),
        lambda: ops.silu_and_mul(scalar),
        lambda: ops.per_token_quant_fp8(scalar, scalar.to(torch.float8_e4m3fn), torch.ones(1)),
    ):
        with pytest.raises(ValueError, match="input must have at least one dimension, got a scalar"):
            call()


def test_wrong_objects_are_refused_while_tracing():
    x, w = torch.randn(4, 64), torch.randn(64)
    for call, error, message in (
        (lambda x: rmsnorm(x, None), TypeError, "weight must be a torch.Tensor, got NoneType"),
        (lambda x: rmsnorm([x], w), TypeError, "input must be a torch.Tensor, got list"),
        (lambda x: rmsnorm(x, w, "1"), TypeError, "eps must be a float, got str"),
        (lambda x: fused_add_rmsnorm(x, None, w), TypeError, "residual must be a torch.Tensor, got NoneType"),
        (lambda x: rmsnorm_quant_fp8(x, None), TypeError, "weight must be a torch.Tensor, got NoneType"),
        (lambda x: silu_and_mul(x, expert_step=None), TypeError, "expert_step must be an int, got NoneType"),
        (lambda x: store_cache(x, x, x, x, None), TypeError, "indices must be a torch.Tensor, got NoneType"),
        (lambda x: rmsnorm(x, w, -1), ValueError, "eps must be zero or more, got -1"),
    ):
        with pytest.raises(error, match=f"^{message}$"):
            make_fx(call)(x)
        with pytest.raises(error, match=f"^{message}$"):
            torch.jit.trace(call, (x,), check_trace=False)


@pytest.mark.parametrize(("value", "on"), [("1", True), ("yes", True), ("0", False), ("", False), ("False", False)])
def test_switches(monkeypatch, value, on):
    monkeypatch.setenv("JITNORM_DISABLE_JIT", value)
    assert is_on("JITNORM_DISABLE_JIT") is on
    monkeypatch.delenv("JITNORM_DISABLE_JIT")
    assert not is_on("JITNORM_DISABLE_JIT")


def test_the_operators_count_versions():
    x, w, out = torch.randn(4, 64), torch.randn(64), torch.randn(4, 64)
    leaf = torch.randn(4, 64, requires_grad=True)
    product = (leaf * out).sum()
    torch.ops.jitnorm.rmsnorm_out(x, w, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_first_call_is_seen_by_tracers(cache_dir):
    x, w = torch.randn(4, 64), torch.randn(64)
    graph = torch.jit.trace(lambda a: rmsnorm(a, w), (x,), check_trace=False).graph
    assert "jitnorm::rmsnorm" in str(graph)
