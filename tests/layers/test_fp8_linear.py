"""jitnorm.layers.apply_fp8_linear: how an input is quantised, and the product."""

from __future__ import annotations

import itertools

import pytest
import torch
from fp8_reference import codes, decode, encode, quotient
from helpers import DTYPES, relative_error, same_bits

from jitnorm import rmsnorm_quant_fp8
from jitnorm.layers import apply_fp8_linear, set_compiler

E4M3 = torch.float8_e4m3fn
TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 3e-3, torch.float32: 2e-6}
TENSOR_CORES = 1e-3  # which keep fewer bits of a sum of float8 products than float32 has
IN, OUT = 256, 96


@pytest.fixture(autouse=True)
def eager():
    set_compiler("eager")
    yield
    set_compiler("eager")


def tolerance(dtype, device):
    return TOLERANCE[dtype] + (TENSOR_CORES if device == "cuda" else 0)


def weights(device, by_channel, out_features=OUT):
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(out_features, IN, generator=generator)
    scale = w.abs().amax(dim=1, keepdim=True) / 448 if by_channel else (w.abs().amax() / 448).reshape(1)
    q = encode(quotient(w, scale)).view(E4M3)
    return q.to(device).t(), scale.to(device)


def reference(x, scale, weight, weight_scale, bias=None):
    """In float64, of the codes nearest to `x / scale`."""
    q = decode(encode(quotient(x, scale)).int()) * scale.double()
    out = q @ (decode(codes(weight.t()).int()) * weight_scale.double().reshape(-1, 1)).t()
    return out if bias is None else out + bias.double()


def scale_of(x, by_token):
    largest = x.float().abs().amax(dim=-1, keepdim=True) if by_token else x.float().abs().amax()
    return quotient(largest, torch.tensor(448.0)).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("scaling", ["static", "tensor", "token", "token by flag"])
def test_matches_the_definition(device, dtype, by_channel, scaling):
    weight, weight_scale = weights(device, by_channel)
    for shape, with_bias in (((5, IN), True), ((2, 3, IN), False), ((1, IN), True), ((IN,), False)):
        x = torch.randn(shape).to(dtype).to(device)
        bias = torch.randn(OUT, device=device).to(dtype) if with_bias else None
        given = torch.tensor([0.009], device=device) if scaling == "static" else None
        options = {
            "static": {},
            "token": {},
            "tensor": {"compressed_tensor_quant": True},
            "token by flag": {"compressed_tensor_quant": True, "use_per_token_if_dynamic": True},
        }[scaling]
        out = apply_fp8_linear(x, weight, weight_scale, given, bias, **options)
        assert out.dtype == dtype and out.shape == (*shape[:-1], OUT)
        scale = scale_of(x, scaling.startswith("token")) if given is None else given
        assert relative_error(out, reference(x, scale, weight, weight_scale, bias)) <= tolerance(dtype, device)


def test_inputs_of_any_strides_and_biases_of_another_dtype(device):
    weight, weight_scale = weights(device, by_channel=True, out_features=50)  # which is no multiple of 16
    wide = torch.randn(4, 3, 2 * IN, device=device).bfloat16()
    bias = torch.randn(50, device=device)
    scale = torch.tensor(2.0**-7, device=device)  # whose reciprocal is exact, so that all give the same codes
    columns = torch.randn(IN, 7, device=device).bfloat16().t()
    misaligned = wide.flatten()[1 : 1 + 7 * IN].view(7, IN)
    inputs = wide[..., :IN], wide.transpose(0, 1)[..., IN:], wide[0, :, ::2], columns, misaligned
    for x, quantised_by in itertools.product(inputs, ("token kernel", "static kernel", "PyTorch")):
        static = None if quantised_by == "token kernel" else scale
        compiler = "inductor" if quantised_by == "PyTorch" else "eager"
        out = apply_fp8_linear(x, weight, weight_scale, static, bias, static is not None, compiler=compiler)
        by = scale_of(x, by_token=True) if static is None else scale
        assert relative_error(out, reference(x, by, weight, weight_scale, bias)) <= tolerance(torch.bfloat16, device)


def test_no_tokens(device):
    weight, weight_scale = weights(device, by_channel=False)
    for options in ({}, {"compressed_tensor_quant": True}, {"input_scale": torch.ones(1, device=device)}):
        out = apply_fp8_linear(torch.empty(2, 0, IN, device=device).half(), weight, weight_scale, **options)
        assert out.shape == (2, 0, OUT) and out.dtype == torch.float16


@pytest.mark.parametrize("by_token", [False, True])
def test_an_input_that_is_already_quantised(device, by_token):
    weight, weight_scale = weights(device, by_channel=True)
    x, norm = torch.randn(7, IN, device=device).bfloat16(), torch.ones(IN, device=device).bfloat16()
    q, scale = rmsnorm_quant_fp8(x, norm, None if by_token else torch.tensor(0.01, device=device))
    out = apply_fp8_linear(q, weight, weight_scale, scale)
    exact = (decode(codes(q).int()) * scale.double()) @ (
        decode(codes(weight.t()).int()) * weight_scale.double().reshape(-1, 1)
    ).t()
    assert out.dtype == torch.bfloat16 and relative_error(out, exact) <= tolerance(torch.bfloat16, device)
    columns = codes(q).t().contiguous().view(E4M3).t()
    assert same_bits(apply_fp8_linear(columns, weight, weight_scale, scale), out)


def operators_of(function, *arguments):
    """Return the names of what a graph calls."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    return {str(node.target) for node in graphs[0].graph.nodes if node.op.startswith("call")}


@pytest.mark.slow
def test_the_compiler_decides_what_quantises(device):
    """Plain PyTorch in the one case that inductor can fuse; a kernel in all others."""
    weight, weight_scale = weights(device, by_channel=False)
    x, scale = torch.randn(5, IN, device=device), torch.tensor([0.01], device=device)
    # An argument overrides the setting, so the setting is the other one; without an argument the setting counts.
    cases = [
        (compressed, given, "inductor" if argument == "eager" else "eager", argument)
        for compressed, given, argument in itertools.product((True, False), (scale, None), ("eager", "inductor"))
    ]
    for compressed, given, setting, argument in (*cases, (True, scale, "eager", None), (True, scale, "inductor", None)):
        set_compiler(setting)

        def linear(x, given=given, compressed=compressed, argument=argument):
            return apply_fp8_linear(x, weight, weight_scale, given, None, compressed, compiler=argument)

        plain = compressed and given is not None and (argument or setting) == "inductor"
        names = operators_of(linear, x)
        assert any("jitnorm" in name for name in names) != plain
        assert ("clamp" in " ".join(names)) == plain


def test_pytorch_and_the_kernels_quantise_alike(device):
    """Where no product meets a tie: the reciprocal of a scale that is a power of two is exact."""
    weight, weight_scale = weights(device, by_channel=False)
    x, scale = torch.randn(5, IN, device=device).bfloat16() * 10, torch.tensor([2.0**-6], device=device)
    kernels, plain = (
        apply_fp8_linear(x, weight, weight_scale, scale, None, True, compiler=c) for c in ("eager", "inductor")
    )
    assert same_bits(kernels, plain)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_compiles_without_a_graph_break(device, compiler):
    weight, weight_scale = weights(device, by_channel=False)
    scale = torch.tensor([0.01], device=device)

    def layer(x):
        static = apply_fp8_linear(x, weight, weight_scale, scale, None, True, compiler=compiler)
        return static + apply_fp8_linear(x, weight, weight_scale, compiler=compiler)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 9):
        x = torch.randn(tokens, IN, device=device).bfloat16()
        assert same_bits(compiled(x), layer(x))


def test_bad_arguments_are_refused():
    weight, _ = weights("cpu", by_channel=True)
    x, one = torch.randn(5, IN), torch.ones(1)
    for kind, words, call in (
        (TypeError, "input must be a torch.Tensor, got list", lambda: apply_fp8_linear([1], weight, one)),
        (TypeError, "input must be .* got float64", lambda: apply_fp8_linear(x.double(), weight, one)),
        (TypeError, "weight must be float8_e4m3fn, got float32", lambda: apply_fp8_linear(x, weight.float(), one)),
        (ValueError, r"weight must have shape \[128, out", lambda: apply_fp8_linear(x[:, :128], weight, one)),
        (RuntimeError, "in_features 40: supported", lambda: apply_fp8_linear(x[:, :40], weight[:40], one)),
        (ValueError, "weight must be the transpose of", lambda: apply_fp8_linear(x, weight.contiguous(), one)),
        (TypeError, "weight_scale must be float32", lambda: apply_fp8_linear(x, weight, one.half())),
        (ValueError, "weight_scale must have one element or 96", lambda: apply_fp8_linear(x, weight, torch.ones(3))),
        (ValueError, "input_scale must have one element, got", lambda: apply_fp8_linear(x, weight, one, torch.ones(5))),
        (ValueError, "input_scale must be given", lambda: apply_fp8_linear(x.to(E4M3), weight, one)),
        (ValueError, r"bias must have shape \[96\]", lambda: apply_fp8_linear(x, weight, one, None, torch.ones(95))),
        (ValueError, "compiler must be 'eager'", lambda: apply_fp8_linear(x, weight, one, compiler="xla")),
        (RuntimeError, "has no gradient", lambda: apply_fp8_linear(x.clone().requires_grad_(), weight, one)),
        (RuntimeError, "has no gradient", lambda: apply_fp8_linear(x, weight, one.clone().requires_grad_())),
        (RuntimeError, "has no gradient", lambda: apply_fp8_linear(x, weight, one, one.clone().requires_grad_())),
    ):
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_inductor_fuses_norm_and_quantisation_into_one_kernel():
    """It launches fewer kernels than with a kernel that only quantises."""
    weight, weight_scale = weights("cuda", by_channel=False)
    norm, scale = torch.ones(IN, device="cuda").bfloat16(), torch.tensor([0.01], device="cuda")
    x, residual = (torch.randn(64, IN, device="cuda").bfloat16() for _ in range(2))

    def launches(compiler):
        def layer(x, residual):
            total = x + residual
            y = torch.nn.functional.rms_norm(total, (IN,), norm, 1e-6)
            return apply_fp8_linear(y, weight, weight_scale, scale, None, True, compiler=compiler), total

        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True)
        compiled(x, residual)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            compiled(x, residual)
            torch.cuda.synchronize()
        return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]

    fused, custom = launches("inductor"), launches("eager")
    assert sum("jitnorm" in name or "per_tensor" in name for name in fused) == 0
    assert len(fused) < len(custom), (fused, custom)
