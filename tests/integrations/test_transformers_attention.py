"""patch_transformers(attention=True): one launch for norms and rotation of a layer, and all else as before."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import relative_error, same_bits
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import jitnorm
from jitnorm import patch_transformers
from jitnorm.batch_invariant import set_batch_invariant_mode
from jitnorm.integrations import transformers_attention, transformers_decode_attention
from jitnorm.integrations.decode_attention import VisibleTokens
from jitnorm.integrations.transformers_attention import PositionEmbeddings

from .common import ATTENTION_MODELS, LAYERS, attentions, batch, in_float64, logits
from .common import make_model as make

transformers = pytest.importorskip("transformers")

models = pytest.mark.parametrize("name", ATTENTION_MODELS)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Return the arguments of each call of the operator."""
    calls = []
    original = transformers_attention.normalise_and_rotate
    monkeypatch.setattr(
        transformers_attention, "normalise_and_rotate", lambda *a, **options: calls.append(a) or original(*a, **options)
    )
    return calls


@models
def test_what_is_replaced_and_restored(name):
    model, inputs = make(name), batch()
    classes = {path: type(module) for path, module in model.named_modules()}
    before = logits(model, inputs)
    norms_alone = patch_transformers(model, attention=False, layers=False).replaced
    assert not any("Attention" in cls or "Rotary" in cls for cls in norms_alone.values())
    patch = patch_transformers(model, layers=False)  # after the norms, which are left then
    assert list(patch.replaced.values()) == [f"{name}Attention"] * LAYERS + [f"{name}RotaryEmbedding"]
    assert set(patch.left.values()) == {"already replaced"} and set(patch.left) == set(norms_alone)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert jitnorm.unpatch_transformers(twin) == norms_alone | patch.replaced
        assert {path: type(module) for path, module in twin.named_modules()} == classes
        assert same_bits(logits(twin, inputs), before)
    patch.undo()
    assert {path: type(module) for path, module in model.named_modules()} == classes


class Operators(TorchDispatchMode):
    """Count the operators that are not views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operators_of_a_layer(name, attention):
    """Return how often one layer calls each operator: what a model of three layers calls more than one of two."""
    counts = []
    for layers in (2, 3):
        more = {"layer_types": ["full_attention"] * layers} if name == "Gemma3" else {}
        model, ids = make(name, num_hidden_layers=layers, **more), batch()["input_ids"]
        patch_transformers(model, attention=attention, layers=False)
        logits(model, {"input_ids": ids, "use_cache": False})
        with Operators() as seen:
            logits(model, {"input_ids": ids, "use_cache": False})
        counts.append(Counter(seen.names))
    return counts[1] - counts[0]


@models
def test_a_layer_calls_one_operator_instead_of_its_norms_and_its_rotation(name):
    before, after = operators_of_a_layer(name, False), operators_of_a_layer(name, True)
    # The rotation of transformers, of q and of k: x * cos + cat(-second half, first half) * sin.
    replaced = {"aten.mul.Tensor": 4, "aten.add.Tensor": 2, "aten.cat.default": 2, "aten.neg.default": 2}
    if name in ("Qwen3", "Gemma3"):
        replaced["jitnorm.gemma_rmsnorm.default" if name == "Gemma3" else "jitnorm.rmsnorm.default"] = 2
        replaced["aten.empty_like.default"] = 2
    assert before - after == Counter(replaced)
    assert after - before == {"jitnorm.qk_norm_rope_store_out.default": 1, "aten.new_empty.default": 2}


@models
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(name, cache, kernel_calls):
    model, inputs = make(name), batch()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    options = {k: v for k, v in options.items() if (k, v) != ("cache_implementation", "dynamic")}
    options["disable_compile"] = True
    before = model.generate(**inputs, **options)
    with patch_transformers(model):
        after = model.generate(**inputs, **options)
    assert after.shape == (3, 12) and len(kernel_calls) == 5 * LAYERS
    assert torch.equal(after, before)  # in float32; a tie within rounding is too rare to see


@models
def test_a_training_step_runs_the_original_attention(name, kernel_calls):
    model, inputs = make(name).train(), batch()
    grads = []
    for is_patched in (False, True):
        if is_patched:
            patch_transformers(model)
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({key: p.grad.clone() for key, p in model.named_parameters()})
    assert not kernel_calls
    for key, before in grads[0].items():
        # q and k norms' gradients are small differences of large terms.
        assert relative_error(grads[1][key], before.double()) < 1e-3 and before.any()


def test_a_frozen_model_calls_the_kernel_with_gradients_enabled(kernel_calls):
    model = make("Qwen3").requires_grad_(False)
    patch_transformers(model, layers=False)
    model(**batch())
    assert len(kernel_calls) == LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3", "Gemma3"])
def test_compiled(name, device):
    more = {"layer_types": ["full_attention"]} if name == "Gemma3" else {}
    model = make(name, device=device, num_hidden_layers=1, **more)  # the compiler takes seconds for each
    inputs = {"input_ids": batch(device)["input_ids"]}
    before = logits(model, inputs)
    patch_transformers(model, layers=False)
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(model, fullgraph=True, backend=backend)
        after = run(**inputs, use_cache=False).logits
    assert targets.count("jitnorm.qk_norm_rope_store_out") == 1
    assert relative_error(after, before.double()) < 1e-5
    torch._dynamo.reset()
    layer = copy.deepcopy(model).model.layers[0]
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for length in (5, 9):
            hidden = torch.randn(2, length, 128, device=device)
            arguments = {"layer_type": "full_attention"} if name == "Gemma3" else {}
            angles = model.model.rotary_emb(hidden, torch.arange(length, device=device)[None], **arguments)
            want = layer(hidden, position_embeddings=angles, attention_mask=None)
            assert same_bits(compiled(hidden, position_embeddings=angles, attention_mask=None), want)


def test_attentions_and_hooks_see_what_they_saw():
    """A hook on a projection keeps its output, which the kernel must not overwrite."""
    model, inputs = make("Qwen3", attn_implementation="eager"), batch()
    kept = []
    attentions(model)[0].q_proj.register_forward_hook(lambda module, arguments, out: kept.append(out))
    results = []
    for is_patched in (False, True):
        if is_patched:
            patch_transformers(model, layers=False)
        with torch.no_grad():
            results.append(model(**inputs, output_attentions=True, output_hidden_states=True))
    assert relative_error(kept[1], kept[0].double()) < 1e-6
    for field in ("attentions", "hidden_states"):
        before, after = (getattr(result, field) for result in results)
        assert len(before) == len(after) == LAYERS + (field == "hidden_states")
        assert all(relative_error(a, b.double()) < 1e-5 for a, b in zip(after, before, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("case", ["a plain pair", "rebuilt", "autocast", "float64", "other rows"])
def test_calls_that_run_the_original(case, kernel_calls):
    model = make("Qwen3", torch.float64 if case == "float64" else torch.float32)
    module, hidden = attentions(model)[0], torch.randn(2, 5, 128, dtype=next(model.parameters()).dtype)
    angles = model.model.rotary_emb(hidden, torch.arange(5)[None].repeat(2, 1))

    def call(angles):
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            return module(hidden, position_embeddings=angles, attention_mask=None)[0]

    before = call(angles)
    patch = patch_transformers(torch.nn.ModuleList([model.model.rotary_emb, module]), attention=True)
    assert "Qwen3Attention" in patch.replaced.values()
    for path, replaced in list(patch.replaced.items()):  # the norms' results are those of kernels: compare without
        if "RMSNorm" in replaced:
            getattr(module, path.rpartition(".")[2]).__class__ = type(model.model.norm)
    patched = model.model.rotary_emb(hidden, torch.arange(5)[None].repeat(2, 1))
    assert isinstance(patched, PositionEmbeddings)
    if case == "a plain pair":
        patched = angles
    elif case == "rebuilt":  # as accelerate does to move it
        patched = type(patched)(x.clone() for x in patched)
    elif case == "other rows":
        patched.positions = patched.positions[:5]
    after = call(patched)
    assert same_bits(after, before) and not kernel_calls


class LlamaAttention(torch.nn.Module):
    """A class with the name of transformers' that does something else."""

    def forward(self, hidden_states):
        return hidden_states


def test_modules_that_are_left_have_a_reason():
    model = make("Llama")
    instance = copy.deepcopy(attentions(model)[0])
    instance.forward = lambda hidden_states: hidden_states
    small = attentions(make("Llama", head_dim=40, num_attention_heads=2))[0]
    modules = {"namesake": LlamaAttention(), "instance": instance, "small": small}
    modules |= {"torch": torch.nn.MultiheadAttention(8, 1)}
    with pytest.warns(RuntimeWarning, match="replaced nothing"):
        patch = patch_transformers(torch.nn.ModuleDict(modules), attention=True)
    assert patch.left == {
        "namesake": "the forward of LlamaAttention is not the one of transformers that jitnorm knows",
        "instance": "its forward was replaced on the instance",
        "small": "no kernel supports head_dim 40",
        "torch": "MultiheadAttention is not a class that jitnorm supports",
    }


class DecodeKernel:
    """The definition of the kernel, for any device and dtype."""

    def __init__(self):
        self.masks, self.calls = [], 0

    def find_visible(self, mask):
        self.masks.append(mask)
        return VisibleTokens(mask, None, torch.zeros(mask.shape[0]))  # the models of these tests have one head of k

    def __call__(self, q, k, v, visible, out, scale):
        self.calls += 1
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        logits = torch.einsum("bhd,bhtd->bht", q, k) * scale
        weights = logits.masked_fill(~visible.mask[:, None], float("-inf")).softmax(-1)
        out.copy_(torch.einsum("bht,bhtd->bhd", weights, v))
        return True


@pytest.fixture
def decode_kernel(monkeypatch):
    kernel = DecodeKernel()
    monkeypatch.setattr(transformers_decode_attention, "_kernel", lambda *sizes: kernel)
    return kernel


@models
def test_decode_steps_with_a_static_cache(name, decode_kernel):
    """One call for each layer and step, with masks that are read once in a step: one of each kind of layer."""
    model, inputs = make(name), batch()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    before = model.generate(**inputs, **options, disable_compile=True)
    with patch_transformers(model):
        after = model.generate(**inputs, **options, disable_compile=True)
        calls, kinds = decode_kernel.calls, 2 if name == "Gemma3" else 1
        assert calls == 5 * LAYERS and len(decode_kernel.masks) == 5 * kinds
        model.generate(**{key: value[:1] for key, value in inputs.items()}, **options, disable_compile=True)
        assert decode_kernel.calls == 2 * calls
    assert torch.equal(after, before)
    # The first three rows have 0, 1 and 2 tokens of padding before their prompt of 7 tokens.
    mask = next(m for m in reversed(decode_kernel.masks) if m.shape[0] == 3 and (name != "Gemma3" or m.sum() > 12))
    if name != "Mistral":
        assert mask.sum(1).tolist() == [12, 11, 10]


def test_decode_steps_that_keep_the_attention_of_transformers(decode_kernel, monkeypatch):
    """Without a mask, with another attention, with a prompt, with "hf" rounding, in training, and what it lacks."""
    model, inputs = make("Qwen3"), batch()
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "disable_compile": True}
    static = options | {"cache_implementation": "static"}
    with patch_transformers(model):
        model.generate(inputs["input_ids"].clamp(min=3), **options)  # no padding, a dynamic cache: no mask
        with set_batch_invariant_mode():
            model.generate(**inputs, **static)
        logits(model, inputs)
        model.config._attn_implementation = "eager"
        model.generate(**inputs, **static)
        model.config._attn_implementation = "sdpa"
        model.double().generate(**inputs, **static)  # the patch leaves this dtype
        model.float()
        for module in attentions(model):
            module.attention_dropout = 0.5
        model.train().requires_grad_(False)
        model.generate(**inputs, **static)
        model.eval()
        assert not decode_kernel.calls
        model.generate(**inputs, **static)
        assert decode_kernel.calls == 2 * LAYERS
        monkeypatch.setattr(transformers_decode_attention, "_kernel", lambda *sizes: None)
        model.generate(**inputs, **static)
    with patch_transformers(model, rounding="hf"):
        monkeypatch.setattr(transformers_decode_attention, "_kernel", lambda *sizes: decode_kernel)
        model.generate(**inputs, **static)
    assert decode_kernel.calls == 2 * LAYERS


def test_a_mask_that_the_kernel_does_not_take(decode_kernel, monkeypatch):
    module = attentions(make("Qwen3"))[0]
    query, key = torch.randn(3, 2, 1, 64), torch.randn(3, 1, 9, 64)
    mask = torch.rand(3, 1, 1, 9) < 0.7
    mask[..., -1] = True
    sdpa = transformers.integrations.sdpa_attention.sdpa_attention_forward

    def attend(query=query, key=key, value=key, mask=mask, attention=sdpa, **options):
        masks = transformers_decode_attention.MasksOfForward()
        return transformers_decode_attention.attend(masks, module, attention, query, key, value, mask, 0.1, options)

    expected = sdpa(module, query, key, key, mask, scaling=0.1)[0]
    assert relative_error(attend(), expected.double()) < 1e-6
    assert relative_error(attend(sliding_window=4, is_causal=None, position_ids=None), expected.double()) < 1e-6
    assert attend(mask=mask[:1]) is not None and decode_kernel.masks[-1].shape == (3, 9)  # one mask of all sequences
    for change in (
        {"mask": None},
        {"mask": mask.float()},
        {"mask": mask[:2]},
        {"mask": mask[..., :8]},
        {"mask": mask.expand(3, 2, 1, 9)},
        {"query": query.expand(3, 2, 2, 64)},
        {"query": query.double()},
        {"value": key.double()},
        {"query": query.clone().requires_grad_()},
        {"key": key.clone().requires_grad_()},
        {"attention": lambda *arguments: None},
        {"softcap": 30.0},
        {"is_causal": True},
        {"output_attentions": True},
        {"softcap": 0.0},
        {"position_bias": torch.zeros(1, 2, 1, 9)},
        {"cache": SimpleNamespace()},
    ):
        assert attend(**change) is None, change
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *arguments: None)
        assert attend() is None
    with torch.device("cpu"):
        assert attend() is not None
        with BaseTorchFunctionMode():
            assert attend() is None
    with BaseTorchFunctionMode(), torch.device("cpu"):
        assert attend() is None
    decode_kernel.find_visible = lambda mask: None
    assert attend() is None


@torch.no_grad()
def test_a_mask_that_changes_is_read_again(decode_kernel):
    """Position embeddings, which have what is known of a mask, may be used in several steps."""
    masks, key = transformers_decode_attention.MasksOfForward(), torch.randn(3, 1, 9, 64)
    mask = torch.ones(3, 1, 1, 9, dtype=torch.bool)
    layers = [object(), object(), object()]
    first = masks.find(decode_kernel, mask, key, layers[0])
    assert masks.find(decode_kernel, mask, key, layers[1]) is first
    mask[..., 4] = False
    assert masks.find(decode_kernel, mask, key, layers[2]) is not first and len(decode_kernel.masks) == 2
    with torch.inference_mode():
        other = torch.ones(3, 1, 1, 9, dtype=torch.bool)  # which has no version
        for step in range(3):
            other[..., step] = False
            found = [masks.find(decode_kernel, other, key, layer) for layer in layers]
            assert found[0] is found[1] is found[2]
            assert len(decode_kernel.masks) == 3 + step and not decode_kernel.masks[-1][..., step].any()
    assert len(masks._found) == 1  # nothing is kept of earlier steps


def test_a_replacement_of_pytorchs_attention_before_the_import(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *arguments: None)
    spec = importlib.util.find_spec("jitnorm.integrations.transformers_decode_attention")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sdpa = transformers.integrations.sdpa_attention.sdpa_attention_forward
    assert not module._is_sdpa(sdpa)
    monkeypatch.undo()
    assert module._is_sdpa(sdpa)


def test_there_is_no_decode_kernel_for_a_cpu():
    arguments = (2, 1, 64, torch.bfloat16, torch.device("cpu"))
    assert transformers_decode_attention._kernel(*arguments) is None


@pytest.mark.parametrize(
    ("change", "is_there"),
    [
        ({}, True),
        ({"heads": 34}, False),
        ({"head_dim": 96}, False),
        ({"dtype": torch.float32}, False),
        ({"arch": "7.5"}, False),
        ({"error": RuntimeError("no compiler")}, False),
    ],
)
def test_which_decode_kernels_there_are(change, is_there, monkeypatch, caplog):
    made = []

    def create(*arguments):
        if "error" in change:
            raise change["error"]
        made.append(arguments)
        return "the kernel"

    target = SimpleNamespace(arch=change.get("arch", "9.0a"))
    monkeypatch.setattr(transformers_decode_attention, "cuda_target", lambda index: target)
    monkeypatch.setattr(transformers_decode_attention, "MaskedDecodeAttention", create)
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16} | change
    arguments = (*(sizes[name] for name in ("heads", "kv_heads", "head_dim", "dtype")), torch.device("cuda", 0))
    transformers_decode_attention._kernel.cache_clear()
    found = transformers_decode_attention._kernel(*arguments)
    transformers_decode_attention._kernel.cache_clear()
    assert found == ("the kernel" if is_there else None) and made == [arguments] * is_there
    said = "PyTorch computes the attention of decode steps: no compiler"
    assert (said in caplog.text) == ("error" in change)


@pytest.mark.gpu
@models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_steps_on_a_gpu(name, dtype):
    """Logits of decode steps after a padded prompt are as close to a float64 model's as those of transformers."""
    model, inputs = make(name, dtype, "cuda"), batch("cuda")
    tokens = torch.randint(3, 96, (3, 5), device="cuda")

    def decode(model):
        cache = transformers.StaticCache(config=model.config, max_cache_len=21)
        mask = inputs["attention_mask"]
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            steps = []
            for i in range(tokens.shape[1]):
                mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
                positions = mask.sum(1, keepdim=True) - 1
                step = model(tokens[:, i : i + 1], attention_mask=mask, position_ids=positions, past_key_values=cache)
                steps.append(step.logits)
        return torch.cat(steps, dim=1)

    exact, before = decode(in_float64(model)), decode(model)
    calls = []
    attend = transformers_attention.attend
    with patch_transformers(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_attention, "attend", lambda *a: calls.append(attend(*a)) or calls[-1])
        after = decode(model)
    assert len(calls) == 5 * LAYERS and not any(call is None for call in calls)
    assert relative_error(after, exact) <= 1.1 * relative_error(before, exact)
