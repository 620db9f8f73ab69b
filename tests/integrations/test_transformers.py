"""Tiny, randomly initialised models of the transformers package, before and after `patch_transformers`."""

from __future__ import annotations

import copy
import importlib
import io
import pickle

import pytest
import torch
from helpers import relative_error, same_bits
from operator_calls import forget_kernels

import jitnorm
from jitnorm import patch_transformers
from jitnorm.core.norm_modules import GEMMA_CLASSES, LLAMA_CLASSES
from jitnorm.core.operators import OPERATORS
from jitnorm.integrations import transformers_norms
from jitnorm.warmup import make_plan

from .common import in_float64, norms

transformers = pytest.importorskip("transformers")

# Name: the hidden size, the RMSNorm modules of a layer, what else its config needs. Each has one more at the end.
# Few sizes, so that few kernels are built: what a kernel computes at each size is tested with the operators.
MODELS = {
    "Llama": (128, 2, {}),
    "Mistral": (128, 2, {"head_dim": 64}),
    "Qwen2": (128, 2, {}),
    "Qwen3": (64, 4, {"head_dim": 64}),
    "Gemma": (128, 2, {"head_dim": 128}),
    "Gemma2": (64, 4, {"head_dim": 64, "query_pre_attn_scalar": 64}),
    "Gemma3": (128, 6, {"head_dim": 64, "query_pre_attn_scalar": 64}),
}
LAYERS = 2
SIZE = 128  # of single modules
models = pytest.mark.parametrize("name", MODELS)


def make(name, dtype=torch.float32, device="cpu", **changes):
    hidden_size, _, extra = MODELS[name]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(
        **{
            "vocab_size": 96,
            "hidden_size": hidden_size,
            "intermediate_size": 96,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "initializer_range": 0.1,  # so that the layers, not the embedding alone, make the logits
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **extra,
            **changes,
        }
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(device, dtype).eval()
    for module in norms(model):
        torch.nn.init.normal_(module.weight, 0.0 if name.startswith("Gemma") else 1.0, 0.3)
    return model


def tokens(device="cpu", rows=3, length=7):
    return torch.randint(3, 96, (rows, length), device=device)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(name, dtype, device):
    """Before and after they err alike against float64: rounding, and the same amount of it.

    The model rounds its activations some ten times in a layer, so its own error, about 1e-6 in float32 and 1e-2 in
    bfloat16, is the scale. What is replaced rounds as often as before or less; a quarter more leaves room for chance.
    Two results with errors of that size are apart by up to their root of two, had they no error in common.
    """
    model, ids = make(name, dtype, device), tokens(device, rows=16)
    exact = logits(in_float64(model), ids)
    before = logits(model, ids)
    patch = patch_transformers(model)
    after = logits(model, ids)
    error = relative_error(before, exact)
    assert error < (1e-5 if dtype == torch.float32 else 5e-2)
    assert relative_error(after, exact) < 1.25 * error
    assert relative_error(after, before.double()) < 1.5 * error
    patch.undo()
    assert same_bits(logits(model, ids), before)


@models
def test_every_norm_is_replaced_and_calls_a_kernel(name, monkeypatch):
    model, ids = make(name, torch.bfloat16), tokens()
    before = {module_name: type(m).__name__ for module_name, m in model.named_modules() if m in norms(model)}
    called = []
    normalise = transformers_norms.normalise
    monkeypatch.setattr(transformers_norms, "normalise", lambda *a: called.append(a) or normalise(*a))
    with patch_transformers(model, attention=False, layers=False) as patch:
        assert patch.replaced == before and len(before) == LAYERS * MODELS[name][1] + 1
        assert not patch.left
        logits(model, ids)
        assert len(called) == len(before)
    logits(model, ids)
    assert len(called) == len(before)
    assert {type(m).__name__ for m in norms(model)} == set(before.values())


@models
def test_generate(name):
    model, ids = make(name), tokens()

    def generate():
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)

    before = generate()
    with patch_transformers(model):
        after = generate()
    assert after.shape == (3, 12)
    assert torch.equal(after, before)  # in float32; a tie within rounding is too rare to see


@models
def test_parameters_and_state_dict_stay(name):
    model, ids = make(name, torch.bfloat16), tokens()
    parameters, buffers, keys = dict(model.named_parameters()), dict(model.named_buffers()), [*model.state_dict()]
    patch_transformers(model)
    assert [*model.state_dict()] == keys
    for before, after in ((parameters, dict(model.named_parameters())), (buffers, dict(model.named_buffers()))):
        assert before.keys() == after.keys()
        assert all(after[key] is before[key] for key in before)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    restored = make(name, torch.bfloat16)
    patch_transformers(restored)
    restored.load_state_dict(torch.load(file))
    assert same_bits(logits(restored, ids), logits(model, ids))


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@models
def test_training(name):
    model, ids = make(name).train(), tokens()
    before = gradients(model, ids)
    with patch_transformers(model):
        after = gradients(model, ids)
    for key in before:
        # q and k norms' gradients are small differences of large terms.
        assert relative_error(after[key], before[key].double()) < 1e-3
        assert before[key].any()


def class_of(name):
    """Return the class of that name, from whichever of transformers' models has it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    squeezed = name.removesuffix("RMSNorm").removesuffix("Text").replace("_", "").lower()
    module = next(kind for kind in CONFIG_MAPPING_NAMES if kind.replace("_", "") == squeezed)
    return getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)


@pytest.mark.parametrize("name", LLAMA_CLASSES + GEMMA_CLASSES)
def test_supported_classes_compute_what_the_kernels_compute(name):
    """Those of the installed transformers do."""
    module = class_of(name)(SIZE, eps=1e-3)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(3, 5, SIZE) * 0.1
    before = module(x)
    patch = patch_transformers(module)
    assert patch.replaced == {"": name}
    after = module(x)
    assert relative_error(after.detach(), before.detach().double()) < 1e-6


def test_sizes_that_rmsnorm_refuses():
    model, ids = make("Qwen3", hidden_size=96), tokens()
    before = logits(model, ids)
    patch = patch_transformers(model)
    assert {n.rpartition(".")[2] for n in patch.rules} == {
        "q_norm",
        "k_norm",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
    forget_kernels()
    assert relative_error(logits(model, ids), before.double()) < 1e-5
    assert OPERATORS["general_rmsnorm"].kernels_by_spec
    assert OPERATORS["general_fused_add_rmsnorm_round_sum"].kernels_by_spec


def test_sizes_without_a_kernel_are_left():
    model = torch.nn.ModuleList([class_of("LlamaRMSNorm")(65537), class_of("LlamaRMSNorm")(64)])
    patch = patch_transformers(model)
    assert patch.left == {"0": "no kernel supports hidden_size 65537"} and [*patch.replaced] == ["1"]
    assert "replaced 1 modules, left 1" in repr(patch) and "0: left, no kernel supports" in repr(patch)


class Gemma3nRMSNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(SIZE)), 1e-6


class LlamaRMSNorm(Gemma3nRMSNorm):
    """A class of another library with the name of transformers', which computes something else."""

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize("model", [None, "llama"])
@pytest.mark.parametrize("function", [jitnorm.patch_transformers, jitnorm.unpatch_transformers])
def test_a_model_that_is_not_a_module_is_refused(model, function):
    with pytest.raises(TypeError, match=f"model must be a torch.nn.Module, got {type(model).__name__}"):
        function(model)


def test_modules_that_are_left_have_a_reason():
    llama = class_of("LlamaRMSNorm")
    instance, hooked, other_weight = llama(SIZE), llama(SIZE), llama(SIZE)
    instance.forward = lambda x: x
    torch.nn.utils.parametrizations.weight_norm(other_weight, dim=None)
    model = torch.nn.ModuleDict(
        {
            "two_dimensions": torch.nn.RMSNorm((SIZE, SIZE), elementwise_affine=False),
            "gemma3n": Gemma3nRMSNorm(),
            "namesake": LlamaRMSNorm(),
            "instance": instance,
            "parametrised": other_weight,
            "hooked": hooked,
            "own": jitnorm.nn.RMSNorm(SIZE),
            "layer_norm": torch.nn.LayerNorm(SIZE),
        }
    )
    patch = patch_transformers(model)
    assert patch.replaced == {"hooked": "LlamaRMSNorm"} and patch.rules == {"hooked": "llama"}
    assert patch.left == {
        "two_dimensions": "RMSNorm normalises 2 dimensions",
        "gemma3n": "the forward of Gemma3nRMSNorm raised NotImplementedError on random input",
        "namesake": "LlamaRMSNorm computes none of the rules that jitnorm knows",
        "instance": "its forward was replaced on the instance",
        "parametrised": "ParametrizedLlamaRMSNorm has child modules",
        "own": "RMSNorm is a module of jitnorm, which calls the kernels",
    }
    with pytest.warns(RuntimeWarning, match="replaced nothing in ModuleDict"):
        again = patch_transformers(model)
    assert not again.replaced and again.left["hooked"] == "already replaced"
    again.undo()
    assert type(hooked) is not llama
    patch.undo()
    patch.undo()
    assert type(hooked) is llama


def test_a_module_stays_what_it_was():
    norm = class_of("LlamaRMSNorm")(SIZE)
    seen = []
    norm.register_forward_hook(lambda *_: seen.append(1))
    shared = torch.nn.ModuleList([norm, norm])
    with patch_transformers(shared) as patch:
        assert patch.replaced == {"0": "LlamaRMSNorm"}
        assert isinstance(norm, class_of("LlamaRMSNorm")) and shared[0] is shared[1] is norm
        norm(torch.randn(3, SIZE))
        assert repr(norm) == "JitnormLlamaRMSNorm((128,), eps=1e-06)"
    assert seen == [1] and type(norm) is class_of("LlamaRMSNorm")


def test_calls_that_no_kernel_supports_run_the_original():
    """Llama's class promotes to the weight's dtype, whatever a kernel would do."""
    norm = class_of("LlamaRMSNorm")(SIZE)
    torch.nn.init.normal_(norm.weight)
    for x in (torch.randn(3, SIZE).bfloat16(), torch.randn(3, SIZE, dtype=torch.float64)):
        before = norm(x)
        with patch_transformers(norm):
            after = norm(x)
        assert after.dtype == before.dtype and same_bits(after.detach(), before.detach())


def test_copies_and_pickles_are_replaced_too():
    model, ids = make("Qwen3"), tokens()
    patch = patch_transformers(model)
    after = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in norms(twin)] == [type(m) for m in norms(model)]
        assert same_bits(logits(twin, ids), after)
    patch.undo()
    assert not any(type(m).__name__.startswith("Jitnorm") for m in norms(model))


def class_names(model):
    return [type(m).__name__ for m in norms(model)]


def test_copies_and_pickles_can_be_restored():
    model, ids = make("Qwen3"), tokens()
    before, names = logits(model, ids), class_names(model)
    patch = patch_transformers(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert jitnorm.unpatch_transformers(twin) == patch.replaced
        assert class_names(twin) == names and same_bits(logits(twin, ids), before)
        assert not jitnorm.unpatch_transformers(twin)
    patch.undo()
    assert class_names(model) == names
    assert patch_transformers(model).replaced == patch.replaced


def test_a_class_derived_from_a_patched_one_is_left():
    model = torch.nn.ModuleList([class_of("LlamaRMSNorm")(SIZE)])
    patch_transformers(model)
    torch.nn.utils.parametrizations.weight_norm(model[0], dim=None)
    with pytest.warns(RuntimeWarning, match="left 0: ParametrizedJitnormLlamaRMSNorm was derived from"):
        assert not jitnorm.unpatch_transformers(model)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (torch.nn.Linear(3, 3), "in Linear: it has no RMSNorm modules"),
        (
            torch.nn.Sequential(LlamaRMSNorm(), LlamaRMSNorm(), Gemma3nRMSNorm()),
            "in Sequential: LlamaRMSNorm computes none of the rules that jitnorm knows (2 modules); "
            "the forward of Gemma3nRMSNorm raised NotImplementedError on random input (1 module)",
        ),
    ],
)
def test_replacing_nothing_warns(model, why):
    with pytest.warns(RuntimeWarning) as warned:
        patch = patch_transformers(model)
    assert not patch.replaced and [str(w.message) for w in warned] == [f"patch_transformers replaced nothing {why}"]
    assert warned[0].filename == __file__
    with pytest.raises(RuntimeError, match="replaced nothing") as raised:
        patch_transformers(model, strict=True)
    assert str(raised.value) == f"patch_transformers replaced nothing {why}"


def test_strict_does_not_warn_if_something_is_replaced(recwarn):
    assert patch_transformers(class_of("LlamaRMSNorm")(SIZE), strict=True).replaced
    assert not recwarn.list


@models
def test_a_warm_up_builds_every_kernel_that_a_patched_model_calls(name, tmp_path):
    model, ids = make(name), tokens()
    model.config.save_pretrained(tmp_path)
    plan = make_plan(config=tmp_path, dtype="fp32", device="cpu")
    assert ("replaces norms, attention, layers and MLPs" in plan.notes[-1]) == (name not in ("Gemma", "Gemma2"))
    forget_kernels()
    with patch_transformers(model):
        logits(model, ids)
    called = {op.spec(*key).name for op in OPERATORS.values() for key in op.kernels_by_spec}
    assert called and called <= {spec.name for spec in plan.specs}


@pytest.mark.slow
def test_a_patched_model_compiles_without_a_graph_break():
    torch._dynamo.reset()
    model = make("Gemma3").requires_grad_(False)  # q and k norms on transposed heads
    patch_transformers(model, layers=False)
    run = torch.compile(model.model.layers[0], fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 9):
        hidden = torch.randn(2, length, 128)
        angles = torch.randn(2, length, 64)
        arguments = {"position_embeddings": (angles.cos(), angles.sin())}
        assert same_bits(run(hidden, **arguments), model.model.layers[0](hidden, **arguments))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rounding_as_transformers_gives_more_equal_bits(kind, device):
    """rounding="hf" rounds where transformers does: most values of the first norm are equal, and more of the logits."""
    import transformers

    sizes = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 97}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 96}
    config = getattr(transformers, f"{kind.capitalize()}Config")(**sizes)
    model = getattr(transformers, f"{kind.capitalize()}ForCausalLM")(config).to(device, torch.bfloat16).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5 if parameter.dim() == 1 else 0.1)
    tokens = torch.randint(97, (2, 33), device=device)
    equal = {}
    with torch.no_grad():
        expected = model(tokens).logits
        for rounding in ("once", "hf"):
            with jitnorm.patch_transformers(model, rounding=rounding) as patch:
                assert any(rule == "llama" for rule in patch.rules.values())
                copied = pickle.loads(pickle.dumps(model))
                logits = model(tokens).logits
                assert same_bits(copied(tokens).logits, logits)
            equal[rounding] = float((logits == expected).float().mean())
    assert equal["hf"] > equal["once"], equal
    with pytest.raises(ValueError, match="rounding must be 'once' or 'hf', got 'twice'"):
        jitnorm.patch_transformers(model, rounding="twice")
