"""torch.compile over a block that uses every norm: without a graph break, for every batch, with the eager result.

tests/dispatch/test_compile.py tests that the operators of `jitnorm.dispatch` give the same graphs as these.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

import jitnorm
from jitnorm.core.operators import EXAMPLES, OPERATORS

HEADS, HEAD_DIM, LENGTH = 2, 64, 5
HIDDEN = HEADS * HEAD_DIM
FUSED = ("fused_add_rmsnorm", "gemma_fused_add_rmsnorm")
NORMS = [operator for operator in OPERATORS.values() if operator.binding in ("rmsnorm", "fused_add_rmsnorm")]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def parameters(device):
    shapes = {"qkv": (3 * HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN), "up": (HIDDEN, HIDDEN), "down": (HIDDEN, HIDDEN)}
    matrices = {name: torch.randn(shape, device=device) * HIDDEN**-0.5 for name, shape in shapes.items()}
    sizes = dict.fromkeys(("first", "attention", "mlp", "next", "last"), HIDDEN) | {"q": HEAD_DIM, "k": HEAD_DIM}
    return matrices | {name: torch.randn(size, device=device) for name, size in sizes.items()}


def llama_like(w, x, residual, scratch):
    """Compute a block; x and residual, [batch, length, hidden], are updated in place, and scratch is overwritten."""
    h = jitnorm.rmsnorm(x, w["first"])
    q, k, v = F.linear(h, w["qkv"]).view(*x.shape[:-1], 3 * HEADS, HEAD_DIM).split(HEADS, dim=-2)
    q = jitnorm.rmsnorm(q.reshape(-1, HEAD_DIM), w["q"]).view_as(q)
    k = jitnorm.gemma_rmsnorm(k.contiguous(), w["k"])
    h = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    h = F.linear(h.flatten(-2), w["o"])
    jitnorm.fused_add_rmsnorm(h, residual, w["attention"])
    h = F.linear(F.silu(F.linear(h, w["up"])), w["down"])
    x.add_(h)
    jitnorm.gemma_fused_add_rmsnorm(x, residual, w["mlp"])
    jitnorm.rmsnorm(x, w["next"], 1e-5, out=scratch)
    y = x + scratch  # scratch is used after it was written
    jitnorm.gemma_rmsnorm(y, w["last"], out=y)  # and y in place
    return y, q * 2


def tensors(batch, device):
    return [torch.randn(batch, LENGTH, HIDDEN, device=device) for _ in range(3)]


def assert_eager(function, compiled, arguments, tolerance):
    """Assert that both give the same results, and leave the same in every argument."""
    expected_arguments = [t.clone() for t in arguments]
    expected = (*function(*expected_arguments), *expected_arguments)
    for got, want in zip((*compiled(*arguments), *arguments), expected, strict=True):
        if tolerance:
            assert relative_error(got, want.double()) < tolerance
        else:
            assert same_bits(got, want)


def test_a_block_compiles_without_a_graph_break(device):
    """The second batch size makes torch compile again, with a dynamic batch; the third needs no compilation."""
    w, compiles = parameters(device), CompileCounterWithBackend("aot_eager")

    def block(x, residual, scratch):
        return llama_like(w, x, residual, scratch)

    compiled = torch.compile(block, fullgraph=True, backend=compiles)
    with torch.no_grad():
        for batch in (3, 4, 9, 3):
            assert_eager(block, compiled, tensors(batch, device), 0)
    assert compiles.frame_count == 2


# All sizes are symbolic, or the batch alone. Inductor's own kernels round differently; aot_eager changes no result.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_alone", "backend", "tolerance"), [(False, "aot_eager", 0), (True, "aot_eager", 0), (True, "inductor", 1e-5)]
)
def test_dynamic_shapes_compile_once(batch_alone, backend, tolerance, device):
    w, compiles = parameters(device), CompileCounterWithBackend(backend)

    def block(x, residual, scratch):
        return llama_like(w, x, residual, scratch)

    compiled = torch.compile(block, fullgraph=True, backend=compiles, dynamic=None if batch_alone else True)
    after_first = None
    with torch.no_grad():
        for batch in (3, 64, 2, 7):
            arguments = tensors(batch, device)
            for tensor in arguments if batch_alone else ():
                torch._dynamo.mark_dynamic(tensor, 0)
            assert_eager(block, compiled, arguments, tolerance)
            after_first = after_first or compiles.frame_count
    assert compiles.frame_count == after_first


@pytest.mark.gpu
def test_a_block_in_a_cuda_graph():
    w = parameters("cuda")

    def block(x, residual):  # cudagraphs refuses graphs that write into their inputs
        return llama_like(w, x + 0, residual + 0, torch.empty_like(x))

    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):  # warm-up, capture, replays
            x, residual, _ = tensors(4, "cuda")
            got = [t.clone() for t in compiled(x, residual)]
            for result, want in zip(got, block(x, residual), strict=True):
                assert relative_error(result, want.double()) < 1e-2  # matmuls in another order


@pytest.mark.slow
def test_gradients_of_a_compiled_block(device):
    """No leaf is overwritten here, so that the operators in place have a backward."""

    def block(x, residual, *weights):
        named = dict(zip(names, weights, strict=True))
        h, r = jitnorm.rmsnorm(x, named["first"]), residual * 1
        jitnorm.fused_add_rmsnorm(h, r, named["attention"])
        h = F.linear(h, named["up"])
        jitnorm.gemma_fused_add_rmsnorm(h, r, named["mlp"])
        return jitnorm.gemma_rmsnorm(h + r, named["last"]), r

    w = parameters(device)
    names = [*w]
    x, residual, grad = tensors(3, device)
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)):
        leaves = [t.clone().requires_grad_() for t in (x, residual, *w.values())]
        out, r = function(*leaves)
        torch.autograd.backward((out, r), (grad, grad))
        results.append([out.detach(), r.detach(), *(t.grad for t in leaves if t.grad is not None)])
    assert len(results[0]) == 2 + 2 + 5
    for got, want in zip(*reversed(results), strict=True):
        assert relative_error(got, want.double()) < 1e-5


@pytest.mark.parametrize("op", FUSED)
@pytest.mark.parametrize("round_sum", [False, True])
@pytest.mark.parametrize("backend", [pytest.param("aot_eager", marks=pytest.mark.slow), "inductor"])
def test_writes_are_visible_through_every_view(op, round_sum, backend, device):
    """Functionalisation replaces writes by new tensors, which the base and all views must show."""
    w = torch.randn(64, device=device)

    def function(base, residual):
        left, row = base[:, :64], residual[1]
        before = left + 0, residual + 0
        getattr(jitnorm, op)(left, residual, w, round_sum=round_sum)
        after = base * 2, row * 2, residual[:, ::2] + 1
        getattr(jitnorm, op)(base[:, 64:], residual, w, round_sum=round_sum)
        return *before, *after, base - left.repeat(1, 2), row

    arguments = [torch.randn(5, 128, device=device), torch.randn(5, 64, device=device)]
    # inductor may add and multiply in one instruction, but here has nothing of that kind
    assert_eager(function, torch.compile(function, fullgraph=True, backend=backend), arguments, 0)


@pytest.mark.parametrize("op", FUSED)
def test_the_residuals_dtype_chooses_the_operator(op, device):
    """For a graph too: neither dtype breaks it."""
    w = torch.randn(64, device=device).bfloat16()

    def function(x, residual):
        getattr(jitnorm, op)(x, residual, w)
        return x * 2, residual + 1

    def arguments(residual_dtype):
        return [torch.randn(5, 64, device=device).to(dtype) for dtype in (torch.bfloat16, residual_dtype)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert_eager(function, compiled, arguments(dtype), 0)
    with pytest.raises(RuntimeError, match="residual must be bfloat16, got float16"):
        compiled(*arguments(torch.float16))


@pytest.mark.parametrize("op", ["rmsnorm", "gemma_rmsnorm"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_out_is_visible_through_every_view(op, backend, device):
    w = torch.randn(64, device=device)

    def function(x, buffer):
        before = buffer + 0
        returned = getattr(jitnorm, op)(x, w, out=buffer[:, 64:])
        again = getattr(jitnorm, op)(buffer[:, 64:], w, out=buffer[:, 64:])  # in place
        buffer[:, :64].add_(returned)
        return before, buffer * 2, again + 1

    arguments = [torch.randn(5, 64, device=device), torch.randn(5, 128, device=device)]
    assert_eager(function, torch.compile(function, fullgraph=True, backend=backend), arguments, 0)


def test_views_of_one_buffer_as_input_and_residual(device):
    """Both are columns of one buffer: their rows alternate and do not overlap."""
    w = torch.randn(64, device=device)

    def function(buffer):
        jitnorm.fused_add_rmsnorm(buffer[:, :64], buffer[:, 64:], w)
        return (buffer + 1,)

    assert_eager(
        function,
        torch.compile(function, fullgraph=True, backend="aot_eager"),
        [torch.randn(5, 128, device=device)],
        0,
    )


def test_out_with_a_gradient_fails_while_tracing(device):
    x, w = torch.randn(3, 64, device=device, requires_grad=True), torch.ones(64, device=device)
    compiled = torch.compile(jitnorm.rmsnorm, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="with out= has no gradient"):
        compiled(x, w, out=torch.empty(3, 64, device=device))


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.op)
def test_opcheck(norm, device):
    """Schema, fake implementation, autograd and dynamic shapes agree with what the operator does.

    All norms are registered by the same code. So every kind of argument is tested with one norm of each entry, and the
    others with those that need a gradient.
    """

    def check(name, arguments):
        torch.library.opcheck(getattr(torch.ops.jitnorm, name).default, arguments)

    def rows(*shape):
        return torch.randn(*shape, device=device).bfloat16()

    x, w, strided = rows(3, 5, 64), rows(64), rows(5, 3 * 64)[:, 64:128]
    is_first = norm.op == norm.binding
    if norm.binding == "rmsnorm":
        check(norm.op, (rows(3, 64).requires_grad_(), w.clone().requires_grad_()))
        check(f"{norm.op}_out", (strided, w.float(), rows(5, 128)[:, :64], 1e-5, True))
        if is_first:
            check(norm.op, (x, w))
            check(norm.op, (rows(0, 64), w))
            check(norm.op, (strided, w.float(), 1e-5, False))
            check(norm.op, (x, w.clone().requires_grad_()))
            check(f"{norm.op}_out", (x, w, torch.empty_like(x)))
    else:

        def residual(*shape):
            return rows(*shape).to(norm.residual_dtype)

        check(norm.op, (strided, residual(5, 64), w.float(), 1e-5, False))
        check(f"{norm.op}_functional", [t.requires_grad_() for t in (rows(3, 64), residual(3, 64), rows(64))])
        if is_first:
            check(norm.op, (x, rows(3, 5, 64), w))
            check(f"{norm.op}_functional", (x, rows(3, 5, 64), w))
            check(f"{norm.op}_functional", (strided, rows(5, 64), w.float(), 1e-5, False))
            check(f"{norm.op}_functional", (x, rows(3, 5, 64), w.clone().requires_grad_()))


def test_every_registered_operator_is_checked():
    """The test above checks these forms; the tests of an operator's own file check the others."""
    elsewhere = {
        "jitnorm::fused_inplace_qknorm",
        "jitnorm::qk_norm_rope_store",
        "jitnorm::qk_norm_rope_store_out",
        "jitnorm::store_cache",
        "jitnorm::per_token_quant_fp8",
        *(
            f"jitnorm::{op}{form}"
            for op, example in EXAMPLES.items()
            if example.function.__module__ == "jitnorm.activation"
            for form in ("", "_out")
        ),
        *(
            f"jitnorm::{op}{form}"
            for op in ("general_rmsnorm", "gated_rmsnorm", "dual_rmsnorm")
            for form in ("", "_out")
        ),
        *(f"jitnorm::layernorm{form}" for form in ("", "_out", "_quant_fp8")),
        *(f"jitnorm::general_fused_add_rmsnorm{form}" for form in ("", "_functional")),
        *(
            f"jitnorm::{op}{form}"
            for op in ("rmsnorm_quant_fp8", "fused_add_rmsnorm_quant_fp8", "per_tensor_quant_fp8")
            for form in ("", "_dynamic")
        ),
    }
    forms = {"rmsnorm": ("", "_out"), "fused_add_rmsnorm": ("", "_functional")}
    expected = {f"jitnorm::{norm.op}{form}" for norm in NORMS for form in forms[norm.binding]}
    registered = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("jitnorm::")}
    assert registered - elsewhere == expected
