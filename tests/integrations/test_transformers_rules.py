"""patch_transformers recognises norms by what they compute: rules, what is refused, and all classes of transformers."""

from __future__ import annotations

import ast
import collections
import copy
import importlib
import pickle
import random
import types
from pathlib import Path

import pytest
import torch
from helpers import TOLERANCE, relative_error, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import jitnorm
from jitnorm import patch_transformers
from jitnorm.integrations import transformers_rules
from jitnorm.integrations.transformers import explain
from jitnorm.integrations.transformers_rules import RULES, recognise

transformers = pytest.importorskip("transformers")

SIZE = 64


class Norm(torch.nn.Module):
    """A norm of rule "once", and the base class of others."""

    def __init__(self, size=SIZE, eps=1e-6):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(size)), eps

    def normalise(self, x):
        return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return (self.normalise(x) * self.weight.float()).to(x.dtype)


def norm_class(forward, name="MyRMSNorm"):
    """Return a class of norms with a forward."""
    return type(name, (Norm,), {"forward": forward})


RIGHT = {
    "once": lambda self, x: Norm.forward(self, x),
    "llama": lambda self, x: self.weight * self.normalise(x).to(x.dtype),
    "gemma": lambda self, x: (self.normalise(x) * (1 + self.weight.float())).type_as(x),
    "gemma_weight": lambda self, x: (self.normalise(x) * (1 + self.weight).float()).type_as(x),
    "gemma_llama": lambda self, x: self.normalise(x).type_as(x) * (1 + self.weight),
}


@pytest.mark.parametrize("size", [3, 64, 300, 4096])
@pytest.mark.parametrize("rule", RIGHT)
def test_each_rule_is_told_from_the_others(rule, size):
    found = recognise(norm_class(RIGHT[rule])(size))
    assert (found.rule, found.eps_attribute, found.reason) == (RULES[rule], "eps", None)


@pytest.mark.parametrize("rule", RIGHT)
def test_training(rule):
    norm, x = norm_class(RIGHT[rule])(), torch.randn(5, SIZE)
    torch.nn.init.normal_(norm.weight)

    def gradients():
        leaf = x.clone().requires_grad_()
        norm.zero_grad()
        (norm(leaf) * torch.arange(SIZE)).sum().backward()
        return leaf.grad, norm.weight.grad.clone()

    before = gradients()
    with patch_transformers(norm) as patch:
        assert patch.rules == {"": rule}
        after = gradients()
    assert all(relative_error(a, b.double()) < 1e-5 for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 0.5])
@pytest.mark.parametrize("name", ["variance_epsilon", "layer_norm_eps", "epsilon"])
def test_every_eps_under_any_name(name, eps):
    class MyRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.steps = torch.nn.Parameter(torch.ones(SIZE)), 7
            setattr(self, name, eps)

        def forward(self, x):
            return torch.nn.functional.rms_norm(x, (SIZE,), self.weight, getattr(self, name))

    found = recognise(MyRMSNorm())
    assert (found.rule, found.eps_attribute) == (RULES["once"], name)


def test_the_eps_that_counts_is_found():
    class MyRMSNorm(Norm):
        def __init__(self):
            super().__init__(eps=1e-3)
            self.other_eps = 1e-6

        def normalise(self, x):
            return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.other_eps)

    assert recognise(MyRMSNorm()).eps_attribute == "other_eps"


@pytest.mark.parametrize("eps", [None, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_rmsnorm(eps, dtype):
    norm = torch.nn.RMSNorm(SIZE, eps=eps, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, SIZE).to(dtype) * 1e-3
    before = norm(x)
    with patch_transformers(norm) as patch:
        assert patch.rules == {"": "once"}
        after = norm(x=x)
    assert relative_error(after.detach(), before.detach().double()) < (1e-6 if dtype == torch.float32 else 4e-3)


def other_eps(self, x):
    x32 = x.float()
    return (x32 / (x32.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.weight.float()).to(x.dtype)


def layer_norm(self, x):
    return torch.nn.functional.layer_norm(x, (SIZE,), self.weight, None, self.eps)


def grouped(self, x):
    n = self.normalise(x.unflatten(-1, (2, -1))).flatten(-2)
    return (n * self.weight.float()).to(x.dtype)


def rounded_rstd(self, x):
    return self.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps).to(x.dtype))


def over_heads(self, x):
    """As the rule for tokens, but other rows for heads."""
    if x.dim() < 4:
        return Norm.forward(self, x)
    variance = x.float().pow(2).mean((-1, -2), keepdim=True)
    return (x.float() * torch.rsqrt(variance + self.eps) * self.weight.float()).to(x.dtype)


def counts(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return Norm.forward(self, x)


def in_place(self, x):
    out = Norm.forward(self, x)
    x.zero_()
    return out


def moves_weight(self, x):
    out = Norm.forward(self, x)
    self.weight.mul_(2)
    return out


NONE = "MyRMSNorm computes none of the rules that jitnorm knows"
WRONG = {
    "eps outside of the root": (other_eps, NONE),
    "LayerNorm": (layer_norm, "MyRMSNorm subtracts the mean, as a LayerNorm does"),
    "groups": (grouped, NONE),
    "other rows": (over_heads, NONE),
    "a fixed eps": (lambda self, x: torch.nn.functional.rms_norm(x, (SIZE,), self.weight, 1e-6), NONE),
    "no weight": (lambda self, x: self.normalise(x).to(x.dtype), NONE),
    "2 + weight": (lambda self, x: (self.normalise(x) * (2 + self.weight.float())).to(x.dtype), NONE),
    "dropout": (lambda self, x: torch.dropout(Norm.forward(self, x), 0.1, self.training), NONE),
    "random": (lambda self, x: torch.dropout(Norm.forward(self, x), 0.1, True), NONE),
    "rounded rstd": (rounded_rstd, "MyRMSNorm rounds elsewhere than the rules that jitnorm knows, in bf16"),
    "float32 results": (
        lambda self, x: self.normalise(x) * self.weight.float(),
        "the forward of MyRMSNorm does not return a tensor of its input's shape and dtype",
    ),
    "a pair": (
        lambda self, x: (Norm.forward(self, x), x),
        "the forward of MyRMSNorm does not return a tensor of its input's shape and dtype",
    ),
    "a gate": (
        lambda self, x, gate=None: Norm.forward(self, x),
        "the forward of MyRMSNorm takes more than the input: gate",
    ),
    "an error": (lambda self, x: x.missing, "the forward of MyRMSNorm raised AttributeError on random input"),
    "state": (counts, "the forward of MyRMSNorm changes the module"),
    "a changed weight": (moves_weight, "the forward of MyRMSNorm changes the module"),
    "a changed input": (in_place, "the forward of MyRMSNorm changes its input"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_computes_otherwise_is_refused(name):
    forward, reason = WRONG[name]
    norm = norm_class(forward)()
    state, before = dict(vars(norm)), norm.weight.clone()
    patch = patch_transformers(torch.nn.ModuleList([norm, torch.nn.RMSNorm(SIZE)]))
    assert patch.left == {"0": reason} and patch.replaced == {"1": "RMSNorm"}
    assert vars(norm) == state and same_bits(norm.weight.detach(), before.detach())


def with_changes(**changes):
    norm = Norm()
    for name, value in changes.items():
        setattr(norm, name, value)
    return norm


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (with_changes(bias=torch.nn.Parameter(torch.ones(SIZE))), "Norm has other parameters than a weight: bias"),
        (with_changes(child=torch.nn.Identity()), "Norm has child modules"),
        (with_changes(eps=torch.tensor(1e-6)), "Norm has no float attribute for eps"),
        (with_changes(eps=1), "Norm has no float attribute for eps"),
        (
            with_changes(weight=torch.nn.Parameter(torch.ones(2, 4))),
            "Norm has no one-dimensional torch.nn.Parameter weight",
        ),
        (
            with_changes(weight=torch.nn.Parameter(torch.ones(0))),
            "Norm has no one-dimensional torch.nn.Parameter weight",
        ),
    ],
)
def test_what_is_not_built_as_a_norm_is_refused(norm, reason):
    assert recognise(norm).reason == reason


@pytest.mark.parametrize(
    "use",
    [
        lambda config: config.scale,
        lambda config: config["scale"],
        lambda config: config(),
        lambda config: 1 if config else 2,
        lambda config: torch.ones(SIZE) * config,
    ],
)
def test_a_config_may_be_kept_but_not_used(use):
    """A probe must not share it with the module, since the forward could change it."""
    norm = with_changes(config=object())
    assert recognise(norm).rule is RULES["once"]
    using = norm_class(lambda self, x: Norm.forward(self, x) * use(self.config))()
    using.config = object()
    reason = recognise(using).reason
    assert reason in (
        "the forward of MyRMSNorm uses an attribute that is no plain value",
        "the forward of MyRMSNorm raised TypeError on random input",
    )


def test_a_compiled_forward_is_refused():
    """It would be compiled for each probe."""
    norm = norm_class(torch.compile(RIGHT["llama"], backend="eager"))()
    assert recognise(norm).reason == "the forward of MyRMSNorm is compiled"


def test_buffers_are_refused():
    norm = norm_class(RIGHT["llama"])()
    norm.register_buffer("scale", torch.ones(SIZE))
    with pytest.warns(RuntimeWarning, match=r"MyRMSNorm has buffers: scale \(1 module\)"):
        patch_transformers(norm)


@pytest.mark.parametrize("mode", ["plain", "fake", "meta", "default dtype", "inference", "autocast"])
def test_nothing_of_the_model_or_the_caller_changes_or_matters(mode):
    seen = []
    norm = norm_class(RIGHT["llama"])().train()
    norm.register_forward_hook(seen.append)
    contexts = {
        "fake": FakeTensorMode,
        "meta": lambda: torch.device("meta"),
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    state, numbers, weight = dict(vars(norm)), torch.get_rng_state(), norm.weight.detach().clone()
    python = random.getstate()
    if mode == "default dtype":
        torch.set_default_dtype(torch.bfloat16)
    try:
        if mode in contexts:
            with contexts[mode]():
                found = recognise(norm)
        else:
            found = recognise(norm)
    finally:
        torch.set_default_dtype(torch.float32)
        handle.remove()
    assert found.rule is RULES["llama"] and not seen
    assert vars(norm) == state and norm.training and torch.equal(norm.weight, weight) and norm.weight.grad is None
    assert torch.equal(torch.get_rng_state(), numbers) and random.getstate() == python


def test_a_class_is_probed_once_for_each_size_and_attributes(monkeypatch):
    probed, probe = [], transformers_rules._probe
    monkeypatch.setattr(transformers_rules, "_probe", lambda *a: probed.append(a) or probe(*a))
    cls = norm_class(RIGHT["llama"])
    model = torch.nn.ModuleList([cls(), cls(), cls(128), cls(eps=1e-5), cls()])
    assert len(patch_transformers(model).replaced) == 5 and len(probed) == 3
    patch_transformers(torch.nn.ModuleList([cls()]))
    explain(torch.nn.ModuleList([cls()]))
    assert len(probed) == 3
    cls.forward = RIGHT["gemma"]  # as libraries do that patch classes
    assert recognise(cls()).rule is RULES["gemma"] and len(probed) == 4


def test_modules_of_one_class_may_have_different_rules():
    class MyRMSNorm(Norm):
        def __init__(self, offset):
            super().__init__()
            self.offset = offset

        def forward(self, x):
            return (self.normalise(x) * (self.offset + self.weight.float())).to(x.dtype)

    globals()["MyRMSNorm"], MyRMSNorm.__qualname__ = MyRMSNorm, "MyRMSNorm"  # for pickle
    model = torch.nn.ModuleList([MyRMSNorm(0), MyRMSNorm(1), MyRMSNorm(2)])
    x = torch.randn(3, SIZE)
    before = [norm(x).detach() for norm in model]
    patch = patch_transformers(model)
    assert patch.rules == {"0": "once", "1": "gemma"} and patch.left == {"2": NONE}
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for norm, want in zip(twin, before, strict=True):
            assert relative_error(norm(x).detach(), want.double()) < 1e-6
        assert type(twin[0]) is type(model[0])
    assert jitnorm.unpatch_transformers(model) == patch.replaced and {*map(type, model)} == {MyRMSNorm}


def test_report():
    model = torch.nn.ModuleDict({"a": norm_class(RIGHT["llama"])(), "b": norm_class(layer_norm, "MyLayerNorm")()})
    reason = "left, MyLayerNorm subtracts the mean, as a LayerNorm does"
    assert str(explain(model)).splitlines() == [
        "a: MyRMSNorm, left: patch_transformers can replace it (rule llama)",
        f"b: MyLayerNorm, {reason.replace(',', ':', 1)}",
    ]
    assert repr(patch_transformers(model)).splitlines()[1:] == ["  a: MyRMSNorm (rule llama)", f"  b: {reason}"]
    assert explain(model)["a"] == (
        "MyRMSNorm, patched: one kernel normalises and rounds once (rule llama: round(round(n) * w))"
    )


def test_named_rules():
    class Scaled(Norm):
        """Without "norm" in its name, and with a config that it uses."""

        def __init__(self):
            super().__init__()
            self.config = types.SimpleNamespace(scale=1.0)

        def forward(self, x):
            return super().forward(x) * self.config.scale

    rounds = norm_class(rounded_rstd)
    unknown = norm_class(lambda self, x: x.missing)
    model = torch.nn.ModuleList([Scaled(), rounds(), unknown(), norm_class(RIGHT["gemma"])()])
    assert patch_transformers(copy.deepcopy(model)).rules == {"3": "gemma"}
    with patch_transformers(model, classes={Scaled: "once", rounds: "llama", unknown: "gemma_llama"}) as patch:
        assert patch.rules == {"0": "once", "1": "llama", "2": "gemma_llama", "3": "gemma"} and not patch.left
        assert explain(model)["0"].startswith("Scaled, patched: one kernel normalises")
        x = torch.randn(3, SIZE)
        assert relative_error(model[2](x).detach(), 2 * model[0](x).detach().double()) < 1e-6
    assert type(model[0]) is Scaled


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ([Norm], TypeError, "classes must be a dict from module classes to rules, got list"),
        ({"Norm": "once"}, TypeError, "classes must have classes of torch.nn.Module as keys, got 'Norm'"),
        ({int: "once"}, TypeError, "classes must have classes of torch.nn.Module as keys, got <class 'int'>"),
        (
            {Norm: "Llama"},
            ValueError,
            "classes[Norm] must be one of 'once', 'llama', 'gemma', 'gemma_weight', 'gemma_llama', got 'Llama'",
        ),
        (
            {Norm: 1.0},
            ValueError,
            "classes[Norm] must be one of 'once', 'llama', 'gemma', 'gemma_weight', 'gemma_llama', got 1.0",
        ),
        (
            {Norm: "gemma"},
            ValueError,
            "classes[Norm] must be a rule that Norm computes, got 'gemma': on random input it does not compute "
            "round(n * (1 + w))",
        ),
    ],
)
def test_bad_classes_are_refused(classes, error, message):
    model = torch.nn.ModuleList([torch.nn.RMSNorm(SIZE), Norm()])
    with pytest.raises(error) as raised:
        patch_transformers(model, classes=classes)
    assert str(raised.value) == message and [type(m) for m in model] == [torch.nn.RMSNorm, Norm]


@pytest.mark.parametrize("name", ["a pair", "state", "float32 results", "LayerNorm", "a changed input"])
def test_a_rule_cannot_be_named_for_what_is_no_rmsnorm(name):
    cls = norm_class(WRONG[name][0])
    with pytest.raises(ValueError, match=r"must be a rule that MyRMSNorm computes, got 'once'"):
        patch_transformers(cls(), classes={cls: "once"})


# Classes of transformers, by the folder of their model.
KNOWN = {
    "llama": [
        "llama.Llama",
        "mistral.Mistral",
        "qwen3.Qwen3",
        "glm4.Glm4",
        "deepseek_v3.DeepseekV3",
        "smollm3.SmolLM3",
    ],
    "once": ["gpt_oss.GptOss", "olmo2.Olmo2", "olmo3.Olmo3", "gemma3n.Gemma3n", "nemotron_h.NemotronH"],
    "gemma": ["gemma.Gemma", "gemma3.Gemma3", "qwen3_next.Qwen3Next", "t5gemma.T5Gemma"],
}
KNOWN["llama"] += ["granite.Granite", "qwen2_vl.Qwen2VL", "qwen2_5_vl.Qwen2_5_VL"]


def class_of(name):
    folder, _, cls = name.partition(".")
    return getattr(pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}"), cls)


@pytest.mark.parametrize(
    ("name", "rule"), [(f"{name}RMSNorm", rule) for rule, names in KNOWN.items() for name in names]
)
def test_known_classes_of_transformers(name, rule):
    """Each computes the same to within its roundings, with a kernel."""
    norm = class_of(name)(SIZE, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, SIZE) * 0.1
    before = norm(x)
    assert patch_transformers(norm).rules == {"": rule}
    assert relative_error(norm(x).detach(), before.detach().double()) < 1e-6


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cohere.CohereLayerNorm", "CohereLayerNorm subtracts the mean, as a LayerNorm does"),
        ("nemotron.NemotronLayerNorm1P", "NemotronLayerNorm1P has other parameters than a weight: bias"),
        (  # it rounds the reciprocal root
            "deepseek_v4.DeepseekV4UnweightedRMSNorm",
            "DeepseekV4UnweightedRMSNorm rounds elsewhere than the rules that jitnorm knows, in bf16",
        ),
    ],
)
def test_classes_of_transformers_that_are_left(name, reason):
    norm = class_of(name)(1e-6 if "Unweighted" in name else SIZE)
    with pytest.warns(RuntimeWarning):
        assert patch_transformers(norm).left == {"": reason}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("llama4.Llama4TextL2Norm", {}),
        ("nanochat.NanoChatRMSNorm", {}),
        ("gemma3n.Gemma3nRMSNorm", {"dim": SIZE, "with_scale": False}),
    ],
)
def test_classes_without_a_weight(name, arguments):
    """They take rows of any size."""
    norm = class_of(name)(eps=1e-3, **arguments)
    original, inputs = type(norm), [torch.randn(3, 5, size) * 0.1 for size in (SIZE, 1, 77)]
    before = [norm(x) for x in inputs]
    with patch_transformers(norm) as patch:
        assert patch.rules == {"": "once"}
        for x, expected in zip(inputs, before, strict=True):
            assert relative_error(norm(x), expected.double()) < 1e-6
        half = torch.randn(3, 5, SIZE).bfloat16()
        assert relative_error(norm(half), reference_without_weight(half, 1e-3)) < TOLERANCE[torch.bfloat16]
        for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            assert same_bits(copied(half), norm(half))
        x = half.float().requires_grad_()
        (norm(x) * torch.arange(SIZE)).sum().backward()
        y = x.detach().double().requires_grad_()
        (reference_without_weight(y, 1e-3) * torch.arange(SIZE)).sum().backward()
        assert relative_error(x.grad, y.grad) < 1e-5
    assert type(norm) is original and same_bits(norm(inputs[0]), before[0])


def test_a_norm_of_torch_without_a_weight():
    """It takes rows of one size alone."""
    norm, x = torch.nn.RMSNorm(SIZE, eps=1e-3, elementwise_affine=False), torch.randn(3, SIZE)
    with patch_transformers(norm) as patch:
        assert patch.rules == {"": "once"}
        assert relative_error(norm(x), reference_without_weight(x, 1e-3)) < 1e-6
        with pytest.raises(RuntimeError, match="normalized_shape"):
            norm(torch.randn(3, 2 * SIZE))


def reference_without_weight(x, eps):
    wide = x.double()
    return wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)


def test_a_rule_for_a_class_without_a_weight():
    """All rules without an offset are the same then."""
    llama, unknown = norm_class(RIGHT["llama"])(), Norm()
    bare = norm_class(lambda self, x: self.normalise(x).to(x.dtype))()
    bare.weight = None
    with patch_transformers(bare, classes={type(bare): "llama"}) as patch:
        assert patch.rules == {"": "once"}
    with pytest.warns(RuntimeWarning):
        left = patch_transformers(bare, classes={type(bare): "gemma"}).left
    assert left == {"": "MyRMSNorm has no weight, to which the rule gemma adds"}
    both = torch.nn.ModuleList([llama, unknown])
    assert patch_transformers(both, classes={type(llama): "llama"}).rules == {"0": "llama", "1": "once"}


def test_a_norm_that_loses_its_weight_runs_its_original_forward():
    norm = Norm()
    with patch_transformers(norm):
        norm.weight = None
        with pytest.raises(AttributeError):  # as the class itself
            norm(torch.randn(2, SIZE))


def test_t5():
    """A LayerNorm by name."""
    assert patch_transformers(class_of("t5.T5LayerNorm")(SIZE)).rules == {"": "llama"}


def norm_classes():
    """Return the norm classes that the modeling files of transformers define, by module, without importing them."""
    found = []
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and "norm" in node.name.lower():
                found.append((f"transformers.models.{file.parent.name}.{file.stem}", node.name))
    return found


def construct(module, name):
    """Return a module of a class, or None if it needs a config, other arguments or another package."""
    for arguments in ((SIZE,), (SIZE, SIZE), ()):
        try:
            return getattr(importlib.import_module(module), name)(*arguments)
        except Exception:
            continue
    return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:patch_transformers replaced nothing:RuntimeWarning")
def test_every_norm_class_of_transformers_has_a_rule_or_a_reason():
    """Run with -rP to see how many classes each rule has."""
    found = collections.defaultdict(list)
    for module, name in norm_classes():
        norm = construct(module, name)
        if not isinstance(norm, torch.nn.Module):
            found["not constructed"].append(name)
            continue
        patch = patch_transformers(norm, attention=False, layers=False)
        if "rmsnorm" in name.lower():
            assert patch.rules or patch.left[""], name
        if patch.rules:
            torch.nn.init.normal_(norm.weight)
            x = torch.randn(3, 5, SIZE)
            arguments = (x, torch.randn(3, 5, SIZE)) if patch.rules[""].startswith("gate") else (x,)
            after = norm(*arguments).detach()
            patch.undo()
            assert relative_error(after, norm(*arguments).detach().double()) < 1e-6, name
        reason = patch.left.get("", "not a norm of one weight").replace(name, "it")
        found[patch.rules.get("", f"left: {reason}")].append(name)
    for rule, names in sorted(found.items(), key=lambda item: -len(item[1])):
        print(f"transformers {transformers.__version__}, {rule}: {len(names)}: {', '.join(names)}")
    assert len(found["llama"]) > 100 and len(found["once"]) > 10 and len(found["gemma"]) > 8


# Models whose attention and layers are left: what their config needs, and whether their norms are replaced.
OTHER_MODELS = {
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Olmo2": {},
    "Olmo3": {},
    "Glm4": {},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "moe_intermediate_size": 64,
    },
    "Granite": {},
    "SmolLM3": {},
    "Cohere": None,
    "Nemotron": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:patch_transformers replaced nothing:RuntimeWarning")
def test_norms_of_other_models(name, dtype):
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, **tokens, **(OTHER_MODELS[name] or {}))
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    ids = torch.randint(3, 96, (3, 7))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        patch = patch_transformers(model)
        after = model(input_ids=ids).logits
        norms = {key for key, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    if OTHER_MODELS[name] is None:
        assert not patch.replaced and norms <= patch.left.keys()
    else:
        assert norms and norms <= patch.rules.keys()
    assert relative_error(after, before.double()) < (1e-5 if dtype == torch.float32 else 3e-2)
    patch.undo()
    with torch.no_grad():
        assert same_bits(model(input_ids=ids).logits, before)
