"""The layers for the package `kernels`, with that package where it is installed."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import relative_error, rmsnorm_reference, same_bits

from jitnorm.integrations import hub_kernels, transformers_mlp

kernels = pytest.importorskip("kernels", reason="the package kernels is not installed")

SIZE = 128


@pytest.fixture
def calls(monkeypatch):
    """Return the names of what was called: norms, and the products of MLPs."""
    names = []
    for module, function in ((hub_kernels, "normalise"), (transformers_mlp, "side_by_side")):
        original = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *a, original=original, function=function: names.append(function) or original(*a)
        )
    return names


@kernels.use_kernel_forward_from_hub("RMSNorm")
class Norm(torch.nn.Module):
    """As transformers' classes of this name in the mapping."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.randn(size)), eps

    def forward(self, hidden_states):
        return rmsnorm_reference(hidden_states, self.weight, self.variance_epsilon).to(hidden_states.dtype)


@kernels.use_kernel_forward_from_hub("RMSNormZeroCentered")
class ZeroCenteredNorm(torch.nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.randn(size)), eps

    def forward(self, x):
        return rmsnorm_reference(x, self.weight + 1, self.eps).to(x.dtype)


@kernels.use_kernel_forward_from_hub("SwiGLUMLP")
class MLP(torch.nn.Module):
    def __init__(self, size, width, act_fn):
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(size, width, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = torch.nn.Linear(width, size, bias=False), act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def kernelize(model, mode=None, device="cpu"):
    with kernels.use_kernel_mapping(hub_kernels.hub_kernel_mapping(), inherit_mapping=False):
        return kernels.kernelize(model, mode=mode or kernels.Mode.INFERENCE, device=device, use_fallback=False)


@pytest.mark.parametrize("cls", [Norm, ZeroCenteredNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(cls, dtype, calls, device):
    norm = cls(SIZE, 1e-3).to(device, dtype)
    x = torch.randn(3, 5, SIZE, device=device, dtype=dtype) * 0.1
    with torch.no_grad():
        expected = norm(x)
        kernelize(norm, device=device)
        assert same_bits(norm(x), expected) or relative_error(norm(x), expected.double()) < 4e-3
        assert calls
        calls.clear()
        assert norm(x.double()).dtype == torch.float64 and not calls  # no kernel: the original


def test_mlps(calls, device):
    """A second kind of activation has no kernel: the original forward runs."""
    for act_fn, called in ((torch.nn.SiLU(), ["side_by_side"]), (torch.nn.Tanh(), [])):
        mlp, x = MLP(SIZE, 96, act_fn).to(device), torch.randn(3, 5, SIZE, device=device)
        with torch.no_grad():
            expected = copy.deepcopy(mlp).double()(x.double())
            out = kernelize(mlp, device=device)(x)
        assert calls == called and relative_error(out, expected) < 1e-5
        calls.clear()


def test_training_has_gradients():
    """The norm has a kernel with a gradient; the MLP runs its original forward."""
    model = torch.nn.Sequential(Norm(SIZE, 1e-6), MLP(SIZE, 96, torch.nn.SiLU()))
    x, grads = torch.randn(3, SIZE), []
    for is_kernelized in (False, True):
        if is_kernelized:
            kernelize(model, kernels.Mode.TRAINING)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(relative_error(after, before.double()) < 1e-5 for before, after in zip(*grads, strict=True))


def test_compiled():
    torch._dynamo.reset()
    model = torch.nn.Sequential(Norm(SIZE, 1e-6), MLP(SIZE, 96, torch.nn.SiLU()))
    x = torch.randn(3, SIZE)
    with torch.no_grad():
        expected = model(x)
        kernelize(model, kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(x), expected.double()) < 1e-5


def test_use_kernels_of_transformers(calls):
    transformers = pytest.importorskip("transformers")
    from transformers.utils import is_kernels_available

    if not is_kernels_available():
        with pytest.raises(ImportError, match="does not take version"):
            hub_kernels.register_hub_kernels()
        pytest.skip("transformers takes another version of the package kernels")
    config = transformers.Qwen3Config(
        hidden_size=SIZE,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=64,
        num_key_value_heads=1,
        vocab_size=96,
    )
    model, ids = transformers.Qwen3ForCausalLM(config).eval(), torch.randint(3, 96, (2, 7))
    with torch.no_grad():
        expected = model(ids).logits
        hub_kernels.register_hub_kernels()
        hub_kernels.register_hub_kernels()
        try:
            model.use_kernels = True
            assert relative_error(model(ids).logits, expected.double()) < 1e-5
            assert calls == ["normalise"] * (2 * 4 + 1)
        finally:
            hub_kernels.unregister_hub_kernels()
            hub_kernels.unregister_hub_kernels()
        calls.clear()
        again = transformers.Qwen3ForCausalLM(config).eval()
        again.use_kernels = True
        again(ids)
    assert not calls
