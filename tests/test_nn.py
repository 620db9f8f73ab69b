"""jitnorm.nn: equal to torch.nn.RMSNorm for every call that it accepts; and calls with a residual."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import compiled, relative_error, rmsnorm_reference, same_bits
from references import gated_norm

import jitnorm
from jitnorm import nn

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}
# float16 is a slow test: its kernels are those of bfloat16 with other conversions.
DTYPES = [pytest.param(dtype, marks=pytest.mark.slow if dtype == torch.float16 else ()) for dtype in TOLERANCE]
RESIDUAL_MODULES = [nn.RMSNorm, nn.GemmaRMSNorm]


def twins(*args, **kwargs):
    """Return this package's module and torch's, with the same random weight."""
    ours, theirs = nn.RMSNorm(*args, **kwargs), torch.nn.RMSNorm(*args, **kwargs)
    if theirs.weight is not None:
        torch.nn.init.normal_(theirs.weight)
        ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def randomised(cls, size, **kwargs):
    module = cls(size, **kwargs)
    torch.nn.init.normal_(module.weight)
    return module


def reference(module, x):
    offset = 1.0 if isinstance(module, nn.GemmaRMSNorm) else 0.0
    return rmsnorm_reference(x, module.weight.detach().double() + offset, module.eps)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [256, [256], [300], [1], [3, 128]], ids=str)
def test_values_are_those_of_torch(shape, dtype, eps, affine, device):
    """Sizes with and without a kernel; the input is small, so that eps matters."""
    ours, theirs = twins(shape, eps, affine, device=device, dtype=dtype)
    leading = (2, 5) if shape != [3, 128] else (5,)
    x = (torch.randn(*leading, *ours.normalized_shape, device=device) * 1e-3).to(dtype)
    out, expected = ours(x).detach(), theirs(x).detach()
    assert out.dtype == expected.dtype and out.shape == expected.shape
    assert relative_error(out, expected.double()) < TOLERANCE[dtype]


def test_kernels_are_called(device, monkeypatch):
    called, normalise = [], nn.normalise
    monkeypatch.setattr(nn, "normalise", lambda norm, *a: called.append(norm) or normalise(norm, *a))
    for affine in (True, False):
        nn.RMSNorm(256, elementwise_affine=affine, device=device)(torch.randn(3, 256, device=device))
    nn.RMSNorm(300, device=device)(torch.randn(3, 300, device=device))
    assert called == [jitnorm.rmsnorm] * 3
    nn.RMSNorm(65537, device=device)(torch.randn(3, 65537, device=device))
    assert len(called) == 3


def test_constructor_state_and_text_are_those_of_torch():
    for args in ((256,), ([4, 64], 1e-5), (256, None, False), (torch.Size([7]), 1e-4, True, "cpu", torch.float16)):
        ours, theirs = twins(*args)
        assert isinstance(ours, torch.nn.RMSNorm)
        assert repr(ours) == repr(theirs)
        assert [*ours.state_dict()] == [*theirs.state_dict()]
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        theirs.load_state_dict(ours.state_dict())
        assert ours.eps == theirs.eps and ours.normalized_shape == theirs.normalized_shape
        for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            x = torch.randn(3, *ours.normalized_shape).to(args[4] if len(args) > 4 else torch.float32)
            assert same_bits(module(x), ours(x))
    assert torch.equal(nn.RMSNorm(256).weight, torch.ones(256))


def test_without_a_weight_after_every_conversion():
    """The ones that replace it are neither rounded with the module nor left unwritten."""
    x = torch.randn(3, 256)
    expected = torch.nn.RMSNorm(256, elementwise_affine=False)(x)
    built_on_meta = nn.RMSNorm(256, elementwise_affine=False, device="meta")
    for module in (
        nn.RMSNorm(256, elementwise_affine=False).bfloat16(),
        built_on_meta,  # no tensor to load: torch's module is complete here
        copy.deepcopy(built_on_meta).to_empty(device="cpu"),
    ):
        assert relative_error(module(x), expected.double()) < 1e-6
        assert relative_error(module.double()(x.double()), expected.double()) < 1e-6


@pytest.mark.parametrize("cls", RESIDUAL_MODULES)
def test_strides_that_no_kernel_supports(cls, device):
    module = randomised(cls, 64, eps=1e-6, device=device)
    heads = torch.randn(2, 5, 3 * 64, device=device).view(2, 5, 3, 64).transpose(1, 2)
    fused_qkv = torch.randn(2, 5, 7 * 64, device=device)[..., 64:256].view(2, 5, 3, 64)
    columns = torch.randn(64, 6, device=device).t()
    expanded = torch.randn(1, 64, device=device).expand(5, 64)
    unaligned = torch.randn(3 * 64 + 1, device=device)[1:].view(3, 64)
    for x in (heads, heads[:, :, ::2], fused_qkv, columns, expanded, unaligned, heads[:0], x0 := heads[0, 0, 0]):
        out = module(x).detach()
        assert out.shape == x.shape
        assert same_bits(out, module(x.contiguous().clone()).detach())
        if x.numel():
            assert relative_error(out, reference(module, x)) < 1e-6
    assert module(heads).stride() == heads.stride()
    assert module(x0).dim() == 1


@pytest.mark.parametrize("cls", RESIDUAL_MODULES)
def test_mixed_dtypes(cls, device):
    """A kernel supports float32 weights with bfloat16 inputs, none the converse; the output has the input's dtype."""
    for dtype, weight_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        module = randomised(cls, 256, eps=1e-6, device=device, dtype=weight_dtype)
        x = torch.randn(5, 256, device=device).to(dtype)
        out = module(x).detach()
        assert out.dtype == dtype
        assert relative_error(out, reference(module, x)) < TOLERANCE[dtype]


def test_autocast_gives_what_torch_gives():
    ours, theirs = twins(256)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(5, 256).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = ours(x), theirs(x)
        assert out.dtype == expected.dtype
        assert relative_error(out, expected.double()) < TOLERANCE[dtype]


def test_calls_that_only_torch_can_interpret_are_torchs(device):
    """Nested and sharded tensors, and gradients of torch.func."""
    ours, theirs = (module.to(device) for module in twins(256))
    nested = torch.nested.nested_tensor([torch.randn(n, 256, device=device) for n in (2, 3)], layout=torch.jagged)
    assert same_bits(ours(nested).values(), theirs(nested).values())
    x = torch.randn(3, 256, device=device)
    for what in (torch.func.grad, lambda f: torch.vmap(torch.func.grad(f)), torch.func.jacrev):
        got, want = (what(lambda x, module=module: module(x).square().sum())(x) for module in (ours, theirs))
        assert relative_error(got, want.double()) < 1e-6


def test_sharded_tensors(tmp_path):
    from torch import distributed
    from torch.distributed import tensor as sharded

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = sharded.init_device_mesh("cpu", (1,))
        ours, theirs = twins(256)
        x = sharded.distribute_tensor(torch.randn(4, 256), mesh, [sharded.Shard(0)])
        for module in (ours, theirs):
            weight = sharded.distribute_tensor(module.weight.detach(), mesh, [sharded.Replicate()])
            module.weight = torch.nn.Parameter(weight)
        assert same_bits(ours(x).to_local(), theirs(x).to_local())
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("cls", [nn.RMSNorm, nn.GemmaRMSNorm])
def test_a_bad_eps_is_refused(cls):
    for eps, error, words in (("a", TypeError, "must be a float, got str"), (-1, ValueError, "zero or more, got -1")):
        with pytest.raises(error, match=f"eps {words}" if error is TypeError else words):
            cls(512, eps=eps)


def test_wrong_calls_fail_as_torch_fails(device):
    ours, theirs = twins(256, device=device)
    for x in (torch.randn(3, 128, device=device), torch.randn(3, 256, device=device).long(), torch.tensor(1.0)):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            theirs(x)
        with pytest.raises(expected.type) as raised:
            ours(x)
        assert str(raised.value) == str(expected.value)


def test_gradients_are_those_of_torch(device):
    for affine in (True, False):
        ours, theirs = twins(256, 1e-5, affine, device=device)
        x = torch.randn(5, 256, device=device)
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        grad = torch.randn(5, 256, device=device)
        for module, leaf in zip((ours, theirs), inputs, strict=True):
            module(leaf).backward(grad)
        assert relative_error(inputs[0].grad, inputs[1].grad.double()) < 1e-6
        if affine:
            assert relative_error(ours.weight.grad, theirs.weight.grad.double()) < 1e-6


def test_gemma_multiplies_by_one_plus_the_weight(device):
    module = nn.GemmaRMSNorm(256, device=device)
    assert module.eps == 1e-6 and not module.weight.any() and repr(module) == "GemmaRMSNorm((256,), eps=1e-06)"
    for shape in (256, [300], [3, 64]):
        module = randomised(nn.GemmaRMSNorm, shape, device=device, dtype=torch.bfloat16)
        x = torch.randn(5, *module.normalized_shape, device=device).bfloat16()
        flat, weight = x.flatten(1), module.weight.detach().double().flatten()
        expected = rmsnorm_reference(flat, weight + 1, 1e-6).view_as(x)
        out = module(x)
        assert out.dtype == torch.bfloat16
        assert relative_error(out, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("cls", RESIDUAL_MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [256, 300])
def test_a_residual_is_added_first(cls, dtype, size, device):
    module = randomised(cls, size, eps=1e-6, device=device, dtype=dtype)
    x, r = (torch.randn(35, size, device=device).to(dtype) for _ in range(2))
    total = x.double() + r.double()
    expected = reference(module, total)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out, residual = module(x.clone(), r.clone())
        assert out.dtype == residual.dtype == dtype and out.requires_grad == grad
        # One rounding to bfloat16 is 1.7e-3, and a second, of the sum before it is normalised, would make it 2.3e-3.
        assert relative_error(out.detach(), expected) < (2e-3 if dtype == torch.bfloat16 else 1e-6)
        assert relative_error(residual.detach(), total) < TOLERANCE[dtype]


@pytest.mark.parametrize("cls", RESIDUAL_MODULES)
def test_a_residual_is_updated_in_place_where_no_gradient_is_needed(cls, device):
    module = randomised(cls, 256, eps=1e-6, device=device)
    x, r = torch.randn(5, 256, device=device), torch.randn(5, 256, device=device)
    before = x.clone(), r.clone()
    kept, kept_residual = module(x, r)  # the weight requires a gradient
    assert same_bits(x, before[0]) and same_bits(r, before[1])
    with torch.no_grad():
        out, residual = module(x, r)
    assert out is x and residual is r
    assert same_bits(x, kept.detach()) and same_bits(r, kept_residual.detach())


@pytest.mark.parametrize("cls", RESIDUAL_MODULES)
def test_a_residual_without_an_affine_weight_or_in_odd_strides(cls, device):
    module = randomised(cls, 64, eps=1e-6, device=device).requires_grad_(False)
    plain = nn.RMSNorm(64, eps=1e-6, elementwise_affine=False, device=device)
    for norm, weight in ((module, module.weight), (plain, torch.ones(64, device=device))):
        for shape in ((5, 64), (3, 5, 64), (2, 3, 5, 64)):
            x = torch.randn(*shape, device=device).transpose(0, -2)
            same_layout = torch.randn_like(x)
            expanded = torch.randn(64, device=device).expand(x.shape)
            for residual in (same_layout, expanded):
                total = x.double() + residual.double()
                factor = weight.double() + (norm is module and cls is nn.GemmaRMSNorm)
                out, new_residual = norm(x.clone(), residual)
                assert relative_error(out, rmsnorm_reference(total, factor, 1e-6)) < 1e-6
                assert relative_error(new_residual, total) < 1e-6


@pytest.mark.parametrize("size", [256, 300])
def test_a_residual_of_the_same_memory_or_of_rows_that_overlap(size):
    module, x = nn.RMSNorm(size, 1e-6), torch.randn(5, size)
    with torch.no_grad():
        for residual in (x, x[:]):
            with pytest.raises(ValueError, match="residual must share no memory with"):
                module(x, residual)
        windows = torch.randn(2 * size).unfold(0, size, 2)[:5]
        total = x.double() + windows.double()
        out, new_residual = module(x, windows)
    assert relative_error(out, rmsnorm_reference(total, module.weight, 1e-6)) < 1e-6
    assert relative_error(new_residual, total) < 1e-6


@pytest.mark.parametrize("cls", RESIDUAL_MODULES)
@pytest.mark.parametrize("size", [256, 300])
def test_gradients_with_a_residual(cls, size, device):
    module = randomised(cls, size, eps=1e-6, device=device)
    x, r = (torch.randn(5, size, device=device).requires_grad_() for _ in range(2))
    out, residual = module(x, r)
    (out.square().sum() + residual.sin().sum()).backward()
    x64, r64 = (t.detach().double().requires_grad_() for t in (x, r))
    w64 = module.weight.detach().double().requires_grad_()
    total = x64 + r64
    out64 = rmsnorm_reference(total, w64 + (1 if cls is nn.GemmaRMSNorm else 0), 1e-6)
    (out64.square().sum() + total.sin().sum()).backward()
    for got, want in ((x, x64), (r, r64), (module.weight, w64)):
        assert relative_error(got.grad, want.grad) < 2e-6


@pytest.mark.parametrize("cls", RESIDUAL_MODULES)
@pytest.mark.parametrize("size", [256, 300])
def test_a_residual_that_is_not_like_the_input_is_refused(cls, size):
    """At every size: PyTorch alone would broadcast or promote."""
    module = cls(size).requires_grad_(False)
    x = torch.randn(5, size)
    for residual in (torch.randn(1, size), torch.randn(5, size).bfloat16(), torch.empty(5, size, device="meta")):
        before = x.clone()
        with pytest.raises(ValueError, match="residual must have the shape, dtype and device of x"):
            module(x, residual)
        assert same_bits(x, before)


@pytest.mark.parametrize("cls", RESIDUAL_MODULES)
def test_modules_compile_without_a_graph_break(cls, device):
    torch._dynamo.reset()
    module = randomised(cls, 64, eps=1e-6, device=device).requires_grad_(False)

    def block(x, residual):
        out, residual = module(x * 2, residual + 1)
        heads = module(out.view(-1, 3, 5, 64).transpose(1, 2))
        return heads, residual

    run = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 7, 3):
        x, residual = torch.randn(batch, 15, 64, device=device), torch.randn(batch, 15, 64, device=device)
        before = x.clone(), residual.clone()
        for got, want in zip(run(x, residual), block(x, residual), strict=True):
            assert same_bits(got, want)
        assert same_bits(x, before[0]) and same_bits(residual, before[1])


def test_export_keeps_the_operator():
    program = torch.export.export(nn.RMSNorm(256).requires_grad_(False), (torch.randn(3, 256),))
    assert "jitnorm.rmsnorm" in program.graph_module.code


def gated_twins(size=300, **options):
    """Return a gated norm with a random weight, and its definition in float64."""
    module = randomised(nn.RMSNormGated, size, **options)
    shape = {name: getattr(module, name) for name in ("eps", "group_size", "norm_before_gate", "activation")}
    weight = module.weight.detach()
    return module, lambda x, gate: gated_norm({"input": x, "gate": gate, "weight": weight, **shape})[0]


GATED_OPTIONS = [{}, {"group_size": 100, "norm_before_gate": False}, {"eps": 0.1, "activation": "sigmoid"}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", GATED_OPTIONS, ids=str)
def test_a_gated_norm(options, dtype, device):
    module, expected = gated_twins(device=device, dtype=dtype, **options)
    x, gate = (torch.randn(4, 3, 300, device=device).to(dtype) for _ in range(2))
    out = module(x, gate)
    assert out.dtype == dtype and relative_error(out.detach(), expected(x, gate)) < TOLERANCE[dtype]
    # Strides without a kernel, or with another; and a gate of another dtype.
    for a, b in ((x.transpose(0, 1), gate.transpose(0, 1)), (x.flip(-1).mT.contiguous().mT, gate), (x, gate.float())):
        assert relative_error(module(a, b).detach(), expected(a, b)) < TOLERANCE[dtype]


def test_kernels_compute_gated_norms(device, monkeypatch):
    called, operator = [], nn.gated_rmsnorm
    monkeypatch.setattr(nn, "gated_rmsnorm", lambda *a, **options: called.append(1) or operator(*a, **options))
    module, _ = gated_twins(device=device)
    x = torch.randn(3, 300, device=device)
    module(x, x)
    assert len(called) == 1
    with torch.device("meta"):
        assert nn.RMSNormGated(300)(torch.ones(3, 300), torch.ones(3, 300)).is_meta
    module.double()(x.double(), x.double())
    torch.func.vmap(module.float())(x, x)
    assert len(called) == 1


def test_gradients_of_a_gated_norm(device):
    module, expected = gated_twins(group_size=100, norm_before_gate=False, device=device)
    leaves = [torch.randn(4, 300, device=device).requires_grad_() for _ in range(2)]
    module(*leaves).square().sum().backward()
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected(*doubles).square().sum().backward()
    for leaf, double in zip(leaves, doubles, strict=True):
        assert relative_error(leaf.grad, double.grad) < 1e-5


def test_a_gated_norm_compiles_without_a_graph_break(device):
    module, _ = gated_twins(group_size=100, device=device)
    x, gate = torch.randn(4, 300, device=device), torch.randn(4, 300, device=device)
    assert same_bits(compiled(module)(x, gate).detach(), module(x, gate).detach())
    graph = torch.fx.symbolic_trace(module)
    assert same_bits(graph(x, gate).detach(), module(x, gate).detach())
    assert repr(module) == ("RMSNormGated(300, eps=1e-05, group_size=100, norm_before_gate=True, activation='silu')")
    copied = pickle.loads(pickle.dumps(module))
    assert same_bits(copied(x, gate).detach(), module(x, gate).detach())
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile jitnorm's RMSNormGated"):
        torch.jit.script(module)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group_size": 7}, ValueError, "group_size must divide hidden_size 300, got 7"),
        ({"group_size": 0}, ValueError, "group_size must divide hidden_size 300, got 0"),
        ({"group_size": 1.0}, TypeError, "group_size must be an int, got float"),
        ({"eps": -1.0}, ValueError, "eps must be zero or more"),
        ({"activation": "gelu"}, ValueError, "activation must be 'silu' or 'sigmoid', got 'gelu'"),
        ({"norm_before_gate": None}, TypeError, "norm_before_gate must be True or False, got NoneType"),
    ],
)
def test_bad_options_of_a_gated_norm_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        nn.RMSNormGated(300, **options)


@pytest.mark.parametrize(("x", "gate"), [((4, 80), (4, 80)), ((4, 40), (40,)), ((40,), (4, 40))])
def test_a_gated_norm_of_another_size_is_refused(x, gate):
    with pytest.raises(RuntimeError, match="x and gate must have one shape"):
        nn.RMSNormGated(40)(torch.randn(x), torch.randn(gate))
