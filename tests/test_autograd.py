"""Gradients, compared with PyTorch's own of a float64 reference; no result is detached without an error."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import relative_error, rmsnorm_reference, same_bits

import jitnorm

EPS = 1e-5
# Rounding of the result, and for the gradients the operator's own float32 arithmetic.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}

NORMS = {"rmsnorm": (jitnorm.rmsnorm, 0.0), "gemma_rmsnorm": (jitnorm.gemma_rmsnorm, 1.0)}
FUSED = {
    "fused_add_rmsnorm": (jitnorm.fused_add_rmsnorm, 0.0),
    "gemma_fused_add_rmsnorm": (jitnorm.gemma_fused_add_rmsnorm, 1.0),
}
norms = pytest.mark.parametrize(("norm", "offset"), NORMS.values(), ids=NORMS)
fused = pytest.mark.parametrize(("fused_add", "offset"), FUSED.values(), ids=FUSED)
dtypes = pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["fp32", "bf16", "bf16_fp32_weight"],
)


def leaf(*shape, device, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()


def double(*tensors):
    """Return leaves of the same values for the reference."""
    return [t.detach().double().requires_grad_() for t in tensors]


def reference_fused_add(x, residual, weight, offset, rounded_to):
    """Return the two results in float64; rounding, if requested, has the gradient of the identity."""
    total = x + residual
    if rounded_to is not None:
        total = total + (total.to(rounded_to).double() - total).detach()
    return rmsnorm_reference(total, weight + offset, EPS), total


def assert_gradients(leaves, references, tolerance):
    for got, want in zip(leaves, references, strict=True):
        assert got.grad.dtype == got.dtype
        assert relative_error(got.grad, want.grad) < tolerance


@norms
@dtypes
def test_gradients_of_input_and_weight(norm, offset, dtype, weight_dtype, device):
    x, w = leaf(3, 7, 512, device=device, dtype=dtype), leaf(512, device=device, dtype=weight_dtype)
    x64, w64 = double(x, w)
    grad = torch.randn(3, 7, 512, device=device).to(dtype)
    norm(x, w, EPS).backward(grad)
    rmsnorm_reference(x64, w64 + offset, EPS).backward(grad.double())
    assert_gradients((x, w), (x64, w64), TOLERANCE[dtype])


@norms
def test_gradients_through_a_strided_view(norm, offset, device):
    qkv, w = leaf(5, 3 * 256, device=device), leaf(256, device=device)
    qkv64, w64 = double(qkv, w)
    grad = torch.randn(5, 256, device=device)
    norm(qkv[:, 256:512], w, EPS).backward(grad)
    rmsnorm_reference(qkv64[:, 256:512], w64 + offset, EPS).backward(grad.double())
    assert_gradients((qkv, w), (qkv64, w64), TOLERANCE[torch.float32])


@norms
@pytest.mark.parametrize("which", ["input", "weight"])
def test_one_argument_with_a_gradient(norm, offset, which, device):
    x, w = leaf(5, 128, device=device), leaf(128, device=device)
    x64, w64 = double(x, w)
    (w if which == "input" else x).requires_grad_(False)
    out = norm(x, w, EPS)
    assert out.requires_grad
    out.square().sum().backward()
    rmsnorm_reference(x64, w64 + offset, EPS).square().sum().backward()
    got, want, other = (x, x64, w) if which == "input" else (w, w64, x)
    assert_gradients([got], [want], TOLERANCE[torch.float32])
    assert other.grad is None


@norms
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_same_bits_with_and_without_gradients(norm, offset, mode, device):
    x, w = leaf(5, 256, device=device), leaf(256, device=device)
    for _ in range(2):  # the first call may have built the kernel
        with mode():
            plain = norm(x, w, EPS)
            in_place = norm(x.detach().clone(), w, EPS, out=torch.empty_like(x))
        out = norm(x, w, EPS)
        assert out.requires_grad and not plain.requires_grad and not in_place.requires_grad
        assert same_bits(out.detach(), plain) and same_bits(plain, in_place)


@norms
@pytest.mark.parametrize("which", ["input", "weight"])
def test_out_with_a_gradient_is_refused(norm, offset, which, device):
    tensors = {name: torch.randn(5, 256, device=device) for name in ("input", "out")}
    tensors["weight"] = torch.randn(256, device=device)
    norm(**tensors)  # so that the fast path has its kernel
    tensors[which].requires_grad_()
    before = tensors["out"].detach().clone()
    with pytest.raises(RuntimeError, match="with out= has no gradient"):
        norm(**tensors)
    assert same_bits(tensors["out"].detach(), before)


@norms
def test_an_out_that_requires_a_gradient_is_data(norm, offset, cache_dir):
    x, w = torch.randn(5, 256), torch.randn(256)
    expected = norm(x, w)
    for _ in range(2):  # the first call of a size takes the slow path, later ones the fast path
        out = torch.full_like(x, torch.nan).requires_grad_()
        assert norm(x, w, out=out) is out and out.is_leaf
        assert same_bits(out.detach(), expected)
        norm(x, w)


@norms
def test_gradients_agree_with_differences(norm, offset, device):
    x, w = leaf(3, 64, device=device), leaf(64, device=device)
    to_scalar, dx, dw = (torch.randn(*shape, device=device) for shape in ((3, 64), (3, 64), (64,)))

    def value(step):
        with torch.no_grad():
            return float((norm(x + step * dx, w + step * dw, EPS).double() * to_scalar).sum())

    (norm(x, w, EPS) * to_scalar).sum().backward()
    slope = float((x.grad.double() * dx).sum() + (w.grad.double() * dw).sum())
    # Steps of 1e-2 and differences of fourth order: 1e-8 of truncation, 1e-5 of float32's rounding.
    h = 1e-2
    differences = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    scale = float(x.grad.norm() * dx.norm() + w.grad.norm() * dw.norm())
    assert abs(slope - differences) < 1e-4 * scale


@norms
def test_second_derivatives(norm, offset, device):
    x, w = leaf(3, 64, device=device), leaf(64, device=device)
    x64, w64 = double(x, w)
    direction = torch.randn(3, 64, device=device)
    (of_x,) = torch.autograd.grad(norm(x, w, EPS).square().sum(), x, create_graph=True)
    (of_x * direction).sum().backward()
    (of_x64,) = torch.autograd.grad(rmsnorm_reference(x64, w64 + offset, EPS).square().sum(), x64, create_graph=True)
    (of_x64 * direction.double()).sum().backward()
    assert_gradients((x, w), (x64, w64), 1e-4)


@pytest.mark.parametrize("op", [jitnorm.silu_and_mul, jitnorm.gelu_and_mul, jitnorm.gelu_tanh_and_mul])
def test_second_derivatives_of_activations(op, device):
    x, direction = torch.randn(3, 32, device=device, requires_grad=True), torch.randn(3, 32, device=device)
    forward = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}.get(
        op.__name__.removesuffix("_and_mul"), partial(torch.nn.functional.gelu, approximate="tanh")
    )
    x64 = x.detach().double().requires_grad_()
    for leaf, out in ((x, op(x)), (x64, forward(x64[:, :16]) * x64[:, 16:])):
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        (grad * direction).sum().backward()
    assert relative_error(x.grad, x64.grad) < 1e-5


def test_torch_func_is_refused(device):
    x, w = torch.randn(3, 64, device=device), torch.randn(64, device=device)
    wide, heads = torch.randn(3, 128, device=device), torch.randn(3, 2, 64, device=device)
    for name, argument, call in (
        ("rmsnorm", x, lambda x: jitnorm.rmsnorm(x, w).sum()),
        ("fused_add_rmsnorm", x, lambda x: jitnorm.fused_add_rmsnorm(y := x * 1, x * 2, w) or y.sum()),
        ("silu_and_mul", wide, lambda x: jitnorm.silu_and_mul(x).sum()),
        ("fused_inplace_qknorm", heads, lambda x: jitnorm.fused_inplace_qknorm(y := x * 1, x * 2, w, w) or y.sum()),
    ):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"^{name} has no derivative in torch.func: use backward"):
                torch.func.grad(call)(argument)


@fused
@pytest.mark.parametrize("round_sum", [False, True])
@dtypes
def test_gradients_of_both_mutated_tensors(fused_add, offset, round_sum, dtype, weight_dtype, device):
    x, r, w = (
        leaf(*s, device=device, dtype=d) for s, d in (((7, 512), dtype), ((7, 512), dtype), ((512,), weight_dtype))
    )
    x64, r64, w64 = double(x, r, w)
    grad, grad_total = (torch.randn(7, 512, device=device).to(dtype) for _ in range(2))
    out, total = x.clone(), r.clone()
    fused_add(out, total, w, EPS, round_sum=round_sum)
    torch.autograd.backward((out, total), (grad, grad_total))
    out64, total64 = reference_fused_add(x64, r64, w64, offset, dtype if round_sum else None)
    torch.autograd.backward((out64, total64), (grad.double(), grad_total.double()))
    assert relative_error(out.detach(), out64.detach()) < TOLERANCE[dtype]
    assert relative_error(total.detach(), total64.detach()) < TOLERANCE[dtype]
    assert_gradients((x, r, w), (x64, r64, w64), TOLERANCE[dtype])


@fused
def test_gradients_beside_a_float32_residual(fused_add, offset, device):
    """The gradient of each tensor has its dtype, and that of the residual is not rounded."""
    x, w = (leaf(*s, device=device, dtype=torch.bfloat16) for s in ((7, 512), (512,)))
    r = leaf(7, 512, device=device)
    x64, r64, w64 = double(x, r, w)
    grad, grad_total = torch.randn(7, 512, device=device).bfloat16(), torch.randn(7, 512, device=device)
    out, total = x.clone(), r.clone()
    fused_add(out, total, w, EPS)
    torch.autograd.backward((out, total), (grad, grad_total))
    out64, total64 = reference_fused_add(x64, r64, w64, offset, None)
    torch.autograd.backward((out64, total64), (grad.double(), grad_total.double()))
    assert total.dtype == torch.float32 and relative_error(total.detach(), total64.detach()) < 1e-7
    assert relative_error(out.detach(), out64.detach()) < TOLERANCE[torch.bfloat16]
    assert_gradients((x, w), (x64, w64), TOLERANCE[torch.bfloat16])
    assert_gradients((r,), (r64,), TOLERANCE[torch.float32])


@fused
@pytest.mark.parametrize("round_sum", [False, True])
def test_layers_that_pass_on_the_mutated_tensors(fused_add, offset, round_sum, device):
    """The next call overwrites what this call wrote, which must not be what its backward reads."""
    x, r = leaf(5, 256, device=device), leaf(5, 256, device=device)
    weights = [leaf(256, device=device) for _ in range(3)]
    x64, r64, *weights64 = double(x, r, *weights)
    hidden, residual = x.clone(), r.clone()
    hidden64, residual64 = x64, r64
    for w, w64 in zip(weights, weights64, strict=True):
        fused_add(hidden, residual, w, EPS, round_sum=round_sum)
        hidden = torch.sin(hidden)
        hidden64, residual64 = reference_fused_add(
            hidden64, residual64, w64, offset, torch.float32 if round_sum else None
        )
        hidden64 = torch.sin(hidden64)
    (hidden + residual).square().sum().backward()
    (hidden64 + residual64).square().sum().backward()
    assert_gradients((x, r, *weights), (x64, r64, *weights64), 1e-5)


@fused
@pytest.mark.parametrize("which", ["input", "residual", "weight"])
@pytest.mark.parametrize("used", ["input", "residual"])
def test_one_argument_of_a_fused_add_with_a_gradient(fused_add, offset, which, used, device):
    leaves = {
        "input": leaf(5, 128, device=device),
        "residual": leaf(5, 128, device=device),
        "weight": leaf(128, device=device),
    }
    references = dict(zip(leaves, double(*leaves.values()), strict=True))
    for name, tensor in leaves.items():
        tensor.requires_grad_(name == which)
    arguments = {name: tensor if name == "weight" else tensor.clone() for name, tensor in leaves.items()}
    fused_add(*arguments.values(), EPS)
    arguments[used].square().sum().backward()
    out64, total64 = reference_fused_add(*references.values(), offset, None)
    (out64 if used == "input" else total64).square().sum().backward()
    want = references[which].grad
    if want is None:  # the residual does not depend on the weight
        assert leaves[which].grad is None or not leaves[which].grad.any()
    else:
        assert_gradients([leaves[which]], [references[which]], TOLERANCE[torch.float32])


@fused
def test_gradients_through_mutated_views(fused_add, offset, device):
    base, r, w = leaf(5, 3 * 256, device=device), leaf(5, 256, device=device), leaf(256, device=device)
    base64, r64, w64 = double(base, r, w)
    hidden, residual = base.clone(), r.clone()
    fused_add(hidden[:, 256:512], residual, w, EPS)
    (hidden.square().sum() + residual.square().sum()).backward()
    out64, total64 = reference_fused_add(base64[:, 256:512], r64, w64, offset, None)
    hidden64 = torch.cat((base64[:, :256], out64, base64[:, 512:]), dim=1)
    (hidden64.square().sum() + total64.square().sum()).backward()
    assert_gradients((base, r, w), (base64, r64, w64), 1e-5)


@fused
@pytest.mark.parametrize("which", ["input", "residual"])
def test_a_leaf_is_not_overwritten(fused_add, offset, which, device):
    tensors = {name: torch.randn(5, 256, device=device) for name in ("input", "residual")}
    tensors[which].requires_grad_()
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with pytest.raises(RuntimeError, match=f"{which} is a leaf that requires grad"):
        fused_add(**tensors, weight=torch.ones(256, device=device))
    for name, tensor in tensors.items():
        assert same_bits(tensor.detach(), before[name])


@fused
def test_overwriting_what_another_backward_needs_is_an_error(fused_add, offset, device):
    x, residual = leaf(5, 256, device=device), torch.randn(5, 256, device=device)
    hidden = x.exp()  # whose backward reads its result
    fused_add(hidden, residual, torch.ones(256, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


@fused
@pytest.mark.parametrize("round_sum", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_fused_add_has_the_same_bits_with_and_without_gradients(fused_add, offset, round_sum, mode, device):
    x, r, w = (leaf(*shape, device=device, dtype=torch.bfloat16) for shape in ((5, 256), (5, 256), (256,)))
    with mode():
        plain = x.clone(), r.clone()
        fused_add(*plain, w, EPS, round_sum=round_sum)
    out = x.clone(), r.clone()
    fused_add(*out, w, EPS, round_sum=round_sum)
    for got, want in zip(out, plain, strict=True):
        assert got.requires_grad and not want.requires_grad
        assert same_bits(got.detach(), want)
