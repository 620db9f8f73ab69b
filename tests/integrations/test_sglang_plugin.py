"""SGLang's plugin, with the classes of SGLang 0.5.16 itself.

Without a GPU, SGLang's modules and pools run in PyTorch, without its compiled kernels; with one they run these.
test_sglang_engine.py runs its ModelRunner.
"""

from __future__ import annotations

import copy
import functools
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, relative_error, rmsnorm_reference, same_bits
from processes import run_before_import

from jitnorm.core.targets import target_of
from jitnorm.integrations import sglang_plugin
from jitnorm.integrations.sglang_plugin import attention, deterministic, layers, replacement, store, tested
from jitnorm.integrations.sglang_plugin.replacement import LoadedModel, Report

ROOT = Path(__file__).parents[2]
DTYPE, DEVICE = torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, HEAD_DIM, HEADS, KV_HEADS, TOKENS, EPS = 512, 64, 4, 2, 7, 1e-5
E4M3 = torch.float8_e4m3fn


@pytest.fixture
def args():
    """Publish arguments of a server, as SGLang's own tests do, and return them."""
    pytest.importorskip("sglang.srt.runtime_context", reason="SGLang cannot be imported")
    from sglang.srt.runtime_context import get_context

    server_args = SimpleNamespace(
        rl_on_policy_target=None,
        speculative_algorithm=None,
        dcp_size=1,
        enable_prefill_context_parallel=False,
        attn_cp_size=1,
        enable_two_batch_overlap=False,
        forward_hooks=None,
        cuda_graph_config=SimpleNamespace(prefill=SimpleNamespace(tc_compiler="eager")),
    )
    context = get_context()
    before = context._server_args
    context.set_server_args(server_args)
    yield server_args
    context._server_args = before


@pytest.fixture
def sources():
    """Let a test change what `source_problem` reads."""
    tested.source_problem.cache_clear()
    yield tested.SOURCES
    tested.source_problem.cache_clear()


def loaded(module: torch.nn.Module, dtype: torch.dtype = DTYPE) -> LoadedModel:
    device = torch.device(DEVICE)
    return LoadedModel(module, dtype, device, target_of(torch.empty(0, device=device)), Report("test"))


def installed(module: torch.nn.Module) -> Report:
    """Replace the norms and activations of a module, and return the report."""
    model = loaded(module)
    replacement.install(layers.layer_replacements(model), model.report)
    return model.report


def norm_of(name: str, size: int = HIDDEN, **options) -> torch.nn.Module:
    """Return a norm of SGLang's with a random weight."""
    module = importlib.import_module("sglang.srt.layers.layernorm")
    norm = getattr(module, name)(size, eps=EPS, **options).to(DEVICE, DTYPE)
    norm.weight = norm.weight if isinstance(norm.weight, torch.nn.Parameter) else norm.weight.to(DEVICE, DTYPE)
    if not isinstance(norm.weight, torch.nn.Parameter):
        return norm
    torch.nn.init.normal_(norm.weight.data if name == "RMSNorm" else norm.weight, mean=1.0, std=0.3)
    return norm


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, DTYPE)


class TestRegister:
    def run(self, tmp_path, script: str, **environment: str) -> str:
        """Run a script in a new process, and return the last line that it prints."""
        unset = dict.fromkeys(("JITNORM_SGLANG", "SGLANG_PLUGINS", "TRITON_INTERPRET"))
        done = run_before_import(f"import os; os.chdir({str(tmp_path)!r})", script, **{**unset, **environment})
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip().splitlines()[-1]

    def test_the_entry_point_is_register(self):
        text = (ROOT / "pyproject.toml").read_text()
        (target,) = re.findall(r'^\[project\.entry-points\."sglang\.srt\.plugins"\]\njitnorm = "(.+)"$', text, re.M)
        module, name = target.split(":")
        assert getattr(importlib.import_module(module), name) is sglang_plugin.register

    def test_importing_the_plugin_imports_no_engine(self, tmp_path):
        script = "import sys; import jitnorm.integrations.sglang_plugin; print('sglang' in sys.modules)"
        assert self.run(tmp_path, script) == "False"

    @pytest.mark.parametrize(
        "environment",
        [
            {},
            {"JITNORM_SGLANG": "0"},
            {"SGLANG_PLUGINS": "other"},
            {"JITNORM_SGLANG": "0", "SGLANG_PLUGINS": "jitnorm"},
        ],
    )
    def test_it_is_off_unless_asked_for(self, tmp_path, environment):
        script = """
import sys
from jitnorm.integrations import sglang_plugin
sglang_plugin.register()
print("sglang" in sys.modules, *sglang_plugin.explain())
"""
        assert self.run(tmp_path, script, **environment).startswith("False jitnorm in SGLang: the plugin is off")

    @pytest.mark.parametrize("environment", [{"JITNORM_SGLANG": "1"}, {"SGLANG_PLUGINS": "other, jitnorm"}])
    def test_it_registers_each_hook_once(self, tmp_path, environment):
        pytest.importorskip("sglang", reason="SGLang cannot be imported")
        script = """
from jitnorm.integrations import sglang_plugin
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.model_executor.model_runner import ModelRunner
sglang_plugin.register()
sglang_plugin.register()
HookRegistry.apply_hooks()
from sglang.srt.models import qwen3_moe, utils
assert qwen3_moe.apply_qk_norm is utils.apply_qk_norm and hasattr(utils.apply_qk_norm, "__wrapped__")
assert hasattr(ModelRunner.init_cuda_graphs, "__wrapped__")
hooks = [len(hooks) for hooks in HookRegistry._hooks.values()]
assert not sglang_plugin._parts_left

from types import SimpleNamespace
from sglang.srt import batch_invariant_ops
from sglang.srt.batch_invariant_ops import batch_invariant_ops as ops
from sglang.srt.runtime_context import get_context
get_context().set_server_args(SimpleNamespace(rl_on_policy_target=None))
ops.get_dispatch_device_backend = lambda: "CPU"  # SGLang knows GPUs only
batch_invariant_ops.enable_batch_invariant_mode()
assert not sglang_plugin._parts_left
assert ops.is_batch_invariant_mode_enabled()
import torch
from jitnorm.batch_invariant import matmul_persistent
a, b = torch.randn(37, 129), torch.randn(129, 65)
assert torch.equal(torch.mm(a, b), matmul_persistent(a, b)) and torch.equal(torch.mm(a[:1], b), torch.mm(a, b)[:1])
assert all(getattr(ops, name) is f for name, f in sglang_plugin.deterministic.FUNCTIONS.items())
print(hooks, *sglang_plugin.explain())
"""
        assert self.run(tmp_path, script, **environment) == "[1, 1, 1]"

    @pytest.mark.parametrize("version", ["0.5.15", "0.6.0", "0.6.0rc1", "1.0", "unknown"])
    def test_another_version_is_left_alone(self, monkeypatch, version):
        sglang = pytest.importorskip("sglang", reason="SGLang cannot be imported")
        from sglang.srt.plugins.hook_registry import HookRegistry

        monkeypatch.setattr(sglang, "__version__", version)
        monkeypatch.setattr(sglang_plugin, "_status", "new")
        monkeypatch.setenv("JITNORM_SGLANG", "1")
        hooks = {target: list(registered) for target, registered in HookRegistry._hooks.items()}
        sglang_plugin.register()
        assert hooks == dict(HookRegistry._hooks)
        (report,) = sglang_plugin.explain()
        assert "nothing was replaced" in str(report) and version in str(report)

    @pytest.mark.parametrize("version", ["0.5.16", "0.5.16.post1", "0.5.17"])
    def test_later_versions_are_tried(self, version):
        assert tested.version_problem(version) is None


class TestSources:
    @pytest.mark.parametrize("part", tested.SOURCES)
    def test_all_are_those_of_this_sglang(self, args, sources, part):
        problem = tested.source_problem(part)
        if part.startswith("Flash") and problem and "cannot be read" in problem:
            pytest.skip(f"the backend needs compiled kernels: {problem}")
        assert problem is None

    def test_a_changed_source_is_left_alone(self, args, sources, monkeypatch):
        name = "sglang.srt.layers.layernorm:RMSNorm.forward_cuda"
        monkeypatch.setitem(sources["RMSNorm"], name, "0" * 16)
        model = torch.nn.ModuleList([norm_of("RMSNorm"), norm_of("GemmaRMSNorm")])
        report = installed(model)
        assert report.left == {("RMSNorm", f"the source of {name} is not that of SGLang 0.5.16"): 1}
        assert [what for what, _ in report.replaced] == [f"GemmaRMSNorm of {HIDDEN}"]
        assert model[0]._forward_method == model[0].dispatch_forward()

    def test_a_function_that_other_code_wraps_is_left_alone(self, args, sources, monkeypatch):
        from sglang.srt.layers.activation import SiluAndMul
        from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

        wrapped = _wrap_fn(SiluAndMul.forward_cuda, lambda original, self, x: original(self, x), HookType.AROUND)
        monkeypatch.setattr(SiluAndMul, "forward_cuda", wrapped)
        ((_, reason),) = installed(SiluAndMul()).left
        assert reason == "sglang.srt.layers.activation:SiluAndMul.forward_cuda is wrapped by other code"


class TestNorms:
    @pytest.mark.parametrize("name", ["RMSNorm", "GemmaRMSNorm", "Gemma3RMSNorm"])
    @pytest.mark.parametrize("shape", [(1, HIDDEN), (TOKENS, HIDDEN), (3, 5, HIDDEN), (0, HIDDEN)])
    def test_it_computes_what_sglang_computes(self, args, name, shape):
        norm, x = norm_of(name), inputs(*shape)
        before, kept = norm.forward_native(x), x.clone()
        assert installed(norm).replaced
        out = norm(x)
        assert same_bits(x, kept)
        assert out.shape == before.shape
        if x.numel():
            offset = 0.0 if name == "RMSNorm" else 1.0
            reference = rmsnorm_reference(x, norm.weight.double() + offset, EPS)
            assert relative_error(out, reference) < TOLERANCE[DTYPE]
            assert relative_error(out, reference) <= 1.01 * relative_error(before, reference)

    @pytest.mark.parametrize("name", ["RMSNorm", "GemmaRMSNorm"])
    @pytest.mark.parametrize("tokens", [1, TOKENS])
    def test_with_a_residual_both_are_written(self, args, name, tokens):
        norm, x, residual = norm_of(name), inputs(tokens, HIDDEN), inputs(tokens, HIDDEN)
        exact = x.double() + residual.double()
        before = norm.forward_native(x.clone(), residual.clone())
        assert installed(norm).replaced
        out, total = norm(x, residual)
        assert out is x
        assert total is residual
        assert same_bits(total, before[1])
        reference = rmsnorm_reference(exact, norm.weight.double() + (name == "GemmaRMSNorm"), EPS)
        assert relative_error(out, reference) < TOLERANCE[DTYPE]
        assert relative_error(out, reference) <= 1.01 * relative_error(before[0], reference)

    # What jitnorm.rmsnorm refuses: gpt-oss' size, an odd one, no weight, and the rounding of Hugging Face's classes.
    @pytest.mark.parametrize(
        "options",
        [{"size": 2880}, {"size": 301}, {"has_weight": False}, {"cast_x_before_out_mul": True}],
        ids=["2880", "301", "no_weight", "hf"],
    )
    def test_other_sizes_and_forms(self, args, options):
        norm = norm_of("RMSNorm", **options)
        x, residual = (inputs(TOKENS, norm.hidden_size) for _ in range(2))
        weight = norm.weight.to(x) if norm.has_weight else torch.ones_like(x[0])
        before = norm.forward_native(x.clone()), *norm.forward_native(x.clone(), residual.clone())
        assert "general_rmsnorm" in str(installed(norm).replaced)
        total = x.double() + residual.double()
        results = norm(x), *norm(x, residual)
        assert same_bits(results[2], before[2])
        for result, stock, exact in [(results[0], before[0], None), (results[1], before[1], total)]:
            if options.get("cast_x_before_out_mul"):
                assert (result == stock).float().mean() > 0.98  # they add squares in another order
            elif exact is not None:
                reference = rmsnorm_reference(exact, weight.double(), EPS)
                assert relative_error(result, reference) <= 1.01 * relative_error(stock, reference)

    def test_heads_of_other_sizes_call_the_kernel_that_was_built(self, args, monkeypatch):
        norm, x = norm_of("RMSNorm", 80), inputs(TOKENS, 3 * HEADS, 80)[:, HEADS : 2 * HEADS]
        model = loaded(norm)
        replacement.install(layers.layer_replacements(model), model.report)
        monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
        assert relative_error(norm(x), rmsnorm_reference(x, norm.weight.double(), EPS)) < TOLERANCE[DTYPE]

    def test_transposed_heads_are_copied(self, args):
        norm, x = norm_of("Gemma3RMSNorm", HEAD_DIM), inputs(TOKENS, HEADS, HEAD_DIM).transpose(0, 1)[None]
        installed(norm)
        reference = rmsnorm_reference(x, norm.weight.double() + 1, EPS)
        assert relative_error(norm(x), reference) < TOLERANCE[DTYPE]

    def test_a_weight_that_is_loaded_later_is_used(self, args):
        norm, x = norm_of("RMSNorm"), inputs(TOKENS, HIDDEN)
        installed(norm)
        norm(x)
        norm.weight.data.mul_(3)
        assert relative_error(norm(x), rmsnorm_reference(x, norm.weight, EPS)) < TOLERANCE[DTYPE]

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"size": 65537}, "no kernel supports a hidden size of 65537"),
            ({"var_hidden_size": 256}, "normalises by a part of a row"),
            ({"fp32_residual": True}, "keeps its residual in float32"),
            ({"override_orig_dtype": torch.float32}, "keeps its residual in float32"),
        ],
    )
    def test_others_are_left_with_a_reason(self, args, options, reason):
        norm = norm_of("RMSNorm", **options)
        ((_, given),) = installed(norm).left
        assert reason in given
        assert norm._forward_method == norm.dispatch_forward()

    @pytest.mark.parametrize("part", ["norms", "activations"])
    def test_parts_that_the_environment_skips_are_left(self, args, part, monkeypatch):
        activation = importlib.import_module("sglang.srt.layers.activation").SiluAndMul()
        modules = torch.nn.ModuleDict({"norm": norm_of("RMSNorm"), "activation": activation})
        monkeypatch.setenv("JITNORM_PLUGIN_SKIP", part)
        report = installed(modules)
        what = "RMSNorm" if part == "norms" else "SiluAndMul"
        assert list(report.left) == [(what, f"JITNORM_PLUGIN_SKIP names {part}")] and len(report.replaced) == 1

    def test_a_method_that_sglang_has_chosen_is_left(self, args):
        norm = norm_of("RMSNorm")
        norm.enter_torch_compile(1)
        norm._forward_method = norm.forward_cpu
        ((_, reason),) = installed(norm).left
        assert reason == "SGLang has chosen another of its methods for it"

    @pytest.mark.skipif(DEVICE == "cuda", reason="SGLang's CUDA kernels refuse this call too")
    def test_calls_that_the_operator_refuses_go_to_sglang(self, args, caplog):
        norm, x = norm_of("RMSNorm"), inputs(TOKENS, HIDDEN)
        expected = norm(x.float())
        report = installed(norm)
        assert same_bits(norm(x.float()), expected)
        norm(x.float())
        assert list(report.calls) == [f"RMSNorm of {HIDDEN}"]
        assert len([record for record in caplog.records if "was left to the engine" in record.message]) == 1
        assert f"calls left: RMSNorm of {HIDDEN}: " in str(report)
        residual, addition = inputs(TOKENS, HIDDEN), inputs(TOKENS, HIDDEN)
        expected = norm.forward_native(x.clone(), residual.clone(), addition)
        out = norm(x, residual, addition)
        assert same_bits(out[0], expected[0])
        assert same_bits(out[1], expected[1])

    def test_compiled_graphs_get_sglangs_own(self, args):
        norm = norm_of("RMSNorm")
        installed(norm)
        ours = norm._forward_method
        norm.enter_torch_compile(1)
        assert norm._forward_method == norm.forward_native
        norm.leave_torch_compile()
        assert norm._forward_method is ours


def test_a_compiled_graph_of_replaced_modules(args):
    """Norms and activations are SGLang's own in graphs that SGLang compiles, and can be traced."""
    norm, layer = norm_of("RMSNorm"), importlib.import_module("sglang.srt.layers.activation").SiluAndMul()
    x = inputs(TOKENS, HIDDEN)
    expected = layer.forward_native(norm.forward_native(x))
    installed(torch.nn.ModuleList([norm, layer]))
    for module in (norm, layer):
        module.enter_torch_compile(1)
    assert same_bits(torch.compile(lambda x: layer(norm(x)), backend="eager", fullgraph=True)(x), expected)


class TestActivations:
    @pytest.mark.parametrize("name", ["SiluAndMul", "GeluAndMul", "GeluAndMul none"])
    @pytest.mark.parametrize("shape", [(TOKENS, 192), (2, 3, 2 * 37 * 2), (0, 192)])
    def test_it_computes_what_sglang_computes(self, args, name, shape):
        module = importlib.import_module("sglang.srt.layers.activation")
        name, _, approximate = name.partition(" ")
        layer = getattr(module, name)(*([approximate] if approximate else []))
        x = inputs(*shape)
        before = layer.forward_native(x)
        assert installed(layer).replaced
        out = layer(x)
        gate, up = x.double().chunk(2, dim=-1)
        activated = F.silu(gate) if name == "SiluAndMul" else F.gelu(gate, approximate=approximate or "tanh")
        assert out.shape == before.shape
        if x.numel():
            assert relative_error(out, activated * up) < TOLERANCE[DTYPE]
            assert relative_error(out, activated * up) <= 1.01 * relative_error(before, activated * up)


class TestQKNorm:
    """The hook around apply_qk_norm, for models whose attention is not replaced."""

    def call(self, q_norm, k_norm, q, k, **options):
        module = importlib.import_module("sglang.srt.models.utils")
        return layers.apply_qk_norm(module.apply_qk_norm, q, k, q_norm, k_norm, HEAD_DIM, **options)

    def norms(self) -> torch.nn.ModuleDict:
        return torch.nn.ModuleDict({name: norm_of("RMSNorm", HEAD_DIM) for name in ("q_norm", "k_norm")})

    @pytest.mark.parametrize("in_place", [True, False])
    def test_heads_of_both(self, args, in_place):
        norms = self.norms()
        qkv = inputs(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        q, k, _ = qkv.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=-1)
        exact = [
            rmsnorm_reference(x.unflatten(-1, (-1, HEAD_DIM)), norms[name].weight, EPS).flatten(1)
            for x, name in ((q, "q_norm"), (k, "k_norm"))
        ]
        assert installed(norms).replaced == {(f"RMSNorm of {HEAD_DIM}", "rmsnorm and fused_inplace_qknorm"): 2}
        out = self.call(norms["q_norm"], norms["k_norm"], q, k, allow_inplace=in_place)
        assert (out[0] is q) == in_place
        for x, reference in zip(out, exact, strict=True):
            assert relative_error(x, reference) < TOLERANCE[DTYPE]

    def test_norms_that_were_not_replaced_are_sglangs(self, args):
        norms, q, k = self.norms(), inputs(TOKENS, HEADS * HEAD_DIM), inputs(TOKENS, KV_HEADS * HEAD_DIM)
        called = layers.apply_qk_norm(lambda *given: given, q, k, norms["q_norm"], norms["k_norm"], HEAD_DIM)
        assert called == (q, k, norms["q_norm"], norms["k_norm"], HEAD_DIM, None, True)


def pool_of(dtype: torch.dtype = DTYPE, cls: str = "MHATokenToKVPool", **options):
    """Return a real pool of two layers, 3 and 4 of a model."""
    module = importlib.import_module("sglang.srt.mem_cache.memory_pool")
    sizes = {"size": 40, "page_size": 1, "head_num": KV_HEADS, "head_dim": HEAD_DIM, "layer_num": 2}
    return getattr(module, cls)(
        **{**sizes, "dtype": dtype, "device": DEVICE, "enable_memory_saver": False, "start_layer": 3, **options}
    )


def runner_of(args, pool) -> SimpleNamespace:
    """Return what `find_store` reads of a ModelRunner."""
    backends = importlib.import_module("sglang.srt.layers.attention.torch_native_backend")
    backend = backends.TorchNativeAttnBackend.__new__(backends.TorchNativeAttnBackend)
    backend.token_to_kv_pool = pool
    return SimpleNamespace(server_args=args, token_to_kv_pool=pool, attn_backend=backend)


def layer_of(k_scale=None, v_scale=None, **options) -> SimpleNamespace:
    """Return what `find_store` reads of an attention layer; its RadixAttention is SGLang's."""
    radix = importlib.import_module("sglang.srt.layers.radix_attention")
    attn = radix.RadixAttention(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, **{"layer_id": 4, **options})
    attn.k_scale, attn.v_scale = k_scale, v_scale
    return SimpleNamespace(attn=attn, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)


def triton_backend(pool) -> SimpleNamespace:
    """Return SGLang's attention backend for a pool, without what it prepares for launches."""
    cls = importlib.import_module("sglang.srt.layers.attention.triton_backend").TritonAttnBackend
    backend = cls.__new__(cls)
    backend.token_to_kv_pool = pool
    return backend


class TestStore:
    """Where k and v are stored, with real pools."""

    @pytest.mark.parametrize("has_norms", [True, False])
    @pytest.mark.parametrize(
        ("cache_dtype", "scales"), [(DTYPE, (None, None)), (E4M3, (None, None)), (E4M3, (0.5, 2.0))]
    )
    def test_the_launch_writes_what_sglangs_steps_write(self, args, has_norms, cache_dtype, scales):
        from sglang.srt.layers.rotary_embedding import base

        module = importlib.import_module("sglang.srt.layers.rotary_embedding.base")
        module._is_cpu, before = True, module._is_cpu
        try:
            rotary = base.RotaryEmbedding(HEAD_DIM, HEAD_DIM, 64, 10000, True, torch.float32).to(DEVICE)
        finally:
            module._is_cpu = before
        pool, expected = pool_of(cache_dtype), pool_of(cache_dtype)
        for caches in (pool.k_buffer, pool.v_buffer, expected.k_buffer, expected.v_buffer):
            for cache in caches:
                cache.fill_(3)
        scales = [None if scale is None else torch.tensor(scale, device=DEVICE) for scale in scales]
        runner = runner_of(args, pool)
        runner.attn_backend = triton_backend(pool)
        found = store.find_store(runner, layer_of(*scales), DTYPE)
        norms = (norm_of("RMSNorm", HEAD_DIM), norm_of("RMSNorm", HEAD_DIM)) if has_norms else None
        heads = attention.Heads((HEADS, KV_HEADS, KV_HEADS), HEAD_DIM, norms, EPS, 0.0)
        prepare = attention._make_prepare(heads, True, found)
        qkv = inputs(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        positions = torch.randint(64, (TOKENS,), device=DEVICE)
        slots = torch.randperm(41, device=DEVICE)[:TOKENS]

        q, k, v = qkv.clone().split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=-1)
        if norms:
            q, k = (n.forward_native(x.reshape(-1, HEAD_DIM)).view(x.shape) for n, x in zip(norms, (q, k), strict=True))
        q, k = rotary.forward_native(positions, q, k)
        k, v = k.view(TOKENS, KV_HEADS, HEAD_DIM), v.view(TOKENS, KV_HEADS, HEAD_DIM)
        given = [] if scales[0] is None else [float(scale) for scale in scales]
        expected.set_kv_buffer(layer_of().attn, slots, k.clone(), v.clone(), *given)  # divides k and v in place

        out = prepare(qkv, rotary.cos_sin_cache, positions, slots)
        assert out[0].shape == (TOKENS, HEADS * HEAD_DIM)
        assert relative_error(out[0], q.double()) < 2 * TOLERANCE[DTYPE]
        assert relative_error(out[1], k.double()) < 2 * TOLERANCE[DTYPE]
        assert same_bits(out[2], v)
        assert same_bits(pool.v_buffer[1], expected.v_buffer[1])
        k_cache, k_expected = pool.get_key_buffer(4), expected.get_key_buffer(4)
        tolerance = 2 * TOLERANCE[DTYPE] if cache_dtype == DTYPE else 0.03  # a code of float8 is 6% from the next
        assert relative_error(k_cache.float(), k_expected.double()) < tolerance
        others = torch.ones(41, dtype=torch.bool, device=DEVICE).index_fill(0, slots, False)
        assert same_bits(pool.k_buffer[1][others], expected.k_buffer[1][others])
        assert same_bits(pool.k_buffer[0], expected.k_buffer[0])

    def test_scales_of_float8_caches(self, args):
        scales = torch.nn.Parameter(torch.tensor(0.5), requires_grad=False), torch.tensor(2.0)
        runner = runner_of(args, pool_of(E4M3))
        reason = store.find_store(runner, layer_of(*scales), DTYPE)
        assert reason == "TorchNativeAttnBackend does not scale float8 caches"
        runner.attn_backend = triton_backend(runner.token_to_kv_pool)
        found = store.find_store(runner, layer_of(*scales), DTYPE)
        assert [float(scale) for scale in found.scales] == [0.5, 2.0]
        assert found.index == 1
        assert "scales of its float8 caches" in store.find_store(runner, layer_of(0.5, 0.5), DTYPE)
        assert store.find_store(runner_of(args, pool_of()), layer_of(*scales), DTYPE).scales == (None, None)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"speculative_algorithm": "EAGLE"}, "speculative decoding is on"),
            ({"dcp_size": 2}, "decode context parallelism is on"),
            ({"attn_cp_size": 2}, "prefill context parallelism is on"),
            ({"enable_prefill_context_parallel": True}, "prefill context parallelism is on"),
            ({"enable_two_batch_overlap": True}, "two-batch overlap is on"),
        ],
    )
    def test_options_that_move_the_store(self, args, change, reason):
        vars(args).update(change)
        assert store.find_store(runner_of(args, pool_of()), layer_of(), DTYPE) == reason

    @pytest.mark.parametrize(
        ("pool", "layer", "reason"),
        [
            ({"cls": "NoOpMHATokenToKVPool"}, {}, "its caches are in a NoOpMHATokenToKVPool"),
            ({"dtype": torch.float8_e5m2}, {}, "no kernel stores torch.bfloat16 into caches of torch.float8_e5m2"),
            ({"v_head_dim": 32}, {}, "its caches do not have rows of [2, 64]"),
            ({"head_num": 4}, {}, "its caches do not have rows of [2, 64]"),
            ({}, {"layer_id": 9}, "its pool has no caches for it"),
            ({"kv_cache_layout": "other"}, {}, "have the layout other"),
        ],
    )
    def test_other_pools(self, args, pool, layer, reason):
        assert reason in store.find_store(runner_of(args, pool_of(**pool)), layer_of(**layer), DTYPE)

    def test_a_pool_or_backend_that_was_changed(self, args):
        runner = runner_of(args, pool_of())
        runner.token_to_kv_pool.set_kv_buffer = lambda *args: None
        assert "was replaced on the instance" in store.find_store(runner, layer_of(), DTYPE)
        runner = runner_of(args, pool_of())
        runner.attn_backend.token_to_kv_pool = pool_of()
        assert store.find_store(runner, layer_of(), DTYPE) == "its attention backend has another pool"
        runner.attn_backend = SimpleNamespace(token_to_kv_pool=runner.token_to_kv_pool)
        reason = store.find_store(runner, layer_of(), DTYPE)
        assert reason == "SimpleNamespace is not a tested attention backend"


def attention_of(name: str, **options) -> torch.nn.Module:
    """Return a real attention layer of one process, whose RadixAttention records its arguments and returns q."""
    from sglang.srt.layers.rotary_embedding import base
    from sglang.srt.runtime_context import get_parallel

    module = importlib.import_module(attention.ATTENTION_CLASSES[name])
    sizes = {"hidden_size": 256, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "layer_id": 4, **options}
    if name == "LlamaAttention":
        sizes["config"] = SimpleNamespace(head_dim=HEAD_DIM)
    else:
        sizes["head_dim"] = HEAD_DIM
    if name == "Qwen3Attention":
        sizes["rms_norm_eps"] = EPS
    base._is_cpu, before = True, base._is_cpu  # else SGLang looks for another package's kernels
    try:
        with get_parallel().override(tp_size=1, tp_rank=0, attn_tp_size=1, attn_tp_rank=0):
            layer = getattr(module, name)(**sizes).to(DEVICE)
    finally:
        base._is_cpu = before
    for parameter in layer.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape).to(DEVICE, DTYPE)
    layer.attn.forward = lambda q, k, v, batch, save_kv_cache=True: record(layer, q, k, v, save_kv_cache)
    layer.o_proj.forward = lambda output: (output, None)  # it would need a group of processes
    return layer


def record(layer, q, k, v, save_kv_cache):
    heads = k.reshape(k.shape[0], KV_HEADS, HEAD_DIM), v.reshape(v.shape[0], KV_HEADS, HEAD_DIM)
    layer.recorded = q.clone(), *(x.clone() for x in heads), save_kv_cache
    return q.contiguous()


class TestAttention:
    """The forward of SGLang's attention layers, up to the attention kernel."""

    def replaced(self, layer, args, pool) -> Report:
        model = loaded(torch.nn.ModuleList([layer]))
        candidates = [candidate for _, candidate in attention.attention_replacements(runner_of(args, pool), model)]
        replacement.install(candidates, model.report)
        return model.report

    @pytest.mark.parametrize("name", ["Qwen3Attention", "Qwen2Attention", "LlamaAttention"])
    @pytest.mark.parametrize("tokens", [1, TOKENS])
    def test_q_k_v_and_the_caches_are_sglangs(self, args, name, tokens):
        layer, pool, expected = attention_of(name), pool_of(), pool_of()
        hidden, positions = inputs(tokens, 256), torch.randint(1000, (tokens,), device=DEVICE)
        slots = torch.randperm(41, device=DEVICE)[:tokens]
        batch = SimpleNamespace(out_cache_loc=slots, forward_mode=SimpleNamespace(is_decode=lambda: True))
        with torch.no_grad():
            before = layer(positions=positions, hidden_states=hidden, forward_batch=batch)
            stock = layer.recorded
            expected.set_kv_buffer(layer.attn, slots, *stock[1:3])
            report = self.replaced(layer, args, pool)
            assert [by for _, by in report.replaced] == ["qk_norm_rope_store"]
            assert not report.left
            out = layer(positions=positions, hidden_states=hidden, forward_batch=batch)
        assert stock[3] is True
        assert layer.recorded[3] is False
        assert layer.recorded[0].shape == stock[0].shape
        for ours, theirs in zip(layer.recorded[:3], stock[:3], strict=True):
            assert relative_error(ours, theirs.double()) < 2 * TOLERANCE[DTYPE]
        assert relative_error(out, before.double()) < 2 * TOLERANCE[DTYPE]
        assert same_bits(pool.k_buffer[1][slots], layer.recorded[1])
        assert same_bits(pool.v_buffer[1], expected.v_buffer[1])
        assert relative_error(pool.k_buffer[1], expected.k_buffer[1].double()) < 2 * TOLERANCE[DTYPE]

    def test_where_the_store_is_left_norms_and_rotation_are_not(self, args):
        args.speculative_algorithm = "EAGLE"
        layer, pool, slots = attention_of("Qwen3Attention"), pool_of(), torch.arange(TOKENS, device=DEVICE)
        pool.k_buffer[1].fill_(3)
        report = self.replaced(layer, args, pool)
        assert report.left == {("KV store of Qwen3Attention", "speculative decoding is on"): 1}
        assert list(report.replaced) == [("QK-norm, rotation of Qwen3Attention", "qk_norm_rope_store")]
        with torch.no_grad():
            layer(slots, inputs(TOKENS, 256), SimpleNamespace(out_cache_loc=slots))
        assert layer.recorded[3] is True
        assert (pool.k_buffer[1] == 3).all()

    @pytest.mark.parametrize("slots", [None, torch.arange(TOKENS + 1, device=DEVICE)])
    def test_calls_that_cannot_be_stored_go_to_sglang(self, args, slots):
        """Without slots, and with more slots than tokens, which the operator refuses."""
        layer, hidden = attention_of("LlamaAttention"), inputs(TOKENS, 256)
        positions = torch.arange(TOKENS, device=DEVICE)
        batch = SimpleNamespace(out_cache_loc=slots)
        with torch.no_grad():
            before = layer(positions, hidden, batch)
            report = self.replaced(layer, args, pool_of())
            out = layer(positions, hidden, batch)
        assert layer.recorded[3] is True
        assert same_bits(out, before)
        assert len(report.calls) == (slots is not None)

    @pytest.mark.parametrize("name", ["Qwen3Attention", "LlamaAttention"])
    def test_a_compiled_graph_has_sglangs_own_steps(self, args, name):
        layer, hidden, positions = attention_of(name), inputs(TOKENS, 256), torch.arange(TOKENS, device=DEVICE)
        layer.attn.forward = lambda q, k, v, batch, save_kv_cache=True: torch.cat([q, k, v], dim=-1)
        batch, targets = SimpleNamespace(out_cache_loc=positions, forward_mode=None), []

        def backend(graph, _):
            targets.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        with torch.no_grad():
            expected = layer.forward(positions, hidden, batch)
            assert self.replaced(layer, args, pool_of()).replaced
            out = torch.compile(layer, backend=backend, fullgraph=True)(positions, hidden, batch)
        assert same_bits(out, expected)
        assert not [target for target in targets if "jitnorm" in target]

    def test_layers_that_differ_are_left(self, args):
        from sglang.srt.layers.radix_attention import AttentionType

        other_eps, other_forward, encoder = (attention_of("Qwen3Attention") for _ in range(3))
        other_eps.k_norm.variance_epsilon *= 2
        other_forward.forward = lambda *args: None
        encoder.attn.attn_type = AttentionType.ENCODER_ONLY
        mrope = attention_of("Qwen2Attention", rope_scaling={"rope_type": "default", "mrope_section": [8, 12, 12]})
        for layer, reason in (
            (other_eps, "its norms differ in eps or in the dtype of their weights"),
            (other_forward, "its forward is not that of Qwen3Attention"),
            (encoder, "it is cross-attention or an encoder's"),
            (mrope, "its rotary embedding, MRotaryEmbedding, has a forward of its own"),
        ):
            before = layer.__dict__.get("forward")
            assert list(self.replaced(layer, args, pool_of()).left) == [(type(layer).__name__, reason)]
            assert layer.__dict__.get("forward") is before

    def test_hooks_of_the_server_keep_its_modules(self, args):
        args.forward_hooks = [{"target_modules": ["*.q_norm"]}]
        report = self.replaced(attention_of("Qwen3Attention"), args, pool_of())
        assert list(report.left) == [("Qwen3Attention", "the server has --forward-hooks")]

    def test_the_environment_skips_it(self, args, monkeypatch):
        monkeypatch.setenv("JITNORM_PLUGIN_SKIP", "attention")
        report = self.replaced(attention_of("Qwen3Attention"), args, pool_of())
        assert list(report.left) == [("Qwen3Attention", "JITNORM_PLUGIN_SKIP names attention")]


class TestDeterministicMode:
    @pytest.fixture
    def ops(self, args, monkeypatch):
        """Return SGLang's module of batch-invariant operators, whose names are restored afterwards."""
        package = importlib.import_module("sglang.srt.batch_invariant_ops")
        module = importlib.import_module(deterministic.MODULE)
        norms = importlib.import_module("sglang.srt.layers.layernorm")
        for owner in (package, module, norms):
            for name in deterministic.FUNCTIONS:
                if name in vars(owner):
                    monkeypatch.setattr(owner, name, getattr(owner, name))
        return module

    def test_every_importer_gets_jitnorms(self, ops, sources):
        package = importlib.import_module("sglang.srt.batch_invariant_ops")
        norms = importlib.import_module("sglang.srt.layers.layernorm")
        deterministic.replace_operators()
        deterministic.replace_operators()
        for name, function in deterministic.FUNCTIONS.items():
            assert getattr(ops, name) is function
        assert package.matmul_persistent is deterministic.FUNCTIONS["matmul_persistent"]
        assert norms.rms_norm_batch_invariant is deterministic.FUNCTIONS["rms_norm_batch_invariant"]

    def test_signatures_fit_sglangs(self, ops):
        """The functions take SGLang's arguments, and return what ATen's operators return."""
        deterministic.replace_operators()
        a, b, bias, x = inputs(5, 64), inputs(64, 24), inputs(24), torch.randn(3, 5, 24, device=DEVICE)
        exact, weight, integers = a.double() @ b.double(), inputs(64), torch.arange(6, device=DEVICE).view(2, 3)
        cases = [
            (ops.matmul_persistent(a, b, bias=bias), exact + bias.double()),
            (ops.mm_batch_invariant(a, b), exact),
            (ops.addmm_batch_invariant(bias, a, b), exact + bias.double()),
            (ops._mm_dtype_compat(a, b, torch.float32), exact),
            (ops.bmm_batch_invariant(a[None], b[None], out=None), exact[None]),
            (ops.log_softmax(x, dim=-1), torch.log_softmax(x.double(), -1)),
            (ops._log_softmax_batch_invariant(x, -1, False), torch.log_softmax(x.double(), -1)),
            (ops.mean_dim(x, 1, keepdim=True), x.double().mean(1, keepdim=True)),
            (ops.mean_batch_invariant(x, [0, 2]), x.double().mean((0, 2))),
            (ops.mean_dim(integers, 1), integers.double().mean(1)),
            (ops.rms_norm_batch_invariant(a, weight), rmsnorm_reference(a, weight, 1e-6)),
        ]  # fmt: skip
        for out, reference in cases:
            assert out.shape == reference.shape
            assert relative_error(out, reference) < TOLERANCE[DTYPE]

    def test_each_shape_of_a_product_is_multiplied_once(self, args, monkeypatch):
        linear = importlib.import_module("sglang.srt.layers.linear").ReplicatedLinear
        model = torch.nn.ModuleDict({f"layer{i}": linear(64, 96, bias=True, params_dtype=DTYPE) for i in range(3)})
        model["other"] = linear(96, 64, bias=False, params_dtype=DTYPE)
        model["float32"] = linear(32, 32, bias=False, params_dtype=torch.float32)
        model["embedding"] = torch.nn.Embedding(48, 64, dtype=DTYPE)
        model["lm_head"] = torch.nn.Embedding(80, 64, dtype=DTYPE)  # as a tied embedding is
        called = []
        multiply = F.linear
        monkeypatch.setattr(
            F, "linear", lambda x, w, b: called.append((x.shape, w.shape, b is None)) or multiply(x, w, b)
        )
        report = Report("test")
        deterministic.select_gemms(model, DTYPE, report)
        assert called == [((1, 64), (96, 64), False), ((1, 96), (64, 96), True), ((1, 64), (80, 64), True)]
        assert report.replaced == {("shape of the linear layers", "matmul_persistent"): 3}

    def test_a_trainer_keeps_sglangs(self, ops, args, monkeypatch):
        monkeypatch.setattr(sglang_plugin, "_parts_left", {})
        args.rl_on_policy_target = "fsdp"
        own = ops.matmul_persistent
        assert sglang_plugin._enable_mode(lambda enable_bmm=True: "enabled", enable_bmm=False) == "enabled"
        assert ops.matmul_persistent is own
        assert "requires the bits of a trainer" in sglang_plugin._parts_left["deterministic mode"]

    def test_the_environment_skips_it(self, ops, monkeypatch):
        monkeypatch.setattr(sglang_plugin, "_parts_left", {})
        monkeypatch.setenv("JITNORM_PLUGIN_SKIP", "batch_invariant")
        own = ops.matmul_persistent
        sglang_plugin._enable_mode(lambda: None)
        assert ops.matmul_persistent is own
        assert sglang_plugin._parts_left == {"deterministic mode": "JITNORM_PLUGIN_SKIP names batch_invariant"}

    def test_the_hook_replaces_before_the_mode_begins(self, ops, monkeypatch):
        monkeypatch.setattr(sglang_plugin, "_parts_left", {})
        seen = sglang_plugin._enable_mode(lambda: ops.mm_batch_invariant)
        assert seen is deterministic.FUNCTIONS["mm_batch_invariant"]
        assert not sglang_plugin._parts_left


def linears_runner(model: torch.nn.Module, **changes) -> SimpleNamespace:
    """Return what `linears.replace` reads of a ModelRunner."""
    backend = SimpleNamespace(decode=SimpleNamespace(backend=changes.pop("backend", "full")))
    deterministic = changes.pop("deterministic", False)
    server = SimpleNamespace(cuda_graph_config=backend, enable_deterministic_inference=deterministic)
    server.enable_lora, server.lora_paths = changes.pop("lora", False), changes.pop("lora_paths", None)
    values = {"model": model, "is_draft_worker": False, "server_args": server, "ps": SimpleNamespace(tp_size=1)}
    return SimpleNamespace(**values | changes)


def test_linear_layers_of_cuda_graphs_call_the_operator(args, monkeypatch):
    """Layers of attention and of an MLP without a bias and a quantisation, and no others."""
    linear = importlib.import_module("sglang.srt.layers.linear")
    linears = importlib.import_module("jitnorm.integrations.sglang_plugin.linears")
    gemms = linears.engine_gemms
    timed, calls = [], []
    monkeypatch.setattr(gemms, "is_candidate", lambda weight: isinstance(weight, torch.Tensor))

    def select(after_norm, others, gated):
        assert not gated
        weights = [*after_norm, *others]
        assert not weights or ([len(weight) for weight in others] == [32, 24] and len(after_norm) == 2)
        timed.extend(weights)
        with_gemms = [weight for weight in weights if len(weight) != 24]
        return gemms.Selection({gemms.shape_of(weight) for weight in with_gemms}, ["what was chosen"])

    monkeypatch.setattr(gemms, "select", select)
    monkeypatch.setattr(gemms, "linear", lambda x, w: calls.append(w) or F.linear(x, w))
    parallel = {"params_dtype": DTYPE, "tp_rank": 0, "tp_size": 1}
    row = functools.partial(linear.RowParallelLinear, reduce_results=False, **parallel)

    def runner(**changes):
        modules = {
            "row": row(64, 32, bias=False),
            "qkv": linear.QKVParallelLinear(64, 16, 4, 2, bias=False, **parallel),
            "gate and up": linear.MergedColumnParallelLinear(64, [32, 32], bias=False, **parallel),
            "biased": row(64, 32, bias=True),
            "router": linear.ReplicatedLinear(64, 32, bias=False, params_dtype=DTYPE),
            "no other GEMM": row(64, 24, bias=False),
            "the same on all ranks": row(64, 32, bias=False),
        }
        modules["the same on all ranks"].tp_size = 2
        for module in modules.values():
            module.weight.data.normal_()
        return linears_runner(torch.nn.ModuleDict(modules), **changes)

    made, report = runner(), Report("test")
    linears.replace(made, report)
    assert report.replaced == {("linear layer for up to 64 rows", "what was chosen"): 3} and not report.left
    layer = made.model["row"]
    names = ("row", "qkv", "gate and up", "no other GEMM")
    assert {id(weight) for weight in timed} == {id(made.model[name].weight) for name in names}
    x = torch.randn(3, 64, dtype=DTYPE)
    expected = F.linear(x, layer.weight)
    for is_capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda is_capturing=is_capturing: is_capturing)
        torch.testing.assert_close(layer.quant_method.apply(layer, x), expected)
        assert len(calls) == is_capturing
    lora = ({"lora": True}, {"lora_paths": ["adapter"]})
    for changes in ({"is_draft_worker": True}, {"backend": "disabled"}, {"deterministic": True}, *lora):
        linears.replace(runner(**changes), report)
    assert len(timed) == 4 and len(report.replaced) == 1
    monkeypatch.setenv("JITNORM_PLUGIN_SKIP", "linear_layers")
    linears.replace(runner(), report)
    assert report.left == {("linear layers", "JITNORM_PLUGIN_SKIP names linear_layers"): 4}
    assert len(timed) == 4 and len(report.replaced) == 1


ACTIVATED = {
    "silu_and_mul": F.silu,
    "gelu_and_mul": F.gelu,
    "gelu_tanh_and_mul": functools.partial(F.gelu, approximate="tanh"),
}


class TestGatedMLP:
    """MLPs whose projection to gate and up is computed together with the activation, where graphs are captured."""

    @pytest.fixture
    def linears(self, args):
        return importlib.import_module("jitnorm.integrations.sglang_plugin.linears")

    @pytest.fixture
    def calls(self, linears, monkeypatch):
        """Replace what needs a GPU, and return the calls: the activation, if any, and the weight's elements."""
        gemms, calls = linears.engine_gemms, []

        def select(after_norm, others, gated):
            shapes = {gemms.shape_of(weight) for weight in (*after_norm, *others)}
            return gemms.Selection(shapes | {gemms.shape_of(*each) for each in gated}, ["what was chosen"])

        def linear(x, weight):
            calls.append((weight.numel(),))
            return F.linear(x, weight)

        def gated_linear(x, weight, activation):
            calls.append((activation, weight.numel()))
            return gemms.ACTIVATIONS[activation].run(F.linear(x, weight), None)

        monkeypatch.setattr(gemms, "is_candidate", lambda weight, activation=None: True)
        monkeypatch.setattr(gemms, "select", select)
        monkeypatch.setattr(gemms, "linear", linear)
        monkeypatch.setattr(gemms, "gated_linear", gated_linear)
        self.capture(monkeypatch, True)
        return calls

    def capture(self, monkeypatch, is_capturing: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)

    def mlp_of(self, name: str) -> torch.nn.Module:
        """Return a real MLP of one process, whose down_proj records its arguments after the first."""
        from sglang.srt.runtime_context import get_parallel

        mlps = importlib.import_module("jitnorm.integrations.sglang_plugin.mlps")
        (owner,) = (owner for owner, cls in mlps.MLP_CLASSES if cls == name)
        activation = "gelu_pytorch_tanh" if name.startswith("Gemma") else "silu"
        with get_parallel().override(tp_size=1, tp_rank=0):
            mlp = getattr(importlib.import_module(owner), name)(64, 96, activation).to(DEVICE)
        for parameter in mlp.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape).to(DEVICE, DTYPE)
        down = mlp.down_proj

        def forward(x, **given):  # SGLang's would need a group of processes
            mlp.given = given
            return down.quant_method.apply(down, x), None

        down.forward = forward
        return mlp

    def replaced(self, *mlps: torch.nn.Module) -> Report:
        model = torch.nn.ModuleList(mlps)
        report = installed(model)
        importlib.import_module("jitnorm.integrations.sglang_plugin.linears").replace(linears_runner(model), report)
        return report

    def is_gated(self, mlp: torch.nn.Module) -> bool:
        return "forward" in vars(mlp)

    @pytest.mark.parametrize(
        ("name", "activation"),
        [("LlamaMLP", "silu_and_mul"), ("Qwen2MLP", "silu_and_mul"), ("Gemma3MLP", "gelu_tanh_and_mul")],
    )
    @pytest.mark.parametrize("shape", [(1, 64), (TOKENS, 64), (2, 3, 64)])
    def test_it_computes_what_sglang_computes(self, args, calls, monkeypatch, name, activation, shape):
        mlp, x, batch = self.mlp_of(name), inputs(*shape), object()
        given = {} if name == "Gemma3MLP" else {"forward_batch": batch}
        gate, up = F.linear(x.double(), mlp.gate_up_proj.weight.double()).chunk(2, dim=-1)
        reference = F.linear(ACTIVATED[activation](gate) * up, mlp.down_proj.weight.double())
        before = mlp(x, **given)
        passed_on = mlp.given
        report = self.replaced(mlp)
        assert report.replaced[("linear layer with its activation for up to 64 rows", "what was chosen")] == 1
        assert report.replaced[("linear layer for up to 64 rows", "what was chosen")] == 1
        assert not report.left
        out = mlp(x, **given)
        assert calls == [(activation, 2 * 96 * 64), (96 * 64,)]
        assert mlp.given == passed_on
        assert out.shape == before.shape
        assert relative_error(out, reference) < 2 * TOLERANCE[DTYPE]
        assert same_bits(mlp(x=x, **given), out)
        del calls[:]
        self.capture(monkeypatch, False)
        outside = mlp(x, **given)
        assert not calls
        assert mlp.given == passed_on
        assert same_bits(outside, out)  # for these shapes no GEMM was chosen

    def test_a_compiled_graph_has_sglangs_own_steps(self, args, calls):
        mlp, x = self.mlp_of("LlamaMLP"), inputs(TOKENS, 64)
        expected = mlp(x)
        self.replaced(mlp)
        mlp.act_fn.enter_torch_compile(1)
        assert same_bits(torch.compile(mlp, backend="eager", fullgraph=True)(x), expected)
        assert not calls

    def test_a_weight_that_is_loaded_later_is_used(self, args, calls):
        mlp, x = self.mlp_of("LlamaMLP"), inputs(TOKENS, 64)
        self.replaced(mlp)
        mlp.gate_up_proj.weight = torch.nn.Parameter(torch.zeros_like(mlp.gate_up_proj.weight))
        assert not mlp(x).any()

    def test_a_copy_has_weights_of_its_own(self, args, calls):
        mlp, x = self.mlp_of("LlamaMLP"), inputs(TOKENS, 64)
        self.replaced(mlp)
        other = copy.deepcopy(mlp)
        other.gate_up_proj.weight.data.zero_()
        assert not other(x).any()
        assert mlp(x).any()

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda mlp: mlp.gate_up_proj.register_forward_hook(print), "its layers have hooks"),
            (lambda mlp: mlp.act_fn.register_forward_pre_hook(print), "its layers have hooks"),
            (
                lambda mlp: setattr(mlp, "forward", type(mlp).forward.__get__(mlp)),
                "its forward was replaced on the instance",
            ),
            (
                lambda mlp: setattr(mlp.gate_up_proj, "forward", mlp.gate_up_proj.forward),
                "its forward was replaced on the instance",
            ),
            (
                lambda mlp: setattr(mlp.act_fn, "_forward_method", mlp.act_fn.forward_npu),
                "SGLang computes the activation",
            ),
        ],
    )
    def test_separate_layers_are_kept_with_a_reason(self, args, calls, change, reason):
        mlp, other = self.mlp_of("LlamaMLP"), self.mlp_of("LlamaMLP")
        change(mlp)
        forward = vars(mlp).get("forward")
        report = self.replaced(mlp, other)
        assert report.left[("gate_up_proj of LlamaMLP with its activation", reason)] == 1
        assert report.replaced[("linear layer with its activation for up to 64 rows", "what was chosen")] == 1
        assert report.replaced[("linear layer for up to 64 rows", "what was chosen")] == 3
        assert vars(mlp).get("forward") is forward
        assert self.is_gated(other)

    @pytest.mark.parametrize("method", ["forward", "__init__"])
    def test_a_class_with_another_source(self, args, calls, sources, monkeypatch, method):
        name = f"sglang.srt.models.llama:LlamaMLP.{method}"
        monkeypatch.setitem(sources["LlamaMLP"], name, "0" * 16)
        llama, qwen = self.mlp_of("LlamaMLP"), self.mlp_of("Qwen2MLP")
        reason = f"the source of {name} is not that of SGLang 0.5.16"
        assert self.replaced(llama, qwen).left == {("gate_up_proj of LlamaMLP with its activation", reason): 1}
        assert [self.is_gated(mlp) for mlp in (llama, qwen)] == [False, True]

    def test_a_subclass(self, args, calls):
        mlp = self.mlp_of("LlamaMLP")
        mlp.__class__ = type("InklingDenseMLP", (type(mlp),), {})
        report = self.replaced(mlp)
        assert not self.is_gated(mlp)
        assert not report.left
        assert report.replaced[("linear layer for up to 64 rows", "what was chosen")] == 2

    def test_projections_that_linear_would_leave(self, args, calls):
        biased, quantised, other_ranks = mlps = [self.mlp_of("LlamaMLP") for _ in range(3)]
        biased.gate_up_proj.bias = torch.nn.Parameter(inputs(192))
        method = quantised.gate_up_proj.quant_method
        quantised.gate_up_proj.quant_method = type("Quantised", (type(method),), {})()
        other_ranks.gate_up_proj.tp_size = 2
        report = self.replaced(*mlps)
        assert not any(map(self.is_gated, mlps))
        assert not report.left
        assert report.replaced[("linear layer for up to 64 rows", "what was chosen")] == 3
        assert type(biased.gate_up_proj.quant_method) is type(method)

    def test_weights_that_no_kernel_with_the_activation_supports(self, args, calls, linears, monkeypatch):
        gemms = linears.engine_gemms
        monkeypatch.setattr(gemms, "is_candidate", lambda weight, activation=None: activation is None)
        mlp = self.mlp_of("LlamaMLP")
        report = self.replaced(mlp)
        assert not self.is_gated(mlp)
        assert report.replaced[("linear layer for up to 64 rows", "what was chosen")] == 2

    def test_without_a_gemm_it_stays_sglangs(self, args, calls, linears, monkeypatch):
        monkeypatch.setattr(linears.engine_gemms, "select", lambda *weights: linears.engine_gemms.Selection(set(), []))
        mlp = self.mlp_of("LlamaMLP")
        methods = [mlp.gate_up_proj.quant_method, mlp.down_proj.quant_method]
        assert list(self.replaced(mlp).replaced) == [("SiluAndMul", "silu_and_mul")]
        assert not self.is_gated(mlp)
        assert [mlp.gate_up_proj.quant_method, mlp.down_proj.quant_method] == methods

    def test_kernels_that_cannot_be_built(self, args, calls, linears, monkeypatch):
        """Without those that compute both, the linear layer is replaced alone; without any, the report says why."""
        gemms, mlp = linears.engine_gemms, self.mlp_of("LlamaMLP")
        only_linear = {gemms.shape_of(mlp.gate_up_proj.weight)}
        for shapes, count in ((only_linear, 1), (set(), 0)):
            found = gemms.Selection(shapes, ["it failed"])
            monkeypatch.setattr(gemms, "select", lambda *weights, found=found: found)
            mlp = self.mlp_of("LlamaMLP")
            report = self.replaced(mlp)
            assert not self.is_gated(mlp)
            assert report.replaced[("linear layer for up to 64 rows", "it failed")] == count
            assert report.left == ({} if count else {("linear layers", "it failed"): 2})

    @pytest.mark.parametrize("part", ["activations", "linear_layers"])
    def test_parts_that_the_environment_skips(self, args, calls, monkeypatch, part):
        monkeypatch.setenv("JITNORM_PLUGIN_SKIP", part)
        mlp = self.mlp_of("LlamaMLP")
        report = self.replaced(mlp)
        assert not self.is_gated(mlp)
        if part == "linear_layers":
            assert report.left == {("linear layers", "JITNORM_PLUGIN_SKIP names linear_layers"): 2}
            assert list(report.replaced) == [("SiluAndMul", "silu_and_mul")]
        else:
            assert report.replaced == {("linear layer for up to 64 rows", "what was chosen"): 2}
            assert report.left == {
                ("SiluAndMul", "JITNORM_PLUGIN_SKIP names activations"): 1,
                ("gate_up_proj of LlamaMLP with its activation", "SGLang computes the activation"): 1,
            }
