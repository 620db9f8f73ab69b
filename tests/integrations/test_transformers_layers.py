"""patch_transformers: residual additions with the next norm, gated activations, and projections of one GEMM."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, same_bits

import jitnorm
from jitnorm import patch_transformers
from jitnorm.batch_invariant import set_batch_invariant_mode
from jitnorm.integrations import (
    transformers_attention,
    transformers_layers,
    transformers_mlp,
    transformers_sources,
)
from jitnorm.integrations.transformers import explain
from jitnorm.integrations.transformers_state import current_state

from .common import ATTENTION_MODELS, LAYERS, batch, in_float64, logits, make_model, norms

transformers = pytest.importorskip("transformers")

models = pytest.mark.parametrize("name", ATTENTION_MODELS)
FIRST_ADDITION = 1  # of the first layer, whose residual is the model's input


def hidden_states(model, inputs):
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states


@pytest.fixture
def calls(monkeypatch):
    """Return the names of the kernels of patched modules that were called, other than norms."""
    names = []

    def count(module, function, name):
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, **options: names.append(name) or original(*a, **options))

    count(transformers_attention, "normalise_and_rotate", "rope")
    count(transformers_layers, "add_and_normalise", "add")
    count(transformers_mlp, "side_by_side", "mlp")
    return names


def without_mlps(model):
    """Let the MLPs of a model run their original forward, whose roundings differ from the kernel's."""
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda *_: None)
    return model


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(name, dtype, calls, device):
    """The patched model is as close to float64 as before: it rounds less often."""
    model, inputs = make_model(name, dtype, device), batch(device, rows=16, length=24)
    exact, before = logits(in_float64(model), inputs), logits(model, inputs)
    for options in ({"layers": False}, {}, {"fuse_projections": True}):
        calls.clear()
        with patch_transformers(model, **options) as patch:
            assert not patch.left
            after = logits(model, inputs)
        assert calls.count("rope") == LAYERS
        if options != {"layers": False}:
            assert calls.count("add") == 2 * LAYERS - FIRST_ADDITION and calls.count("mlp") == LAYERS
        assert relative_error(after, exact) <= 1.1 * relative_error(before, exact)
        if dtype == torch.float32:
            assert relative_error(after, before.double()) < 1e-5
        assert same_bits(logits(model, inputs), before)


@models
def test_additions_round_as_those_of_transformers(name, calls):
    """With the same norms and MLPs, fused additions change no bit, of any layer's output."""
    model, inputs = without_mlps(make_model(name, torch.bfloat16)), batch()
    with patch_transformers(model, layers=False):
        separate, states = logits(model, inputs), hidden_states(copy.deepcopy(model), inputs)
    assert {*calls} == {"rope"}
    with patch_transformers(model):
        fused = logits(model, inputs)
        assert {*calls} == {"rope", "add"} and calls.count("add") == 2 * LAYERS - FIRST_ADDITION
        assert same_bits(fused, separate)
        # Hooks of transformers record the outputs, which must not be overwritten later.
        assert all(map(same_bits, hidden_states(model, inputs), states))
        assert same_bits(logits(model, inputs), separate)


def test_hooks_keep_what_they_saw(calls):
    """Whatever module has a hook, its input and its output are not overwritten after the hook has seen them."""
    model, inputs = make_model("Qwen3"), batch(rows=2, length=3)
    before = logits(model, inputs)
    kept = []

    def keep(module, arguments, output=None):
        tensors = (*arguments, *(output if isinstance(output, tuple) else (output,)))
        kept.extend((x, x.clone()) for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point())

    patch_transformers(model)
    for module in model.modules():
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(keep)
            assert relative_error(logits(model, inputs), before.double()) < 1e-5
            handle.remove()
    assert len(kept) > 90 and all(same_bits(*pair) for pair in kept)
    calls.clear()
    handle = torch.nn.modules.module.register_module_forward_hook(keep)
    logits(model, inputs)
    handle.remove()
    assert {*calls} == {"rope"} and all(same_bits(*pair) for pair in kept)


@models
def test_a_loop_over_layers_keeps_their_outputs(name, calls):
    """Only the model's own forward is known not to read a layer's output again."""
    model, inputs = make_model(name), batch()
    patch_transformers(model)
    states, copies = [], []
    with torch.no_grad():
        hidden = model.model.embed_tokens(inputs["input_ids"])
        for layer in [*model.model.layers, *model.model.layers]:
            arguments = {"layer_type": "full_attention"} if name == "Gemma3" else {}
            angles = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None], **arguments)
            hidden = layer(hidden, position_embeddings=angles, attention_mask=None)
            states.append(hidden)
            copies.append(hidden.clone())
    assert "add" not in calls and calls.count("mlp") == 2 * LAYERS
    assert all(map(same_bits, states, copies))


def test_an_exception_ends_the_state_of_a_forward():
    model, inputs = make_model("Qwen3"), batch()
    patch_transformers(model)
    expected = logits(model, inputs)

    def fail(*_):
        assert current_state.get() is not None
        raise KeyError("expected")

    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(fail)
    with pytest.raises(KeyError, match="expected"):
        logits(model, inputs)
    assert current_state.get() is None
    handle.remove()
    assert same_bits(logits(model, inputs), expected)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, calls):
    """Reentrant checkpointing runs layers without gradients first, and keeps their inputs for the second run."""
    model, inputs = make_model("Qwen3").train(), batch()
    before = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    patch_transformers(model)
    after = gradients(model, inputs)
    assert "add" not in calls
    for key, expected in before.items():
        # q and k norms' gradients are small differences of large terms.
        assert relative_error(after[key], expected.double()) < 1e-3 and expected.any()


@torch.no_grad()
def test_an_input_that_requires_a_gradient_is_not_overwritten(calls):
    """As in the first run of a checkpoint of another library."""
    model = make_model("Qwen3")
    patch_transformers(model)
    model(inputs_embeds=torch.randn(2, 3, 128).requires_grad_())
    # The last addition alone: the output of the first layer is not its own.
    assert [call for call in calls if call != "rope"] == ["mlp", "mlp", "add"]
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch())
    assert not calls


def test_a_frozen_model_calls_kernels_with_gradients_enabled(calls):
    model = make_model("Qwen3").requires_grad_(False)
    patch_transformers(model)
    model(**batch())
    assert calls.count("add") == 2 * LAYERS - FIRST_ADDITION and calls.count("mlp") == LAYERS
    calls.clear()
    model.model.layers[0].mlp.down_proj.weight.requires_grad_()
    model(**batch())
    assert {*calls} == {"rope"}  # of the first layer: from its MLP on, everything has a gradient


@pytest.mark.slow
def test_compiled_graphs_have_the_original_additions(calls):
    model, inputs = make_model("Qwen3"), {"input_ids": batch()["input_ids"]}
    before = logits(model, inputs)
    patch_transformers(model, fuse_projections=True)
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        after = run(**inputs, use_cache=False).logits
    assert {*calls} == {"rope"} and relative_error(after, before.double()) < 1e-5


class LoRA(torch.nn.Module):
    """A module around a linear one, with the attributes of PEFT's: unknown here."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.update = torch.nn.Linear(base_layer.in_features, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.update(x)


@pytest.mark.parametrize("fuse_projections", [False, True])
@pytest.mark.parametrize(
    ("path", "adds", "mlps"),
    [
        ("self_attn.q_proj", 3, 2),
        ("self_attn.o_proj", 2, 2),
        ("mlp.gate_proj", 3, 1),
        ("mlp.down_proj", 1, 2),  # then the next layer's residual is not its own either
    ],
)
def test_wrapped_projections(path, adds, mlps, fuse_projections, calls):
    """A layer with an unknown module runs that module, and fuses only what it can do without knowing it."""
    model, inputs = make_model("Llama"), batch()
    parent, _, name = path.partition(".")
    patch = patch_transformers(model, fuse_projections=fuse_projections)
    module = getattr(model.model.layers[1 if path == "self_attn.o_proj" else 0], parent)
    setattr(module, name, LoRA(getattr(module, name)))
    after = logits(model, inputs)
    assert (calls.count("add"), calls.count("mlp")) == (adds, mlps)
    patch.undo()
    assert relative_error(after, logits(model, inputs).double()) < 1e-5


def test_a_layer_whose_class_another_library_changed_is_left(monkeypatch):
    """Unknown forwards are left, also where functools.wraps gives them the name of the original."""
    modeling = importlib_modeling("qwen3")
    original = modeling.Qwen3MLP.forward

    def forward(self, x):
        return -original(self, x)

    forward.__wrapped__, forward.__module__ = original, original.__module__
    monkeypatch.setattr(modeling.Qwen3MLP, "forward", forward)
    monkeypatch.setattr(transformers_sources, "_known", {})
    model = make_model("Qwen3")
    patch = patch_transformers(model)
    reason = "the forward of Qwen3MLP is not the one of transformers that jitnorm knows"
    assert patch.left == {f"model.layers.{i}.mlp": reason for i in range(LAYERS)}
    assert "the forward of mlp is not one that jitnorm knows" in explain(model)["model.layers.0"]


def importlib_modeling(family):
    return __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["_"])


def test_the_installed_transformers_is_known():
    for name in transformers_sources.KNOWN_FORWARDS:
        family = next(f for f in (*ATTENTION_MODELS,) if name.startswith(f))
        assert transformers_sources.is_known(getattr(importlib_modeling(family.lower()), name)), name


def double(x: int) -> int:
    """Double it."""
    y: int = 2 * x  # a comment
    return y


SAME, OTHER = "def double(x):\n  y = (2*x)\n  return y\n", "def double(x):\n    y = 3 * x\n    return y\n"


def test_the_hash_of_a_source_is_that_of_what_it_computes(tmp_path):
    hashes = []
    for number, source in enumerate((SAME, OTHER)):
        (file := tmp_path / f"source_{number}.py").write_text(source)
        space = {}
        exec(compile(source, file, "exec"), space)
        hashes.append(transformers_sources.hash_of(space["double"]))
    assert transformers_sources.hash_of(double) == hashes[0] != hashes[1]
    assert transformers_sources.hash_of(len) is None and transformers_sources.hash_of(lambda x: x) is None


@models
def test_what_is_replaced_and_restored(name, tmp_path):
    model, inputs = make_model(name), batch()
    classes = {path: type(module) for path, module in model.named_modules()}
    parameters, before = dict(model.named_parameters()), logits(model, inputs)
    keys = [*model.state_dict()]
    pointers = {key: p.data_ptr() for key, p in parameters.items()}
    for fuse_projections in (False, True):
        patch = patch_transformers(model, fuse_projections=fuse_projections)
        kinds = {cls.removeprefix(name) for cls in patch.replaced.values()}
        base = "TextModel" if name == "Gemma3" else "Model"
        assert kinds == {"RMSNorm", "Attention", "RotaryEmbedding", "DecoderLayer", "MLP", base}
        assert [*model.state_dict()] == keys
        assert all(p is parameters[key] for key, p in model.named_parameters())
        after = logits(model, inputs)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
            assert relative_error(logits(twin, inputs), after.double()) < 1e-6
            assert jitnorm.unpatch_transformers(twin) == patch.replaced
            assert same_bits(logits(twin, inputs), before)
        patch.undo()
        assert {path: type(module) for path, module in model.named_modules()} == classes
        assert same_bits(logits(model, inputs), before)
        assert len({p.untyped_storage().data_ptr() for p in parameters.values()}) == len(parameters)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters.values())
        assert fuse_projections or pointers == {key: p.data_ptr() for key, p in parameters.items()}


def test_a_patched_model_is_saved_under_its_own_name(tmp_path):
    model, inputs = make_model("Qwen2"), batch()
    patch_transformers(model, fuse_projections=True)
    after = logits(model, inputs)
    assert len(hidden_states(model, inputs)) == LAYERS + 1
    model.save_pretrained(tmp_path / "whole")
    loaded = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "whole")
    assert relative_error(logits(loaded, inputs), after.double()) < 1e-5
    assert all(same_bits(p, loaded.state_dict()[key]) for key, p in model.state_dict().items())
    model.model.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["architectures"] == ["Qwen2Model"]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    restored = make_model("Qwen2")
    patch_transformers(restored, fuse_projections=True)
    restored.load_state_dict(torch.load(file))
    assert same_bits(logits(restored, inputs), after)


def test_fused_projections_follow_their_parameters(monkeypatch):
    """Updates in place reach the GEMM; moved or replaced weights are separate again, with the same results."""
    model, inputs = make_model("Qwen2"), batch()
    patch = patch_transformers(model, fuse_projections=True)
    layer, described = model.model.layers[0], "one GEMM computes gate_proj and up_proj"
    assert described in explain(model)["model.layers.0.mlp"]
    assert "one GEMM computes q_proj and k_proj and v_proj" in explain(model)["model.layers.1.self_attn"]
    first = logits(model, inputs)
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(2)
        layer.self_attn.k_proj.bias.add_(0.5)
    second = logits(model, inputs)
    assert relative_error(second, first.double()) > 1e-2
    layer.mlp.gate_proj.weight = torch.nn.Parameter(layer.mlp.gate_proj.weight.detach().clone())
    assert described not in explain(model)["model.layers.0.mlp"] and described in explain(model)["model.layers.1.mlp"]
    assert relative_error(logits(model, inputs), second.double()) < 1e-6
    model.double().float()
    assert described not in explain(model)["model.layers.1.mlp"]
    assert relative_error(logits(model, inputs), second.double()) < 1e-6
    patch.undo()
    assert relative_error(logits(model, inputs), second.double()) < 1e-5


def test_weights_that_share_memory_are_not_moved():
    model = make_model("Llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight
    patch_transformers(model, fuse_projections=True)
    with torch.no_grad():
        mlp.gate_proj.weight.add_(1)
    assert mlp.up_proj.weight is mlp.gate_proj.weight
    whole = torch.randn(4, 96, 128)
    other = make_model("Llama")
    other.model.layers[0].mlp.up_proj.weight.data = whole[2]
    patch_transformers(other, fuse_projections=True)
    assert other.model.layers[0].mlp.up_proj.weight.data_ptr() == whole[2].data_ptr()


@pytest.mark.parametrize(
    ("hidden_act", "reason"),
    [
        ("silu", None),
        ("swish", None),
        ("gelu", None),
        ("gelu_pytorch_tanh", None),
        ("gelu_python", "no kernel computes the product with GELUActivation"),
        ("gelu_python_tanh", "no kernel computes the product with GELUTanh"),
        ("relu", "no kernel computes the product with ReLU"),
    ],
)
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_activations(hidden_act, reason, mlp_bias, calls, device):
    # GEMMs of two projections or with a bias may add in another order, and float32's silu is an approximation too.
    for dtype, of_the_order in ((torch.float32, 5e-7), (torch.float16, 2e-4)):
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=104, hidden_act=hidden_act, mlp_bias=mlp_bias, num_attention_heads=1
        )
        mlp = importlib_modeling("llama").LlamaMLP(config).to(device, dtype)
        x = torch.randn(3, 5, 64, device=device, dtype=dtype) * 4
        with torch.no_grad():
            exact, before = copy.deepcopy(mlp).double()(x.double()), mlp(x)
            if reason:
                with pytest.warns(RuntimeWarning, match="replaced nothing"):
                    assert patch_transformers(mlp).left == {"": reason}
                continue
            for fuse_projections in (False, True):
                with patch_transformers(mlp, fuse_projections=fuse_projections):
                    calls.clear()
                    after = mlp(x)
                assert calls == ["mlp"] and after.shape == before.shape
                more = of_the_order if fuse_projections or mlp_bias or dtype == torch.float32 else 0.0
                assert relative_error(after, exact) <= 1.1 * relative_error(before, exact) + more


@pytest.mark.parametrize("width", [6, 100])
def test_widths_that_are_no_whole_accesses_run_the_original(width, calls):
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=width, num_attention_heads=1)
    mlp, x = importlib_modeling("llama").LlamaMLP(config).half(), torch.randn(3, 64).half()
    with torch.no_grad():
        before = mlp(x)
        patch_transformers(mlp)
        assert same_bits(mlp(x), before) and not calls


def test_a_model_without_layers():
    model = make_model("Llama", num_hidden_layers=0)
    inputs = batch()
    before = logits(model, inputs)
    patch_transformers(model)
    assert relative_error(logits(model, inputs), before.double()) < 1e-5


def test_an_empty_batch():
    mlp = importlib_modeling("llama").LlamaMLP(transformers.LlamaConfig(hidden_size=64, intermediate_size=96))
    patch_transformers(mlp)
    with torch.no_grad():
        assert mlp(torch.randn(2, 0, 64)).shape == (2, 0, 64)


def test_explain():
    model = make_model("Gemma3")
    assert explain(model)["model.layers.0"] == "Gemma3DecoderLayer, left: patch_transformers can replace it"
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        explain("model")
    patch_transformers(model)
    assert list(explain(model)) == list(explain(copy.deepcopy(model))) and len(explain(model)) == 1 + 2 * 9 + 2
    first, second = (explain(model)[f"model.layers.{i}"] for i in range(LAYERS))
    assert first == (
        "Gemma3DecoderLayer, patched: a kernel adds the residual of the MLP, with the next norm; PyTorch that of the "
        "attention, because its residual is the input of the model"
    )
    assert second == "Gemma3DecoderLayer, patched: kernels add both residuals, each with the next norm"
    assert f"\nmodel.layers.1: {second}\n" in str(explain(model))
    model.model.layers[0].register_forward_hook(lambda *_: None)
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    model.model.layers[1].self_attn.q_norm.forward = lambda x: x
    assert explain(model)["model.layers.0"].startswith("Gemma3DecoderLayer, patched: PyTorch adds both residuals: of")
    assert "PyTorch that of the attention, because PyTorch made its residual" in explain(model)["model.layers.1"]
    assert "but the original forward runs" in explain(model)["model.layers.1.mlp"]
    assert "was replaced on the instance" in explain(model)["model.layers.1.self_attn.q_norm"]
    partly = make_model("Qwen3")
    patch_transformers(partly.model.layers[1])
    assert "it is in no patched model" in explain(partly)["model.layers.1"]
    assert len(norms(partly)) == 4 * LAYERS + 1


@pytest.mark.parametrize("option", ["attention", "layers", "fuse_projections", "time_gemms", "strict"])
def test_options_are_bools(option):
    with pytest.raises(TypeError, match=f"{option} must be True or False, got int"):
        patch_transformers(torch.nn.Linear(3, 3), **{option: 1})


@pytest.mark.parametrize("fuse_projections", [False, True])
def test_batch_invariant_mode(fuse_projections):
    model, ids = make_model("Qwen3"), torch.randint(3, 96, (5, 7))
    patch_transformers(model, fuse_projections=fuse_projections)
    with set_batch_invariant_mode():
        alone, together = logits(model, {"input_ids": ids[:1]}), logits(model, {"input_ids": ids})
    assert same_bits(alone, together[:1])


GATED = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


def gated_linear_reference(x, weight, activation):
    """Return what engine_gemms.gated_linear returns, with its roundings, from its definition."""
    name, _, suffix = activation.partition("_and_mul")
    gate, up = F.linear(x, weight).float().chunk(2, dim=-1)
    activated = GATED[name](gate)
    return ((activated.to(x.dtype) if suffix == "_hf" else activated) * up).to(x.dtype)


@pytest.fixture
def timed(monkeypatch):
    """The weights that were timed, in three lists; what was multiplied; and whether the GPU is capturing.

    `gated` and `gated_calls` have weights with the name of the activation's operator, the others shapes of weights.
    """
    from jitnorm.integrations import engine_gemms, transformers_projections

    found = SimpleNamespace(after_norm=[], others=[], gated=[], calls=[], gated_calls=[], is_captured=True)
    found.fits_gated = True  # whether there is a GEMM with the activation in its epilogue

    def select(after_norm, others, gated=()):
        found.after_norm += [tuple(weight.shape) for weight in after_norm]
        found.others += [tuple(weight.shape) for weight in others]
        found.gated += gated
        return engine_gemms.Selection(set(), ["what was chosen"])

    def linear(x, weight):
        found.calls.append(tuple(weight.shape))
        return F.linear(x, weight)

    def gated_linear(x, weight, activation):
        found.gated_calls.append((weight, activation))
        return gated_linear_reference(x, weight, activation)

    is_candidate = lambda weight, activation=None: activation is None or found.fits_gated  # noqa: E731
    monkeypatch.setattr(engine_gemms, "is_candidate", is_candidate)
    monkeypatch.setattr(engine_gemms, "select", select)
    monkeypatch.setattr(engine_gemms, "linear", linear)
    monkeypatch.setattr(engine_gemms, "gated_linear", gated_linear)
    is_captured = lambda x: found.is_captured and not transformers_projections.is_batch_invariant_mode_enabled()  # noqa: E731
    monkeypatch.setattr(transformers_projections, "_is_captured", is_captured)
    return found


@pytest.mark.parametrize("fuse_projections", [False, True])
def test_timed_gemms(timed, fuse_projections):
    """In modules that were patched so, inside a capture, and nowhere else."""
    model, inputs = make_model("Qwen3"), batch()
    before = logits(model, inputs)
    patch = patch_transformers(model, fuse_projections=fuse_projections, time_gemms=True)
    assert patch.gemms == ["what was chosen"] and "GEMMs: what was chosen" in repr(patch)
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    groups = [[attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]]
    gated = []
    if fuse_projections:
        after_norm, gated = ([(sum(len(x.weight) for x in group), group[0].in_features)] for group in groups)
    else:  # torch writes the gate and the factor into slices of one tensor
        after_norm = [tuple(x.weight.shape) for x in groups[0]]
    others = [tuple(x.weight.shape) for x in (attention.o_proj, mlp.down_proj)]
    shapes = Counter((after_norm + others) * LAYERS)
    assert Counter(timed.after_norm) == Counter(after_norm * LAYERS)
    assert Counter(timed.others) == Counter(others * LAYERS)
    assert [tuple(weight.shape) for weight, _ in timed.gated] == gated * LAYERS
    assert relative_error(logits(model, inputs), before.double()) < 1e-5 and Counter(timed.calls) == shapes
    assert len(timed.gated_calls) == len(timed.gated)
    timed.calls.clear()
    timed.gated_calls.clear()
    with set_batch_invariant_mode():
        logits(model, inputs)
    timed.is_captured = False
    logits(model, inputs)
    timed.is_captured = True
    copied = copy.deepcopy(model)
    patch.undo()
    patch_transformers(model, fuse_projections=fuse_projections)
    assert relative_error(logits(model, inputs), before.double()) < 1e-5 and not timed.calls + timed.gated_calls
    logits(copied, inputs)
    assert timed.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["once", "hf"])
@pytest.mark.parametrize(
    ("name", "changes", "operator"),
    [
        ("Qwen3", {}, "silu_and_mul"),
        ("Llama", {"hidden_act": "gelu"}, "gelu_and_mul"),
        ("Mistral", {"hidden_act": "gelu_pytorch_tanh"}, "gelu_tanh_and_mul"),
        ("Gemma3", {}, "gelu_tanh_and_mul"),
    ],
)
def test_timed_gemms_with_an_activation(timed, name, changes, operator, rounding, dtype):
    """The GEMM of the joined weights computes the activation, as closely to float64 as the unpatched model."""
    model, inputs = make_model(name, dtype, **changes), batch(rows=16, length=24)
    exact, before = logits(in_float64(model), inputs), logits(model, inputs)
    with patch_transformers(model, fuse_projections=True, time_gemms=True, rounding=rounding):
        after = logits(model, inputs)
        operator += "_hf" if rounding == "hf" else ""
        assert not [shape for shape in timed.after_norm if shape[0] == 2 * model.config.intermediate_size]
        for found in (timed.gated, timed.gated_calls):
            assert len(found) == LAYERS
            for layer, (weight, activation) in zip(model.model.layers, found, strict=True):
                parts = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
                assert activation == operator and weight.data_ptr() == parts[0].data_ptr()
                assert same_bits(weight, torch.cat(parts))
        assert relative_error(after, exact) <= 1.1 * relative_error(before, exact)
        if dtype == torch.float32:
            assert relative_error(after, before.double()) < 1e-5
        timed.is_captured = False  # then the activation's operator runs, which rounds at the same places
        by_operator = logits(model, inputs)
        assert relative_error(after, by_operator.double()) < (1e-5 if dtype == torch.float32 else 1e-2)
        assert len(timed.gated_calls) == LAYERS


def test_timed_gemms_without_an_activation(timed):
    """Joined weights that no GEMM with an activation supports are timed as those of attention are."""
    model, inputs = make_model("Qwen3"), batch()
    before, shape = logits(model, inputs), (2 * model.config.intermediate_size, model.config.hidden_size)
    timed.fits_gated = False
    patch_transformers(model, fuse_projections=True, time_gemms=True)
    assert timed.after_norm.count(shape) == LAYERS and not timed.gated
    assert relative_error(logits(model, inputs), before.double()) < 1e-5
    assert timed.calls.count(shape) == LAYERS and not timed.gated_calls


def add_hook(*path):
    return lambda mlp: mlp.get_submodule(".".join(path)).register_forward_hook(lambda *_: None)


def replace_weight(cls, copies):
    def change(mlp):
        weight = mlp.up_proj.weight.data
        mlp.up_proj.weight = cls(weight.clone() if copies else weight)

    return change


class WrappedParameter(torch.nn.Parameter):
    """A parameter of another class, as those of quantised and sharded weights."""


def add_biases(mlp):
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(add_hook("gate_proj"), id="hook of gate_proj"),
        pytest.param(add_hook("up_proj"), id="hook of up_proj"),
        pytest.param(add_hook("act_fn"), id="hook of act_fn"),
        pytest.param(replace_weight(WrappedParameter, False), id="subclass"),
        pytest.param(replace_weight(torch.nn.Parameter, True), id="separate weights"),
        pytest.param(add_biases, id="biases"),
        pytest.param(lambda mlp: setattr(mlp, "act_fn", torch.nn.Sequential(mlp.act_fn)), id="unknown activation"),
    ],
)
def test_mlps_that_change_after_their_gemm_was_timed(timed, change):
    """The GEMM with the activation is not called for them."""
    model, inputs = make_model("Qwen3"), batch()
    before = logits(model, inputs)
    patch_transformers(model, fuse_projections=True, time_gemms=True)
    change(model.model.layers[0].mlp)
    assert relative_error(logits(model, inputs), before.double()) < 1e-5
    ((weight, _),) = timed.gated_calls
    assert weight.data_ptr() == model.model.layers[1].mlp.gate_proj.weight.data_ptr()


@pytest.mark.parametrize("reason", ["biases", "hook", "subclass"])
def test_mlps_whose_gemm_is_not_timed(timed, reason):
    model, inputs = make_model("Llama", mlp_bias=reason == "biases"), batch()
    before = logits(model, inputs)
    for layer in model.model.layers:
        if reason == "hook":
            layer.mlp.gate_proj.register_forward_hook(lambda *_: None)
        elif reason == "subclass":
            layer.mlp.up_proj.weight = WrappedParameter(layer.mlp.up_proj.weight.data)
    patch_transformers(model, fuse_projections=True, time_gemms=True)
    assert relative_error(logits(model, inputs), before.double()) < 1e-5
    assert timed.calls and not timed.gated and not timed.gated_calls


def test_a_call_with_gradients_does_not_use_timed_gemms(timed):
    model, inputs = make_model("Qwen3"), batch()
    before = gradients(model, inputs)
    patch_transformers(model, fuse_projections=True, time_gemms=True)
    after = gradients(model, inputs)
    assert not timed.calls + timed.gated_calls
    for key, expected in before.items():
        assert relative_error(after[key], expected.double()) < 1e-3, key


def test_weights_that_change_after_they_were_timed(timed):
    """A hook, a bias, a subclass, and an attribute in place of a parameter: the module's own forward runs."""

    class Wrapped(torch.nn.Parameter):
        pass

    model, inputs = make_model("Qwen3"), batch()
    before = logits(model, inputs)
    patch_transformers(model, time_gemms=True)
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    first.o_proj.register_forward_hook(lambda *call: None)
    second.o_proj.weight = Wrapped(second.o_proj.weight.data)
    weight = second.q_proj.weight.data
    del second.q_proj.weight
    second.q_proj.weight = weight
    down = model.model.layers[0].mlp.down_proj
    down.bias = torch.nn.Parameter(torch.zeros(down.out_features))
    assert relative_error(logits(model, inputs), before.double()) < 1e-5
    # Two output projections, one down projection, and q, k and v of the second layer.
    assert len(timed.calls) == len(timed.after_norm) + len(timed.others) - 6


def test_nothing_to_time():
    model = make_model("Qwen3")
    with pytest.warns(RuntimeWarning, match="time_gemms found no weight to time: it is for weights of bfloat16 or"):
        patch = patch_transformers(model, time_gemms=True)
    assert patch.replaced and not patch.gemms


def test_an_error_while_gemms_are_timed_leaves_the_model_as_it_was(timed, monkeypatch):
    from jitnorm.integrations import engine_gemms

    def select(after_norm, others, gated):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_gemms, "select", select)
    model = make_model("Qwen3")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        patch_transformers(model, fuse_projections=True, time_gemms=True)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 65])
@pytest.mark.parametrize("fuse_projections", [False, True])
def test_timed_gemms_in_a_cuda_graph(fuse_projections, rows, monkeypatch):
    from jitnorm.integrations import engine_gemms

    model = make_model("Qwen3", device="cuda").to(torch.bfloat16)
    embeds = torch.randn(rows, 1, model.config.hidden_size, dtype=torch.bfloat16, device="cuda")
    shapes = []
    with torch.inference_mode():
        expected = model.double()(inputs_embeds=embeds.double(), use_cache=False).logits
        model.to(torch.bfloat16)
        patch = patch_transformers(model, fuse_projections=fuse_projections, time_gemms=True)
        assert patch.gemms
        linear, gated_linear = engine_gemms.linear, engine_gemms.gated_linear
        monkeypatch.setattr(engine_gemms, "linear", lambda x, w: shapes.append(w.shape) or linear(x, w))
        monkeypatch.setattr(
            engine_gemms, "gated_linear", lambda x, w, name: shapes.append(name) or gated_linear(x, w, name)
        )
        model(inputs_embeds=embeds, use_cache=False)
        assert not shapes
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(inputs_embeds=embeds, use_cache=False).logits
        graph.replay()
    assert shapes and relative_error(out, expected) < 0.05
    assert shapes.count("silu_and_mul") == (LAYERS if fuse_projections else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Qwen3", "Llama"])
@pytest.mark.parametrize("fuse_projections", [False, True])
def test_a_cuda_graph_of_a_decode_step(name, fuse_projections):
    """A captured step with a static cache computes what the same step computes in eager mode."""
    model = make_model(name, device="cuda")
    patch_transformers(model, fuse_projections=fuse_projections)
    results = []
    for is_captured in (False, True):
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        torch.manual_seed(0)
        prompt, token = torch.randint(3, 96, (2, 5), device="cuda"), torch.randint(3, 96, (2, 1), device="cuda")
        with torch.inference_mode():
            model(input_ids=prompt, past_key_values=cache)
            if not is_captured:
                steps = [model(input_ids=token, past_key_values=cache).logits.clone() for _ in range(3)]
                results.append(steps[-1])
                continue
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                model(input_ids=token, past_key_values=cache)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = model(input_ids=token, past_key_values=cache).logits
            graph.replay()
            graph.replay()
            results.append(out.clone())
    # In a capture transformers passes a mask to attention that it leaves out elsewhere.
    assert relative_error(results[1], results[0].double()) < 1e-4
