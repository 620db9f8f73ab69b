"""jitnorm.layers.apply_qk_norm: which implementation runs where, its result, and what it does not overwrite."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers import relative_error, rmsnorm_reference, same_bits

import jitnorm.layers
from jitnorm.layers import apply_qk_norm, qk_norm, set_compiler
from jitnorm.layers.qk_norm import _reshape_for_qk_norm

D, Q_HEADS, K_HEADS = 64, 4, 2
TOLERANCE = {torch.float16: 8e-4, torch.bfloat16: 6e-3, torch.float32: 1e-6}


class RMSNorm(torch.nn.Module):
    """The norm of inference engines, which also rounds before it multiplies by the weight."""

    def __init__(self, eps=1e-5, size=D, dtype=torch.float32, device="cpu", eps_name="variance_epsilon"):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(size, device=device).to(dtype))
        setattr(self, eps_name, eps)
        self.inputs = []

    def forward(self, x):
        self.inputs.append((x.shape, x.is_contiguous()))
        eps = getattr(self, "variance_epsilon", getattr(self, "eps", None))
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class OnePlusWeight(RMSNorm):
    """A norm with another factor, which many models have under a name of their own."""

    def forward(self, x):
        return super().forward(x) + super().forward(x) / self.weight


def hooked(norm):
    norm.register_forward_hook(lambda module, arguments, out: out * 2)
    return norm


def with_another_forward(norm):
    norm.forward = lambda x, forward=norm.forward: forward(x) * 2
    return norm


@pytest.fixture(autouse=True)
def restore_the_setting():
    torch._dynamo.reset()
    yield
    set_compiler("eager")


@pytest.fixture
def fused_calls(monkeypatch):
    spy = mock.Mock(wraps=qk_norm.fused_inplace_qknorm)
    monkeypatch.setattr(qk_norm, "fused_inplace_qknorm", spy)
    return spy


def projection(*leading, dtype=torch.float32, device="cpu", head_dim=D):
    """Return a fused projection, and its slices q and k."""
    qkv = torch.randn(*leading, (Q_HEADS + 2 * K_HEADS) * head_dim, device=device).to(dtype)
    return qkv, qkv[..., : Q_HEADS * head_dim], qkv[..., Q_HEADS * head_dim : (Q_HEADS + K_HEADS) * head_dim]


def expected(x, norm, eps=1e-5):
    return rmsnorm_reference(x.unflatten(-1, (-1, norm.weight.shape[0])), norm.weight.detach(), eps).flatten(-2)


@torch.no_grad()
@pytest.mark.parametrize("leading", [(7,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["fused", "not in place", "inductor"])
def test_every_implementation_gives_the_same_result(form, dtype, leading, fused_calls, device):
    qkv, q, k = projection(*leading, dtype=dtype, device=device)
    before = qkv.clone()
    q_norm, k_norm = (RMSNorm(dtype=dtype, device=device) for _ in range(2))
    want = expected(q, q_norm), expected(k, k_norm)
    options = {"fused": {}, "not in place": {"allow_inplace": False}, "inductor": {"compiler": "inductor"}}[form]
    got = apply_qk_norm(q, k, q_norm, k_norm, D, **options)
    for a, b, x in zip(got, want, (q, k), strict=True):
        assert a.shape == x.shape and a.dtype == dtype
        assert relative_error(a, b) <= TOLERANCE[dtype]
    assert fused_calls.call_count == (form == "fused")
    if form == "fused":
        assert got[0] is q and got[1] is k and not q_norm.inputs
        before[..., : Q_HEADS * D], before[..., Q_HEADS * D : (Q_HEADS + K_HEADS) * D] = q, k
    assert same_bits(qkv, before)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        {"k_norm": lambda: RMSNorm(eps=1e-3)},
        {"q_norm": lambda: RMSNorm(dtype=torch.bfloat16), "k_norm": lambda: RMSNorm(dtype=torch.bfloat16)},
        {"q_norm": lambda: jitnorm.nn.GemmaRMSNorm(D)},
        {"q_norm": lambda: torch.nn.LayerNorm(D, bias=False), "k_norm": lambda: torch.nn.LayerNorm(D, bias=False)},
        {"q_norm": lambda: torch.nn.RMSNorm(D), "k_norm": lambda: torch.nn.RMSNorm(D)},  # eps of None
        {"q_norm": lambda: torch.nn.RMSNorm(D, 1e-5, elementwise_affine=False)},
        {"q_norm": OnePlusWeight},
        {"k_norm": lambda: hooked(RMSNorm())},
        {"k_norm": lambda: with_another_forward(RMSNorm())},
        {"q": lambda: torch.randn(1, Q_HEADS * D).expand(7, -1)},
        {"q": lambda: torch.randn(Q_HEADS * D, 7).T},
        {"k": lambda: torch.randn(5, K_HEADS * D)},  # of other tokens
        {"k": lambda: torch.randn(7, K_HEADS * D).double(), "k_norm": lambda: RMSNorm(dtype=torch.float64)},
        {"head_dim": lambda: 32, "q_norm": lambda: RMSNorm(size=32), "k_norm": lambda: RMSNorm(size=32)},
    ],
    ids=lambda change: "-".join(change),
)
def test_modules_that_compute_something_else_are_called(change, fused_calls):
    _, q, k = projection(7)
    arguments = {"q": q, "k": k, "q_norm": RMSNorm(), "k_norm": RMSNorm(), "head_dim": D}
    arguments |= {name: make() for name, make in change.items()}
    before = arguments["q"].clone(), arguments["k"].clone()
    got = apply_qk_norm(**arguments)
    for a, x, name in zip(got, before, ("q", "k"), strict=True):
        norm = arguments[f"{name}_norm"]
        want = norm(x.reshape(-1, arguments["head_dim"])).view(x.shape)
        assert same_bits(a, want) and same_bits(arguments[name], x)
    assert not fused_calls.called


@torch.no_grad()
@pytest.mark.parametrize("norm", [RMSNorm, jitnorm.nn.RMSNorm, torch.nn.RMSNorm], ids=lambda norm: norm.__module__)
def test_both_names_of_eps(norm, fused_calls):
    q_norm, k_norm = (RMSNorm(eps_name="eps"), RMSNorm()) if norm is RMSNorm else (norm(D, 1e-5), norm(D, 1e-5))
    _, q, k = projection(7)
    want = expected(q, q_norm), expected(k, k_norm)
    for a, b in zip(apply_qk_norm(q, k, q_norm, k_norm, D), want, strict=True):
        assert relative_error(a, b) <= 1e-6
    assert fused_calls.call_count == 1


def test_gradients_flow_through_the_modules(fused_calls, device):
    qkv, *_ = projection(7, device=device)
    leaf, norms = qkv.requires_grad_(), (RMSNorm(device=device), RMSNorm(device=device))
    q, k = leaf[:, : Q_HEADS * D], leaf[:, Q_HEADS * D : (Q_HEADS + K_HEADS) * D]
    sum(t.sum() for t in apply_qk_norm(q, k, *norms, D)).backward()
    grads = leaf.grad, norms[0].weight.grad, norms[1].weight.grad
    double = leaf.detach().double().requires_grad_()
    weights = [n.weight.detach().double().requires_grad_() for n in norms]
    heads = double.unflatten(-1, (-1, D))
    sum(
        rmsnorm_reference(x, w, 1e-5).sum()
        for x, w in zip((heads[:, :Q_HEADS], heads[:, Q_HEADS : Q_HEADS + K_HEADS]), weights, strict=True)
    ).backward()
    for got, want in zip(grads, (double.grad, weights[0].grad, weights[1].grad), strict=True):
        assert relative_error(got, want) <= 1e-5
    assert not fused_calls.called


@torch.no_grad()
def test_a_model_that_was_patched(fused_calls):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    norm = torch.nn.Sequential(modeling.LlamaRMSNorm(D, 1e-5))
    norm[0].weight.normal_()
    jitnorm.patch_transformers(norm)
    _, q, k = projection(7)
    want = expected(q, norm[0]), expected(k, norm[0])
    for got, exact in zip(apply_qk_norm(q, k, norm[0], norm[0], D), want, strict=True):
        assert relative_error(got, exact) <= 1e-6
    assert fused_calls.call_count == 1


@torch.no_grad()
def test_no_heads():
    q, k = torch.randn(7, Q_HEADS * D), torch.randn(7, 0)
    norm = RMSNorm()
    want = expected(q, norm)
    got, none = apply_qk_norm(q, k, norm, norm, D, allow_inplace=False)
    assert relative_error(got, want) <= 1e-6 and none.shape == (7, 0)


def test_a_stream_is_ignored_on_the_cpu():
    _, q, k = projection(3)
    norms = RMSNorm(), RMSNorm()
    want = expected(q, norms[0]), expected(k, norms[1])
    for a, b in zip(apply_qk_norm(q, k, *norms, D, object(), allow_inplace=False), want, strict=True):
        assert relative_error(a, b) <= 1e-6


@torch.no_grad()
def test_the_setting_and_the_argument(fused_calls):
    _, q, k = projection(3)
    norms = RMSNorm(), RMSNorm()
    for setting, argument, fused in (
        ("eager", None, True),
        ("eager", "inductor", False),
        ("inductor", None, False),
        ("inductor", "eager", True),
    ):
        set_compiler(setting)
        fused_calls.reset_mock()
        apply_qk_norm(q, k, *norms, D, compiler=argument)
        assert fused_calls.called == fused
    with pytest.raises(ValueError, match="compiler must be 'eager', 'inductor' or None for the setting, got 'tvm'"):
        apply_qk_norm(q, k, *norms, D, compiler="tvm")
    for word in ("tvm", None):
        with pytest.raises(ValueError, match=f"compiler must be 'eager' or 'inductor', got {word!r}"):
            set_compiler(word)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(compiler, backend, device):
    qkv, *_ = projection(6, dtype=torch.bfloat16, device=device)
    norms = [jitnorm.nn.RMSNorm(D, 1e-5, device=device, dtype=torch.bfloat16) for _ in range(2)]

    @torch.no_grad()
    def function(qkv):
        q, k = qkv[:, : Q_HEADS * D], qkv[:, Q_HEADS * D : (Q_HEADS + K_HEADS) * D]
        q, k = apply_qk_norm(q, k, *norms, D, compiler=compiler)
        return q + 1, k * 2

    want = function(qkv.clone())
    for a, b in zip(torch.compile(function, fullgraph=True, backend=backend)(qkv), want, strict=True):
        assert relative_error(a, b.double()) < 2e-3


def test_bad_types_are_refused():
    q, norm = torch.randn(2, D), RMSNorm()
    with pytest.raises(TypeError, match=r"q must be a torch\.Tensor, got list"):
        apply_qk_norm([1.0], q, norm, norm, D)
    with pytest.raises(TypeError, match="head_dim must be an int, got str"):
        apply_qk_norm(q, q, norm, norm, "64")


def test_partial_heads_are_refused():
    _, q, k = projection(3)
    for arguments, name in (((q[:, 1:], k), "q"), ((q, k[:, 1:]), "k")):
        with pytest.raises(ValueError, match=rf"{name} must have whole heads of 64 in its last dimension, got \[3, "):
            apply_qk_norm(*arguments, RMSNorm(), RMSNorm(), D)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("norm", [torch.nn.RMSNorm, torch.nn.LayerNorm, jitnorm.nn.GemmaRMSNorm, RMSNorm])
def test_norms_over_another_size_are_refused(norm, backend):
    _, q, k = projection(3)
    good, other = torch.nn.RMSNorm(D, 1e-5), norm(size=32) if norm is RMSNorm else norm(32)
    function = torch.compile(apply_qk_norm, backend=backend) if backend else apply_qk_norm
    for norms, name in (((other, good), "q_norm"), ((good, other), "k_norm")):
        with pytest.raises(ValueError, match=f"{name} must be over head_dim 64, got 32"):
            function(q, k, *norms, D)


@torch.no_grad()
def test_weights_that_are_gathered_or_broadcast_in_the_call():
    """One weight is gathered by a hook, as if sharded; the other is broadcast."""
    _, q, k = projection(3)
    gathered, one = torch.nn.RMSNorm(D, 1e-5), RMSNorm(size=1)
    want = gathered(q.unflatten(-1, (-1, D))).flatten(-2)
    weight, gathered.weight = gathered.weight, torch.nn.Parameter(torch.empty(0))
    gathered.register_forward_pre_hook(lambda module, _: setattr(module, "weight", weight))
    assert same_bits(apply_qk_norm(q, k, gathered, one, D)[0], want)


class ClaimsCuda(torch.Tensor):
    """A tensor on the CPU that claims to be on CUDA, for functions that read only `is_cuda`."""

    is_cuda = True


def test_only_inductor_on_nvidia_gpus_gets_a_view(monkeypatch):
    """Everything else gets a copy of a slice: with a slice's strides the norms of ROCm fault."""
    for cls, hip, compiler, viewed in (
        (ClaimsCuda, None, "inductor", True),
        (ClaimsCuda, None, "eager", False),
        (ClaimsCuda, "6.4", "inductor", False),
        (torch.Tensor, None, "inductor", False),
    ):
        monkeypatch.setattr(torch.version, "hip", hip)
        set_compiler(compiler)
        for leading in ((5,), (5, 3)):
            x = projection(*leading)[1].as_subclass(cls)
            got = _reshape_for_qk_norm(x, D)
            assert same_bits(got.reshape(-1), x.reshape(-1))
            assert got.shape == ((*leading, Q_HEADS, D) if viewed else (got.numel() // D, D))
            assert (got.data_ptr() == x.data_ptr()) == viewed and got.is_contiguous() != viewed


@torch.no_grad()
def test_rocm_has_no_fused_kernel(monkeypatch, fused_calls):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    q, k = (x.as_subclass(ClaimsCuda) for x in projection(5)[1:])
    q_norm, k_norm = RMSNorm(), RMSNorm()
    for got, x, norm in zip(apply_qk_norm(q, k, q_norm, k_norm, D), (q, k), (q_norm, k_norm), strict=True):
        assert relative_error(got.as_subclass(torch.Tensor), expected(x, norm)) <= 1e-6
        assert norm.inputs == [(torch.Size((x.numel() // D, D)), True)]
    assert not fused_calls.called


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("allow_inplace", [True, False])
def test_in_a_graph_the_two_norms_run_side_by_side(allow_inplace):
    norms = [jitnorm.nn.RMSNorm(128, 1e-5, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    qkv, q, k = projection(33, dtype=torch.bfloat16, device="cuda", head_dim=128)
    apply_qk_norm(q, k, *norms, 128, allow_inplace=allow_inplace)  # built
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    before = qkv.clone()
    with torch.cuda.graph(graph), mock.patch.object(torch.cuda, "stream", wraps=torch.cuda.stream) as entered:
        got = apply_qk_norm(q, k, *norms, 128, side, allow_inplace)
    assert entered.called == (not allow_inplace)
    for _ in range(3):
        qkv.copy_(before)
        want = expected(q, norms[0]), expected(k, norms[1])
        graph.replay()
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) <= TOLERANCE[torch.bfloat16]
    qkv.copy_(before)
    with mock.patch.object(torch.cuda, "stream", wraps=torch.cuda.stream) as entered:
        apply_qk_norm(q, k, *norms, 128, side, allow_inplace)
    assert not entered.called  # outside a graph, to fork and join costs more than the norms
