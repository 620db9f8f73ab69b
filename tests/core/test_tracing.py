"""Modules, patched models, layers and dispatch under what traces, transforms or intercepts torch.

Each is called for the first time, when it loads a kernel, and again, on the fast path. A trace runs on other data,
and its result is compared with a float64 reference.
"""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from fp8_reference import codes
from helpers import relative_error, rmsnorm_reference
from operator_calls import forget_kernels
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from jitnorm import dispatch, nn, patch_transformers
from jitnorm.layers import apply_fp8_linear, apply_qk_norm

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")
SIZE = 256


class Mode(TorchDispatchMode):
    """Counts what it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Boxed(torch.Tensor):
    """Implements only PyTorch's own operators. Its storage does not hold its values."""

    @staticmethod
    def __new__(cls, value):
        return torch.Tensor._make_subclass(cls, torch.full_like(value, 7.0))

    def __init__(self, value):
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten"
        args, kwargs = tree_map(lambda v: v.value if isinstance(v, Boxed) else v, (args, kwargs or {}))
        return tree_map(lambda v: Boxed(v) if isinstance(v, torch.Tensor) else v, func(*args, **kwargs))


def patched(name):
    family = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    module = getattr(family, f"{name}RMSNorm")(SIZE, eps=1e-6)
    patch_transformers(module)
    return module


MODULES = {
    "RMSNorm": lambda: nn.RMSNorm(SIZE, eps=1e-6),
    "without weight": lambda: nn.RMSNorm(SIZE, eps=1e-6, elementwise_affine=False),
    "GemmaRMSNorm": lambda: nn.GemmaRMSNorm(SIZE),
    "patched Llama": lambda: patched("Llama"),
    "patched Gemma": lambda: patched("Gemma"),
}
WITH_RESIDUAL = [*MODULES][:3]
modules = pytest.mark.parametrize("name", MODULES)
with_residual = pytest.mark.parametrize("name", WITH_RESIDUAL)
first_and_later = pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
needs_grad = pytest.mark.parametrize("grad", [False, True], ids=["frozen", "grad"])


def prepare(name, warm, grad=False):
    """Return a module with a random weight, whose kernels this process has called before if `warm`."""
    module = MODULES[name]().requires_grad_(grad)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    forget_kernels()
    if warm:
        for _ in range(2):
            module(rows())
            if name in WITH_RESIDUAL:
                module(rows(), rows())
    return module


def rows(count=3):
    return torch.randn(count, SIZE)


def reference(name, module, x):
    weight = torch.ones(SIZE) if name == "without weight" else module.weight.detach()
    return rmsnorm_reference(x, weight.double() + ("Gemma" in name), 1e-6)


def assert_right(name, module, function, *inputs):
    for x in inputs:
        assert relative_error(function(x).detach(), reference(name, module, x)) < 1e-6


@modules
@first_and_later
@needs_grad
def test_jit_trace(name, warm, grad, recwarn):
    """The trace has only PyTorch's operators, so it runs in any shape and strides."""
    module = prepare(name, warm, grad)
    traced = torch.jit.trace(module, (rows(),))
    assert "jitnorm::" not in str(traced.inlined_graph)
    assert_right(name, module, traced, rows(), rows(5), torch.randn(SIZE, 3).t())
    assert not [w for w in recwarn if w.category is torch.jit.TracerWarning]


@modules
@first_and_later
@needs_grad
@pytest.mark.parametrize(
    ("mode", "pre_dispatch"), [("real", False), ("real", True), ("fake", False), ("symbolic", True)]
)
def test_make_fx(name, warm, grad, mode, pre_dispatch):
    module = prepare(name, warm, grad)
    trace = make_fx(module, tracing_mode=mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)
    graph = trace(rows())
    assert "jitnorm." in graph.code
    assert_right(name, module, graph, rows(), rows())


@modules
@first_and_later
@needs_grad
def test_symbolic_trace(name, warm, grad):
    module = prepare(name, warm, grad)
    graph = torch.fx.symbolic_trace(module)
    whole = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Identity(), module))
    for run in (graph, whole, pickle.loads(pickle.dumps(graph))):
        assert_right(name, module, run, rows(), rows(5), torch.randn(SIZE, 3).t())


@first_and_later
def test_symbolic_trace_calls_the_kernels(warm, monkeypatch):
    module, called, normalise = prepare("RMSNorm", warm), [], nn.normalise
    graph = torch.fx.symbolic_trace(module)
    monkeypatch.setattr(nn, "normalise", lambda *a: called.append(a) or normalise(*a))
    graph(rows())
    graph(rows().double())
    assert len(called) == 1


class AllModules(torch.nn.Module):
    """One of each of MODULES, whose kernels this process has called before: an export takes a second."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList([prepare(name, warm=False) for name in MODULES])
        for _ in range(2):
            self(rows())

    def forward(self, x):
        return [module(x) for module in self.parts]

    def assert_right(self, function, *inputs):
        for x in inputs:
            for name, module, out in zip(MODULES, self.parts, function(x), strict=True):
                assert relative_error(out.detach(), reference(name, module, x)) < 1e-6, name


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    modules = AllModules()
    program = torch.export.export(modules, (rows(),), strict=strict)
    assert program.graph_module.code.count("torch.ops.jitnorm.") == len(MODULES)
    for one in (program, program.run_decompositions()):
        modules.assert_right(one.module(), rows(), rows())


@pytest.mark.parametrize("strict", [False, True])
def test_export_for_onnx_has_pytorchs_operators_alone(strict, monkeypatch):
    modules = AllModules()
    monkeypatch.setattr("torch.onnx.is_in_onnx_export", lambda: True)
    program = torch.export.export(modules, (rows(),), strict=strict).run_decompositions()
    assert {node.target.namespace for node in program.graph.nodes if node.op == "call_function"} <= {"aten", "prims"}
    monkeypatch.undo()
    modules.assert_right(program.module(), rows())


@pytest.mark.slow
def test_onnx():
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    modules = AllModules().eval()
    model = torch.onnx.export(modules, (rows(),), dynamo=True, verbose=False).model_proto
    run = ReferenceEvaluator(model)
    modules.assert_right(lambda x: map(torch.tensor, run.run(None, {model.graph.input[0].name: x.numpy()})), rows())


@modules
@first_and_later
def test_fake_tensors_outside_dynamo(name, warm):
    module = prepare(name, warm)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = module(mode.from_tensor(rows()))
    assert out.shape == (3, SIZE) and out.fake_mode is mode
    assert_right(name, module, module, rows())


@modules
@first_and_later
def test_dispatch_modes(name, warm):
    module, x = prepare(name, warm), rows()
    with Mode() as mode:
        out = module(x)
    assert any(name.startswith("jitnorm.") for name in mode.seen)
    assert_right(name, module, lambda _: out, x)


@modules
@first_and_later
@needs_grad
def test_subclasses_with_storage_of_their_own(name, warm, grad):
    module, x = prepare(name, warm, grad), rows()
    assert_right(name, module, lambda x: module(Boxed(x)).value, x)
    if name != "without weight":
        plain = copy.deepcopy(module)
        module.weight = torch.nn.Parameter(Boxed(module.weight.detach()), requires_grad=False)
        out = module(x).value
        assert relative_error(out, reference(name, plain, x)) < 1e-6


@modules
@first_and_later
@needs_grad
def test_function_transforms(name, warm, grad):
    """Compared with the same transform of the definition."""
    module, x = prepare(name, warm, grad), rows()
    definition = lambda x: reference(name, module, x)  # noqa: E731
    assert_right(name, module, lambda x: torch.vmap(module)(x), x)
    assert_right(name, module, lambda x: torch.func.functionalize(module)(x), x)
    for transform in (
        lambda f: torch.func.grad(lambda x: f(x).sin().sum()),
        lambda f: torch.vmap(torch.func.grad(lambda x: f(x).sin().sum())),
        lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1],
        lambda f: torch.func.jacfwd(lambda x: f(x).sum(0)),
    ):
        got, want = transform(module)(x).detach(), transform(definition)(x.double())
        assert relative_error(got, want) < 1e-5
    want = torch.func.jvp(definition, (x.double(),), (x.double().cos(),))
    with forward_ad.dual_level():
        for got, expected in zip(forward_ad.unpack_dual(module(forward_ad.make_dual(x, x.cos()))), want, strict=True):
            assert relative_error(got.detach(), expected) < 1e-5


@modules
def test_a_transform_inside_a_compiled_function(name):
    module, x = prepare(name, warm=True), rows()
    torch._dynamo.reset()
    run = torch.compile(torch.func.grad(lambda x: module(x).sin().sum()), backend="aot_eager", fullgraph=True)
    want = torch.func.grad(lambda x: reference(name, module, x).sin().sum())(x.double())
    assert relative_error(run(x), want) < 1e-5


@modules
@first_and_later
def test_script_is_refused_in_one_line(name, warm):
    module = prepare(name, warm)
    for whole in (module, torch.nn.Sequential(torch.nn.Identity(), module)):
        with pytest.raises(
            RuntimeError, match=r"torch\.jit\.script cannot compile .*: use torch\.jit\.trace"
        ) as raised:
            torch.jit.script(whole)
        assert "\n" not in str(raised.value)
    assert_right(name, module, module, rows())


RESIDUAL_TRACERS = {
    "jit.trace": lambda module, x, r: torch.jit.trace(module, (x, r)),
    "make_fx": lambda module, x, r: make_fx(module)(x, r),
    "make_fx fake": lambda module, x, r: make_fx(module, tracing_mode="fake", _allow_non_fake_inputs=True)(x, r),
    "symbolic_trace": lambda module, x, r: torch.fx.symbolic_trace(module),
    "export": lambda module, x, r: torch.export.export(module, (x, r)).module(),
    "vmap": lambda module, x, r: torch.vmap(module),
    "functionalize": lambda module, x, r: torch.func.functionalize(module),
}


@with_residual
@first_and_later
@needs_grad
@pytest.mark.parametrize("tracer", RESIDUAL_TRACERS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_residual(name, warm, grad, tracer):
    module = prepare(name, warm, grad)
    run = RESIDUAL_TRACERS[tracer](module, rows(), rows())
    for _ in range(2):
        x, residual = rows(), rows()
        total = x.double() + residual.double()
        out, new_residual = run(x, residual)
        assert relative_error(out.detach(), reference(name, module, total)) < 1e-6
        assert relative_error(new_residual.detach(), total) < 1e-6


@with_residual
@first_and_later
def test_a_residual_that_is_a_subclass(name, warm):
    module, x, residual = prepare(name, warm), rows(), rows()
    total = x.double() + residual.double()
    for arguments in ((Boxed(x), Boxed(residual)), (Boxed(x.clone()), residual.clone()), (x.clone(), Boxed(residual))):
        out, new_residual = module(*arguments)
        assert relative_error(out.value, reference(name, module, total)) < 1e-6
        assert relative_error(new_residual.value, total) < 1e-6


@first_and_later
@pytest.mark.parametrize("tracer", ["jit.trace", "make_fx"])
@pytest.mark.filterwarnings("ignore")
def test_a_patched_model(warm, tracer):
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    plain = copy.deepcopy(model).double()
    patch_transformers(model)
    forget_kernels()

    if tracer == "jit.trace":
        first, other = torch.randint(3, 96, (2, 7)), torch.randint(3, 96, (2, 7))
        call = lambda model, ids: model(input_ids=ids, return_dict=False)[0]  # noqa: E731
    else:  # make_fx cannot trace the whole model, because its mask is dynamic
        first, other, angles = torch.randn(2, 7, 64), torch.randn(2, 7, 64), torch.randn(2, 7, 32)

        def call(model, hidden):
            positions = angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)
            return model.model.norm(model.model.layers[0](hidden, position_embeddings=positions))

    if warm:
        call(model, first)
    run = {"jit.trace": lambda f: torch.jit.trace(f, (first,)), "make_fx": lambda f: make_fx(f)(first)}[tracer](
        lambda x: call(model, x)
    )
    want = call(plain, other.double() if other.is_floating_point() else other)
    assert relative_error(run(other), want) < 1e-5


# Layers


def qk(heads=2):
    return torch.randn(3, heads * 64), torch.randn(3, 64)


QK_TRACERS = {
    "jit.trace": lambda f, q, k: torch.jit.trace(f, (q, k)),
    "make_fx": lambda f, q, k: make_fx(f)(q, k),
    "make_fx fake": lambda f, q, k: make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(q, k),
    "make_fx pre-dispatch": lambda f, q, k: make_fx(f, pre_dispatch=True)(q, k),
    "symbolic_trace": lambda f, q, k: torch.fx.symbolic_trace(f),
    "mode": lambda f, q, k: lambda q, k: in_mode(f, q, k),
    "subclass": lambda f, q, k: lambda q, k: [out.value for out in f(Boxed(q), Boxed(k))],
    "vmap": lambda f, q, k: torch.vmap(f),
    "functionalize": lambda f, q, k: torch.func.functionalize(f),
}


def in_mode(function, *arguments):
    with Mode() as mode:
        out = function(*arguments)
    assert mode.seen
    return out


@first_and_later
@needs_grad
@pytest.mark.parametrize("tracer", QK_TRACERS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_qk_norm(warm, grad, tracer):
    norms = torch.nn.ModuleList(nn.RMSNorm(64, eps=1e-6) for _ in range(2)).requires_grad_(grad)
    for norm in norms:
        torch.nn.init.normal_(norm.weight)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = norms

        def forward(self, q, k):
            return apply_qk_norm(q, k, *self.norms, head_dim=64)

    layer = Layer()
    forget_kernels()
    if warm:
        for _ in range(2):
            layer(*qk())
    run = QK_TRACERS[tracer](layer, *qk())
    for _ in range(2):
        given = qk()
        expected = [
            rmsnorm_reference(x.view(3, -1, 64), norm.weight.detach(), 1e-6).flatten(1)
            for x, norm in zip(given, norms, strict=True)
        ]
        for got, want in zip(run(*(x.clone() for x in given)), expected, strict=True):
            assert relative_error(got.detach(), want) < 1e-6


FP8_TRACERS = {
    "jit.trace": lambda f, x: torch.jit.trace(f, (x,)),
    "make_fx": lambda f, x: make_fx(f)(x),
    "make_fx fake": lambda f, x: make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    "symbolic_trace": lambda f, x: torch.fx.symbolic_trace(f),
    "mode": lambda f, x: lambda x: in_mode(f, x),
    "subclass": lambda f, x: lambda x: f(Boxed(x)).value,
    "functionalize": lambda f, x: torch.func.functionalize(f),
}


@first_and_later
@pytest.mark.parametrize("tracer", FP8_TRACERS)
@pytest.mark.parametrize("scaling", ["given", "token", "tensor"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_fp8_linear(warm, tracer, scaling):
    """The result is that of eager mode, except for the order in which the product adds."""
    weight, weight_scale = torch.randn(96, SIZE).to(torch.float8_e4m3fn).t(), torch.tensor([0.01])
    scale = torch.tensor([0.009]) if scaling == "given" else None

    def layer(x):
        return apply_fp8_linear(x, weight, weight_scale, scale, compressed_tensor_quant=scaling == "tensor")

    forget_kernels()
    if warm:
        for _ in range(2):
            layer(rows())
    run = FP8_TRACERS[tracer](layer, rows())
    for _ in range(2):
        x = rows()
        x[1] *= 100  # some codes saturate, and rows have other scales
        assert relative_error(run(x), layer(x).double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_linear_has_the_kernels_codes_where_no_kernel_is_called(dtype, monkeypatch):
    from jitnorm.layers import fp8_linear

    x = torch.cat((torch.randn(7, SIZE), torch.randn(2, SIZE) * 1e4, torch.zeros(2, SIZE))).to(dtype)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, -torch.inf
    results = []
    for may in (True, False):
        monkeypatch.setattr(fp8_linear, "can_call_operators", lambda *_, may=may: may)
        q, scale = fp8_linear._quantise_per_token(x)
        results.append((codes(q), scale, codes(fp8_linear._quantise_static(x, torch.tensor([0.7])))))
    for kernels, plain in zip(*results, strict=True):
        nan = kernels == 0x7F if kernels.dtype == torch.uint8 else kernels.isnan()
        assert torch.equal(kernels[~nan], plain[~nan])
        assert (plain[nan] & 0x7F == 0x7F).all() if kernels.dtype == torch.uint8 else plain[nan].isnan().all()


# Dispatch

DISPATCH_TRACERS = {
    "jit.trace": lambda f, *a: torch.jit.trace(f, a),
    "make_fx": lambda f, *a: make_fx(f)(*a),
    "make_fx fake": lambda f, *a: make_fx(f, tracing_mode="fake")(*a),
    "make_fx pre-dispatch": lambda f, *a: make_fx(f, pre_dispatch=True)(*a),
    "symbolic_trace": lambda f, *a: torch.fx.symbolic_trace(f),
    "mode": lambda f, *a: lambda *a: in_mode(f, *a),
}


@first_and_later
@pytest.mark.parametrize("tracer", DISPATCH_TRACERS)
@pytest.mark.parametrize("backend", ["auto", "auto-fast", "torch"])
@pytest.mark.parametrize("size", [SIZE, 300])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_dispatch(warm, tracer, backend, size):
    def norms(x, w):
        return dispatch.rmsnorm(x, w), dispatch.gemma_rmsnorm(x, w)

    def fused(x, r, w):
        dispatch.fused_add_rmsnorm(x, r, w)
        return x, r

    def make(count):
        return [*(torch.randn(3, size) for _ in range(count)), torch.randn(size)]

    with dispatch.backend(backend):
        forget_kernels()
        if warm:
            for _ in range(2):
                norms(*make(1))
                fused(*make(2))
        run, run_fused = DISPATCH_TRACERS[tracer](norms, *make(1)), DISPATCH_TRACERS[tracer](fused, *make(2))
        for _ in range(2):
            x, w = make(1)
            for got, offset in zip(run(x, w), (0, 1), strict=True):
                assert relative_error(got, rmsnorm_reference(x, w.double() + offset, 1e-6)) < 1e-6
            x, r, w = make(2)
            total = x.double() + r.double()
            out, new_residual = run_fused(x, r, w)
            assert relative_error(out, rmsnorm_reference(total, w, 1e-6)) < 1e-6
            assert relative_error(new_residual, total) < 1e-6


def test_a_recorded_call_in_place_is_not_dead_code():
    def fused(x, r, w):
        dispatch.fused_add_rmsnorm(x, r, w)
        dispatch.gemma_fused_add_rmsnorm(x, r, w)
        return x

    graph = torch.fx.symbolic_trace(fused)
    graph.graph.eliminate_dead_code()
    assert len([node for node in graph.graph.nodes if node.op == "call_function"]) == 2
