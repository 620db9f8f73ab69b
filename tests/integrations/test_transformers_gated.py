"""patch_transformers recognises gated norms by what they compute: rules, what is refused, transformers' classes."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, same_bits

import jitnorm
from jitnorm import patch_transformers
from jitnorm.core.operators import OPERATORS
from jitnorm.integrations.transformers import explain
from jitnorm.integrations.transformers_gated import GATED_RULES, find_gated_kernels

pytest.importorskip("transformers")

SIZE = 96


class Gated(torch.nn.Module):
    """A gated norm of any rule, with groups."""

    rule = GATED_RULES["gated"]

    def __init__(self, size=SIZE, groups=3, eps=1e-5):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))
        self.groups, self.eps = groups, eps

    def normalise(self, x):
        x = x.unflatten(-1, (self.groups, -1))
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2)

    def forward(self, hidden_states, gate=None):
        rule, dtype = self.rule, hidden_states.dtype
        activated = getattr(F, rule.activation)(gate.float())
        y = self.normalise(hidden_states.float() * (1 if rule.norm_before_gate else activated))
        y = self.weight * y.to(dtype) if rule.rounds_before_end else self.weight.float() * y
        return (y * activated if rule.norm_before_gate else y).to(dtype)


class MyRMSNormGated(Gated):
    """The class that the tests change."""


def gated_class(**attributes):
    return type("MyRMSNormGated", (Gated,), attributes)


def inputs(size=SIZE, dtype=torch.float32, rows=(2, 5)):
    return [torch.randn(*rows, size).to(dtype) for _ in range(2)]


@pytest.mark.parametrize(("size", "groups"), [(3, 1), (96, 3), (300, 3), (4096, 1)])
@pytest.mark.parametrize("rule", GATED_RULES)
def test_each_rule_is_told_from_the_others(rule, size, groups):
    found = find_gated_kernels(gated_class(rule=GATED_RULES[rule])(size, groups), "hf")
    assert found.rule is GATED_RULES[rule] and found.eps_attribute == "eps"
    assert found.group_size == size // groups
    assert found.rounding == ("hf" if rule.endswith("hf") else "once")


@pytest.mark.parametrize("rounding", [pytest.param("once", marks=pytest.mark.slow), "hf"])
@pytest.mark.parametrize("rule", ["gated", "gated_hf", "gate_first_hf", "gated_sigmoid"])
def test_a_patched_norm_computes_the_same(rule, rounding):
    norm = gated_class(rule=GATED_RULES[rule])().bfloat16()
    torch.nn.init.normal_(norm.weight)
    x, gate = inputs(dtype=torch.bfloat16)
    before = norm(x, gate).detach()
    patch = patch_transformers(norm, rounding=rounding)
    assert patch.rules == {"": rule} and patch.replaced == {"": "MyRMSNormGated"}
    for after in (norm(x, gate), norm(hidden_states=x, gate=gate)):
        assert relative_error(after.detach(), before.double()) < 8e-3
        if rounding == "hf" or not rule.endswith("hf"):
            assert float((after == before).float().mean()) > 0.99
    patch.undo()
    assert type(norm).__name__ == "MyRMSNormGated" and same_bits(norm(x, gate).detach(), before)


def test_kernels_run_where_the_dtypes_are_the_same_and_otherwise_the_original(monkeypatch):
    cls = gated_class(rule=GATED_RULES["gate_first_hf"])
    norm = cls()
    torch.nn.init.normal_(norm.weight)
    patch_transformers(norm, strict=True)
    calls, forward = [], Gated.forward
    monkeypatch.setattr(cls, "forward", lambda self, *a: calls.append(a) or forward(self, *a))
    x, gate = inputs()
    kernels = OPERATORS["gated_rmsnorm_gate_first"].functions
    kernels.clear()
    with torch.no_grad():
        norm(x, gate)
    assert not calls and kernels
    for tensors in ((x.bfloat16(), gate), (x, gate.bfloat16()), (x.double(), gate.double()), (x, gate[0])):
        assert same_bits(norm(*tensors).detach(), forward(norm, *tensors).detach())
    assert len(calls) == 4


def test_training():
    norm = gated_class(rule=GATED_RULES["gate_first_hf"])()
    torch.nn.init.normal_(norm.weight)
    x, gate = inputs()

    def gradients():
        leaves = [t.clone().requires_grad_() for t in (x, gate)]
        norm.zero_grad()
        (norm(*leaves) * torch.arange(SIZE)).sum().backward()
        return [leaf.grad for leaf in leaves] + [norm.weight.grad.clone()]

    before = gradients()
    with patch_transformers(norm):
        after = gradients()
    assert all(relative_error(a, b.double()) < 1e-5 for a, b in zip(after, before, strict=True))


def other_groups(self, hidden_states, gate=None):
    return Gated.forward(self, hidden_states.flip(-1), gate)


def by_gelu(self, hidden_states, gate=None):
    return (self.weight * self.normalise(hidden_states.float()) * F.gelu(gate.float())).to(hidden_states.dtype)


def rounded_gate(self, hidden_states, gate=None):
    y = self.weight.float() * self.normalise(hidden_states.float()) * F.silu(gate).float()
    return y.to(hidden_states.dtype)


def writes_gate(self, hidden_states, gate=None):
    out = Gated.forward(self, hidden_states, gate)
    gate.zero_()
    return out


def counts(self, hidden_states, gate=None):
    self.calls = getattr(self, "calls", 0) + 1
    return Gated.forward(self, hidden_states, gate)


NONE = "MyRMSNormGated computes none of the rules of gated norms that jitnorm knows"
WRONG = {
    "other elements": (other_groups, NONE),
    "another activation": (by_gelu, NONE),
    "a rounded activation": (rounded_gate, NONE),
    "no gate": (lambda self, hidden_states, gate=None: self.weight * self.normalise(hidden_states), NONE),
    "a changed gate": (writes_gate, "the forward of MyRMSNormGated changes its input"),
    "state": (counts, "the forward of MyRMSNormGated changes the module"),
    "an error": (
        lambda self, hidden_states, gate=None: gate.missing,
        "the forward of MyRMSNormGated raised AttributeError on random input",
    ),
    "a config": (
        lambda self, hidden_states, gate=None: Gated.forward(self, hidden_states, gate) * self.config.scale,
        "the forward of MyRMSNormGated uses an attribute that is no plain value",
    ),
    "other names": (
        lambda self, x, z=None: Gated.forward(self, x, z),
        "the forward of MyRMSNormGated takes more than the input: z",
    ),
    "a third argument": (
        lambda self, hidden_states, gate, scale=1: Gated.forward(self, hidden_states, gate),
        "the forward of MyRMSNormGated takes more than the input: gate, scale",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_computes_otherwise_is_refused(name):
    forward, reason = WRONG[name]
    norm = gated_class(forward=forward)()
    norm.config = object()
    state, before = dict(vars(norm)), norm.weight.clone()
    patch = patch_transformers(torch.nn.ModuleList([norm, torch.nn.RMSNorm(SIZE)]))
    assert patch.left == {"0": reason} and patch.replaced == {"1": "RMSNorm"}
    assert vars(norm) == state and same_bits(norm.weight.detach(), before.detach())


def test_what_is_not_built_as_a_norm_is_refused():
    norm = gated_class()()
    norm.bias = torch.nn.Parameter(torch.ones(SIZE))
    assert find_gated_kernels(norm) == "MyRMSNormGated has other parameters than a weight: bias"
    compiled = gated_class(forward=torch.compile(Gated.forward, backend="eager"))()
    assert find_gated_kernels(compiled) == "the forward of MyRMSNormGated is compiled"


def test_nothing_of_the_caller_changes():
    numbers, python = torch.get_rng_state(), random.getstate()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert find_gated_kernels(gated_class()()).rule.name == "gated"
    assert torch.equal(torch.get_rng_state(), numbers) and random.getstate() == python


def test_copies_and_the_report():
    model = torch.nn.ModuleDict({"a": MyRMSNormGated(groups=3), "b": MyRMSNormGated(groups=1)})
    x, gate = inputs()
    before = [norm(x, gate).detach() for norm in model.values()]
    assert str(explain(model)).splitlines()[0] == (
        "a: MyRMSNormGated, left: patch_transformers can replace it (rule gated)"
    )
    patch_transformers(model)
    assert explain(model)["a"] == (
        "MyRMSNormGated, patched: one kernel normalises and rounds once "
        "(rule gated: round(n * w * silu(gate)), n = norm(input))"
    )
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for norm, want in zip(twin.values(), before, strict=True):
            assert relative_error(norm(x, gate).detach(), want.double()) < 1e-6
        assert type(twin["a"]) is type(model["a"])
    assert jitnorm.unpatch_transformers(model).keys() == {"a", "b"} and {*map(type, model.values())} == {MyRMSNormGated}


# Classes of transformers, with the arguments of their constructors, by rule.
CLASSES = [
    ("qwen3_next.Qwen3Next", (64,), "gated_hf"),
    ("qwen3_5.Qwen3_5", (64,), "gated_hf"),
    ("olmo_hybrid.OlmoHybrid", (64,), "gated_hf"),
    ("mamba2.Mamba", (192, 64), "gate_first_hf"),
    ("bamba.Bamba", (192, 64), "gate_first_hf"),
    ("zamba2.Zamba2", (192, 64), "gate_first_hf"),
    ("granitemoehybrid.GraniteMoeHybrid", (192, 192), "gate_first_hf"),
    ("nemotron_h.NemotronH", (192, 64), "gate_first_hf"),
    ("falcon_h1.FalconH1", (192, 1e-3, 3, True), "gated"),
    ("falcon_h1.FalconH1", (192, 1e-3, 3, False), "gate_first"),
    ("kimi_linear.KimiLinear", (64,), "gated_sigmoid"),
]


@pytest.mark.parametrize(("name", "arguments", "rule"), CLASSES)
def test_classes_of_transformers(name, arguments, rule):
    folder, _, prefix = name.partition(".")
    module = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}")
    if not hasattr(module, f"{prefix}RMSNormGated"):
        pytest.skip("another version of transformers")
    norm = getattr(module, f"{prefix}RMSNormGated")(*arguments)
    torch.nn.init.normal_(norm.weight)
    norm.bfloat16()
    x, gate = inputs(arguments[0], torch.bfloat16)
    before = norm(x, gate).detach()
    assert patch_transformers(norm, rounding="hf").rules == {"": rule}
    after = norm(x, gate).detach()
    assert float((after == before).float().mean()) > 0.99 and relative_error(after, before.double()) < 4e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_qwen3_next_model(dtype, device):
    """Its gated norms are patched, and take head_v_dim-sized rows."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Qwen3NextConfig"):
        pytest.skip("another version of transformers")
    config = transformers.Qwen3NextConfig(
        **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 32},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "num_experts": 2},
        **{"num_experts_per_tok": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        **{"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2},
        linear_num_value_heads=4,
    )
    model = transformers.Qwen3NextForCausalLM(config).to(dtype).to(device).eval()
    ids = torch.randint(3, 96, (2, 7), device=device)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        patch = patch_transformers(model)
        gated = [name for name, module in model.named_modules() if name.endswith("linear_attn.norm")]
        assert gated and {patch.rules.get(name) for name in gated} == {"gated_hf"}
        after = model(input_ids=ids).logits
    assert relative_error(after, before.double()) < (1e-5 if dtype == torch.float32 else 3e-2)
