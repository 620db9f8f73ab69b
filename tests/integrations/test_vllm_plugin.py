"""The plugin for vLLM, with vLLM's own classes, on the CPU. The tests on a GPU are in test_vllm_engine.py.

They need the Python of vLLM's wheel, which imports without its compiled libraries, and the packages that it imports:
put them on PYTHONPATH. Without them only the first tests run.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from documentation.pages import ROOT
from helpers import TOLERANCE, relative_error, same_bits
from processes import run_before_import

from integrations import vllm_attention as reference
from jitnorm.integrations import engine_plugins, vllm_plugin
from jitnorm.integrations.vllm_plugin import compatibility
from jitnorm.integrations.vllm_plugin.report import REPORTS, Report
from jitnorm.jit.spec import Target

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, BLOCK, BLOCKS = 256, 4, 2, 64, 16, 5
E4M3 = torch.float8_e4m3fn

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM's Python is not on PYTHONPATH")


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, where no plugin is asked for, except by `environment`."""
    return run_before_import(script, **{"JITNORM_VLLM": None, "VLLM_PLUGINS": None, **environment})


# Without vLLM


@pytest.mark.parametrize(
    ("environment", "requested"),
    [
        ({}, False),
        ({"JITNORM_VLLM": "1"}, True),
        ({"JITNORM_VLLM": "0"}, False),
        ({"JITNORM_VLLM": ""}, False),
        ({"VLLM_PLUGINS": "other,jitnorm"}, True),
        ({"VLLM_PLUGINS": "other"}, False),
        ({"VLLM_PLUGINS": ""}, False),
        ({"JITNORM_VLLM": "0", "VLLM_PLUGINS": "jitnorm"}, False),
    ],
)
def test_the_environment_asks_for_the_plugin(environment, requested, monkeypatch):
    for name in ("JITNORM_VLLM", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert engine_plugins.is_requested("JITNORM_VLLM", "VLLM_PLUGINS") is requested


@pytest.mark.slow
def test_importing_and_registering_without_a_request_imports_no_engine():
    done = run("""
        import sys, jitnorm.integrations.vllm_plugin as plugin
        plugin.register()
        print([name for name in sys.modules if name.partition(".")[0] in ("vllm", "transformers")], plugin.explain())
    """)
    assert done.stdout == "[] []\n", done.stderr


def entry_point():
    """Return the entry point that pyproject.toml declares."""
    section = (ROOT / "pyproject.toml").read_text().partition('[project.entry-points."vllm.general_plugins"]\n')[2]
    name, _, value = section.partition("\n")[0].partition(" = ")
    assert name == engine_plugins.NAME
    return value.strip('"')


def test_the_entry_point_is_register():
    module, _, function = entry_point().partition(":")
    assert getattr(importlib.import_module(module), function) is vllm_plugin.register


@pytest.mark.parametrize(
    ("version", "problem"),
    [("0.26.0", None), ("0.26.3", None), ("0.27.0", "its version is 0.27.0"), ("0.260.0", "its version is 0.260.0")],
)
def test_another_version_is_left(version, problem, monkeypatch):
    monkeypatch.setattr(compatibility.metadata, "version", lambda name: version)
    found = compatibility.version_problem()
    assert found is None if problem is None else found.startswith(problem)


def test_another_version_replaces_nothing(monkeypatch, caplog):
    from jitnorm.integrations.vllm_plugin import installation

    monkeypatch.setenv("JITNORM_VLLM", "1")
    monkeypatch.setattr(vllm_plugin, "_is_registered", False)
    monkeypatch.setattr(compatibility.metadata, "version", lambda name: "0.25.1")
    monkeypatch.setattr(installation, "install", lambda: pytest.fail("installed"))
    with caplog.at_level(logging.WARNING, "jitnorm"):
        vllm_plugin.register()
        vllm_plugin.register()
    assert [record.getMessage() for record in caplog.records] == [
        "jitnorm's plugin replaces nothing in vLLM: its version is 0.25.1, and the plugin was tested with 0.26.0"
    ]


# With vLLM's classes


@pytest.fixture(scope="module")
def config():
    """Make vLLM use the CPU, install the plugin, and return a configuration that is current until the end."""
    import socket

    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    from vllm.config import CacheConfig, DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    from jitnorm.integrations.vllm_plugin import installation

    installation.install()
    installation.replace_layers()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = VllmConfig(device_config=DeviceConfig(device="cpu"), cache_config=CacheConfig(block_size=BLOCK))
    with set_current_vllm_config(made):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield made
    torch.distributed.destroy_process_group()
    installation.uninstall()


def reinstall(installation):
    installation.uninstall()
    installation.install()
    installation.replace_layers()


@pytest.fixture
def layers(config):
    from jitnorm.integrations.vllm_plugin import layers

    return layers


@pytest.fixture
def bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def settings(dtype: torch.dtype = torch.bfloat16, **changes: object) -> SimpleNamespace:
    """Return the parts of a configuration of vLLM that `replace_operators` reads, with a model that has a dtype."""
    from vllm.config import CompilationConfig, ParallelConfig

    values = {
        "model_config": SimpleNamespace(dtype=dtype),
        "compilation_config": CompilationConfig(),
        "parallel_config": ParallelConfig(),
        "device_config": SimpleNamespace(device=torch.device("cpu")),
        "quant_config": None,
        "speculative_config": None,
    }
    return SimpleNamespace(**values | changes)


def random_weights(module: torch.nn.Module) -> None:
    """Fill a module's parameters. vLLM's linear layers on the CPU need a function that it chooses while it loads."""
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, dtype=torch.float32)
        parameter.data.copy_(1 + 0.3 * values if name.endswith("norm.weight") else 0.1 * values)
        parameter.requires_grad_(False)
    for child in module.modules():
        if hasattr(child, "quant_method"):
            child.cpu_linear = torch.nn.functional.linear


def errors(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the root mean square of the errors."""
    assert result.isfinite().all()
    return float((result.double() - exact).pow(2).mean().sqrt())


@needs_vllm
def test_registering_twice_changes_nothing_more(config, monkeypatch):
    from vllm.model_executor.custom_op import op_registry_oot

    from jitnorm.integrations.vllm_plugin import installation

    before = dict(op_registry_oot), len(installation._undo)
    monkeypatch.setenv("JITNORM_VLLM", "1")
    monkeypatch.setattr(vllm_plugin, "_is_registered", True)
    vllm_plugin.register()
    assert (dict(op_registry_oot), len(installation._undo)) == before
    assert {"RMSNorm", "GemmaRMSNorm", "SiluAndMul", "GeluAndMul"} <= op_registry_oot.keys()


@needs_vllm
def test_all_fingerprints_are_those_of_the_installed_version(config):
    assert compatibility.version_problem() is None
    assert {part: compatibility.changed(part) for part in compatibility.FINGERPRINTS} == dict.fromkeys(
        compatibility.FINGERPRINTS
    )


@needs_vllm
def test_a_part_with_another_source_is_left(config, monkeypatch):
    from vllm.model_executor.custom_op import op_registry_oot

    from jitnorm.integrations.vllm_plugin import installation

    installation.uninstall()
    assert "RMSNorm" not in op_registry_oot
    name = "vllm.model_executor.layers.layernorm:RMSNorm.forward_native"
    monkeypatch.setitem(compatibility.FINGERPRINTS["norms"], name, "0" * 16)
    compatibility.changed.cache_clear()
    try:
        installation.replace_layers()
        assert "RMSNorm" not in op_registry_oot and "SiluAndMul" in op_registry_oot
        reason = f"the source of {name} is not that of vLLM 0.26.0"
        assert installation._notes == [f"left {cls}: {reason}" for cls in ("RMSNorm", "GemmaRMSNorm")]
    finally:
        monkeypatch.undo()
        compatibility.changed.cache_clear()
        reinstall(installation)


@needs_vllm
def test_parts_that_the_environment_skips_are_left(config, monkeypatch):
    from vllm import envs
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers import linear

    from jitnorm.integrations.vllm_plugin import installation

    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    monkeypatch.setenv(engine_plugins.SKIP, "norms,batch_invariant")
    try:
        reinstall(installation)
        assert "RMSNorm" not in op_registry_oot and "SiluAndMul" in op_registry_oot
        assert linear.linear_batch_invariant.__module__.startswith("vllm")
        reason = "JITNORM_PLUGIN_SKIP names {}".format
        assert installation._notes == [
            *(f"left {cls}: {reason('norms')}" for cls in ("RMSNorm", "GemmaRMSNorm")),
            f"left the operators of vLLM's batch-invariant mode: {reason('batch_invariant')}",
        ]
    finally:
        monkeypatch.undo()
        reinstall(installation)


@needs_vllm
def test_an_unknown_part_to_skip_is_refused(config, monkeypatch):
    from jitnorm.integrations.vllm_plugin import installation

    monkeypatch.setenv(engine_plugins.SKIP, "norm")
    with pytest.raises(ValueError, match="got 'norm'"):
        installation.install()


@needs_vllm
def test_a_class_that_another_plugin_replaces_is_left(config):
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.layernorm import RMSNorm

    from jitnorm.integrations.vllm_plugin import installation

    class Other(RMSNorm):
        pass

    installation.uninstall()
    RMSNorm.register_oot(Other)
    try:
        installation.replace_layers()
        assert op_registry_oot["RMSNorm"] is Other
        assert installation._notes == ["left RMSNorm: Other of another plugin replaces it"]
    finally:
        op_registry_oot.pop("RMSNorm")
        RMSNorm.name = "rms_norm"
        reinstall(installation)


@needs_vllm
def test_the_classes_keep_their_names_in_custom_ops(layers):
    assert [cls.name for cls in layers.CLASSES] == ["rms_norm", "gemma_rms_norm", "silu_and_mul", "gelu_and_mul"]


def activated(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    from jitnorm.integrations.vllm_plugin.models import replace_operators

    random_weights(module)
    report = replace_operators(torch.nn.Sequential(module), settings(dtype))
    assert report.replaced and not report.left, report
    return module


def stock(module: torch.nn.Module):
    """Return the forward that vLLM's own class has."""
    return super(type(module), module).forward_native


@needs_vllm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [64, 1024, 2880, 301])  # the last two by the general norms
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("kind", ["RMSNorm", "GemmaRMSNorm"])
def test_norms_are_as_exact_as_those_of_vllm(kind, rows, hidden, dtype, layers):
    from vllm.model_executor.layers import layernorm

    torch.set_default_dtype(dtype)
    try:
        norm = activated(getattr(layernorm, kind)(hidden, eps=1e-5), dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    assert type(norm).__name__ == f"Jitnorm{kind}"
    offset = 1.0 if kind == "GemmaRMSNorm" else 0.0

    def exact(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (norm.weight.double() + offset)

    for method in (norm, norm.forward_native, norm.forward_cuda):
        x, residual = (torch.randn(rows, hidden, dtype=dtype) for _ in range(2))
        with torch.no_grad():
            expected, theirs = exact(x.double()), stock(norm)(x.clone())
            assert errors(method(x), expected) <= 1.01 * errors(theirs, expected)
            total = x.double() + residual.double()
            theirs, _ = stock(norm)(x.clone(), residual.clone())
            rounded = (x.float() + residual.float()).to(dtype)
            ours, left = method(x, residual)
        assert errors(ours, exact(total)) <= 1.01 * errors(theirs, exact(total))
        assert torch.equal(left, rounded)


@needs_vllm
def test_norms_without_a_weight(layers, bfloat16, monkeypatch):
    from vllm.model_executor.layers.layernorm import RMSNorm

    norm = activated(RMSNorm(HIDDEN, has_weight=False), torch.bfloat16)
    x, residual = (torch.randn(7, HIDDEN) for _ in range(2))
    expected = stock(norm)(x.clone()), stock(norm)(x.clone(), residual.clone())
    monkeypatch.setattr(RMSNorm, "forward_native", lambda *_: pytest.fail("not the kernel"))
    torch.testing.assert_close(norm(x), expected[0])
    torch.testing.assert_close(norm(x, residual), expected[1])


@needs_vllm
@pytest.mark.parametrize("case", ["strided", "float32", "residual of another dtype", "float32 residual", "inactive"])
def test_calls_that_no_kernel_supports_run_the_original(case, layers, monkeypatch, bfloat16):
    from vllm.model_executor.layers.layernorm import RMSNorm

    norm = activated(RMSNorm(HEAD_DIM), torch.bfloat16)
    monkeypatch.setattr(layers, "rmsnorm", lambda *a: pytest.fail("the kernel was called"))
    monkeypatch.setattr(layers, "fused_add_rmsnorm", lambda *a: pytest.fail("the kernel was called"))
    x = torch.randn(5, 3 * HEAD_DIM).view(5, 3, HEAD_DIM)[:, :2] if case == "strided" else torch.randn(5, HEAD_DIM)
    arguments = [x.float() if case == "float32" else x]
    if case == "residual of another dtype":
        arguments.append(torch.randn(5, HEAD_DIM, dtype=torch.float16))
    elif case == "float32 residual":  # of a model that does not keep it so
        arguments.append(torch.randn(5, HEAD_DIM, dtype=torch.float32))
    norm.jitnorm_is_active = case != "inactive"
    with torch.no_grad():
        expected = stock(norm)(*(x.clone() for x in arguments))
        result = norm(*arguments)
    for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (result, expected)), strict=True):
        assert torch.equal(a, b)


@needs_vllm
def test_norms_and_activations_that_are_left_have_a_reason(config, layers):
    from vllm.config import CompilationConfig
    from vllm.config.compilation import PassConfig
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm

    from jitnorm.integrations.vllm_plugin.models import replace_operators

    def reasons(module, **changes):
        report = replace_operators(torch.nn.Sequential(module, torch.nn.Linear(2, 2)), settings(**changes))
        assert not report.replaced and not getattr(module, "jitnorm_is_active", False)
        return report.left["0"]

    def compiled(mode=3, **passes):
        made = CompilationConfig(mode=mode)
        made.pass_config = PassConfig(**passes)
        return {"compilation_config": made}

    assert reasons(RMSNorm(65537)) == "RMSNorm: no kernel supports a hidden size of 65537"
    assert reasons(RMSNorm(128, var_hidden_size=64)) == "RMSNorm: it normalises by a part of the hidden size"
    assert reasons(RMSNorm(128), dtype=torch.float64) == "RMSNorm: the model is torch.float64"
    half = RMSNorm(128, dtype=torch.float16)
    assert reasons(half) == "RMSNorm: its weight is torch.float16, and the model torch.bfloat16"
    other = SimpleNamespace(device=torch.device("xpu"))
    assert reasons(RMSNorm(128), device_config=other) == "RMSNorm: this is no NVIDIA GPU"
    assert "fuse_allreduce_rms" in reasons(RMSNorm(128), **compiled(fuse_allreduce_rms=True))
    assert "enable_sp" in reasons(RMSNorm(128), **compiled(enable_sp=True))
    assert "quantised" in reasons(RMSNorm(128), quant_config=object(), **compiled())
    disabled = {"compilation_config": CompilationConfig(custom_ops=["all", "-rms_norm"])}
    assert reasons(RMSNorm(128), **disabled) == "RMSNorm: custom_ops has -rms_norm"
    assert not SiluAndMul.enabled()  # the mode of the configuration is one that compiles
    assert reasons(silu(config)) == "SiluAndMul: vLLM has not enabled it, and Inductor generates it"


def silu(config, approximate=None):
    """Make an activation. On the CPU its constructor looks up an operator of vLLM's compiled library."""
    from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul

    with pytest.MonkeyPatch.context() as patch:
        for name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"):
            patch.setattr(torch.ops._C, name, None, raising=False)
        return SiluAndMul(compile_native=False) if approximate is None else GeluAndMul(approximate)


@needs_vllm
@pytest.mark.parametrize("approximate", [None, "none", "tanh"])
@pytest.mark.parametrize("width", [2, 66, 1000])
def test_activations_are_as_exact_as_those_of_vllm(approximate, width, config, layers):
    module = silu(config, approximate)
    module.jitnorm_is_active = True
    x = torch.randn(7, 2 * width).bfloat16()
    gate, up = x.double().chunk(2, dim=-1)
    activation = torch.nn.functional.silu if approximate is None else torch.nn.functional.gelu
    options = {} if approximate is None else {"approximate": approximate}
    expected = activation(gate, **options) * up
    assert errors(module.forward_cuda(x), expected) <= 1.01 * errors(stock(module)(x), expected)


@needs_vllm
def test_activations_are_replaced_where_vllm_enables_them(config, layers, monkeypatch):
    from jitnorm.integrations.vllm_plugin.models import replace_operators

    module = silu(config)
    module._forward_method = module.forward_cuda  # what vLLM chooses on CUDA in eager mode
    report = replace_operators(torch.nn.Sequential(module, torch.nn.Linear(2, 2)), settings())
    assert report.replaced == {"0": "SiluAndMul"}
    monkeypatch.setattr(layers, "silu_and_mul", lambda x: "kernel")
    assert module(torch.randn(3, 8).bfloat16()) == "kernel"


# The launch between the projection and attention


@pytest.fixture
def attention(config, bfloat16, monkeypatch):
    """Return a function that makes a random layer of a model, with its cache and a recorder of its attention kernel."""
    import vllm.model_executor.layers.attention.attention as of_vllm
    from vllm.config import CacheConfig
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    monkeypatch.setattr(of_vllm, "get_attn_backend", lambda *a, **k: FlashAttentionBackend)
    known = config.compilation_config.static_forward_context
    before = dict(known)

    def make(family="qwen3", cache_dtype="bfloat16", layout="NHD", **options):
        cache_config = CacheConfig(block_size=BLOCK, cache_dtype=cache_dtype)
        layer = reference.make(family, str(len(known)), cache_config, **options)
        random_weights(layer)
        dtype = torch.uint8 if cache_dtype.startswith("fp8") else torch.bfloat16
        if layout == "NHD":
            storage = torch.zeros(BLOCKS, BLOCK, KV_HEADS, 2 * HEAD_DIM, dtype=dtype).transpose(1, 2)
        else:
            storage = torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_DIM, dtype=dtype)
        assert storage.shape == FlashAttentionBackend.get_kv_cache_shape(BLOCKS, BLOCK, KV_HEADS, HEAD_DIM)
        storage.fill_(0x38 if dtype == torch.uint8 else 3.0)  # 1.0 in float8: a slot that stays is seen
        layer.attn.kv_cache = storage
        return layer, reference.Recorder(layer.attn)

    yield make
    known.clear()
    known.update(before)


def replaced(layer, **changes):
    from jitnorm.integrations.vllm_plugin.models import replace_operators

    report = replace_operators(torch.nn.ModuleDict({"self_attn": layer}), settings(**changes))
    assert not report.left, report
    assert list(report.replaced) == ["self_attn"], "norms of q and k are a part of the launch"
    return layer


@pytest.fixture
def operator_calls(monkeypatch):
    """Count the launches."""
    from jitnorm.integrations.vllm_plugin import attention as plugin

    calls = []
    kernel = plugin.qk_norm_rope_store
    monkeypatch.setattr(plugin, "qk_norm_rope_store", lambda *a, **k: (calls.append(k), kernel(*a, **k))[1])
    return calls


FAMILIES = ["qwen3", "qwen2", "llama", "mistral", "gemma3"]


def without_plugin(layer):
    """Return vLLM's own q and k of a layer: its norms and its rotation, as PyTorch computes them."""

    def forward(qkv, positions):
        q, k, _ = qkv.split([layer.q_size, layer.kv_size, layer.kv_size], dim=-1)
        if hasattr(layer, "q_norm"):
            q, k = (
                stock(norm)(x.unflatten(-1, (-1, HEAD_DIM))).flatten(-2)
                for x, norm in ((q, layer.q_norm), (k, layer.k_norm))
            )
        q, k = layer.rotary_emb.forward_native(positions, q.contiguous(), k.contiguous())
        return q.view(len(qkv), -1, HEAD_DIM), k.view(len(qkv), -1, HEAD_DIM)

    return forward


@needs_vllm
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_launch_computes_what_the_layer_does(family, layout, config, attention, operator_calls):
    layer, recorder = attention(family, layout=layout)
    expected_from_vllm = without_plugin(layer)
    name, original = layer.attn.layer_name, type(layer)
    assert isinstance(replaced(layer), original)
    tokens = 7
    hidden, positions = torch.randn(tokens, HIDDEN), torch.randint(reference.POSITIONS, (tokens,))
    slots = torch.randperm(BLOCKS * BLOCK)[:tokens]
    slots[2] = -1  # a token of the padding
    before = [x.clone() for x in reference.caches(layer.attn.kv_cache)]
    with torch.no_grad(), reference.forward_context(config, **{name: slots}):
        qkv, _ = layer.qkv_proj(hidden)
        result = layer(positions=positions, hidden_states=hidden)
    assert len(operator_calls) == len(recorder.calls) == 1
    query = recorder.calls[0]["query"]
    assert query.shape == (tokens, HEADS, HEAD_DIM) and recorder.calls[0]["key"].shape == (tokens, KV_HEADS, HEAD_DIM)
    q, k, v = reference.exact(layer, qkv, positions)
    their_q, their_k = expected_from_vllm(qkv, positions)
    assert errors(query, q) <= errors(their_q, q)
    stored = slots >= 0
    for cache, poison, exact, theirs in zip(
        reference.caches(layer.attn.kv_cache), before, (k, v), (their_k, v.bfloat16()), strict=True
    ):
        assert errors(cache[slots[stored]], exact[stored]) <= errors(theirs[stored], exact[stored])
        untouched = torch.ones(len(cache), dtype=torch.bool)
        untouched[slots[stored]] = False
        assert torch.equal(cache[untouched], poison[untouched])
    assert torch.equal(result, layer.o_proj(query.flatten(1))[0])


@needs_vllm
def test_fewer_slots_than_tokens_leave_the_rest(config, attention):
    layer, _ = attention()
    replaced(layer)
    with torch.no_grad(), reference.forward_context(config, **{layer.attn.layer_name: torch.tensor([9, 40, 3])}):
        layer(torch.arange(5), torch.randn(5, HIDDEN))
    k, _ = reference.caches(layer.attn.kv_cache)
    assert set((k != 3.0).flatten(1).any(1).nonzero().flatten().tolist()) == {3, 9, 40}


@needs_vllm
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_profiling_run_stores_nothing(family, config, attention):
    """There vLLM has no slots, and no cache but a placeholder."""
    layer, recorder = attention(family)
    replaced(layer)
    layer.attn.kv_cache = torch.tensor([])
    hidden, positions = torch.randn(3, HIDDEN), torch.tensor([0, 1, 2])
    with torch.no_grad(), reference.forward_context(config):
        layer(positions, hidden)
        qkv, _ = layer.qkv_proj(hidden)
    q, _, _ = reference.exact(layer, qkv, positions)
    assert errors(recorder.calls[0]["query"], q) < 0.01 * float(q.pow(2).mean().sqrt())


@needs_vllm
def test_a_layer_that_shares_a_cache_stores_nothing(config, attention):
    layer, recorder = attention()
    layer.attn.kv_sharing_target_layer_name = "model.layers.0.self_attn.attn"
    replaced(layer)
    before = layer.attn.kv_cache.clone()
    with torch.no_grad(), reference.forward_context(config, **{layer.attn.layer_name: torch.tensor([1, 2, 3])}):
        layer(torch.arange(3), torch.randn(3, HIDDEN))
    assert torch.equal(layer.attn.kv_cache, before) and recorder.calls[0]["query"].isfinite().all()


@needs_vllm
@pytest.mark.parametrize("quantises_q", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_float8_caches_and_queries(family, quantises_q, config, attention):
    """Codes are the nearest to the exact quotient, or next to it where that lies near the middle of two."""
    layer, recorder = attention(family, "fp8")
    assert layer.attn.kv_cache_dtype == "fp8" and layer.attn.query_quant is not None
    if not quantises_q:
        layer.attn.query_quant = None
    for scale, value in ((layer.attn._q_scale, 0.03), (layer.attn._k_scale, 0.02), (layer.attn._v_scale, 0.01)):
        scale.fill_(value)
    replaced(layer)
    hidden, positions, slots = torch.randn(5, HIDDEN), torch.arange(5), torch.tensor([70, 2, -1, 33, 4])
    with torch.no_grad(), reference.forward_context(config, **{layer.attn.layer_name: slots}):
        result = layer(positions, hidden)
        qkv, _ = layer.qkv_proj(hidden)
    assert result.dtype == torch.bfloat16
    q, k, v = reference.exact(layer, qkv, positions)
    stored = slots >= 0
    k_cache, v_cache = reference.caches(layer.attn.kv_cache)
    found = [(k_cache[slots[stored]], k[stored] / 0.02), (v_cache[slots[stored]], v[stored] / 0.01)]
    query = recorder.calls[0]["query"]
    assert query.dtype == (E4M3 if quantises_q else torch.bfloat16)
    if quantises_q:
        found.append((query.double(), q / 0.03))
    for codes, quotients in found:
        nearest = quotients.clamp(-448, 448).float().to(E4M3).double()
        assert (codes == nearest).double().mean() > 0.99
        assert ((codes - quotients).abs() <= 1.001 * (nearest - quotients).abs() + 1e-4 * quotients.abs()).all()
    unwritten = torch.ones(len(k_cache), dtype=torch.bool)
    unwritten[slots[stored]] = False
    assert (k_cache[unwritten] == 1.0).all() and (v_cache[unwritten] == 1.0).all()


ROTATIONS = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "partial": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "mrope": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
    "mrope_interleaved": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
}


@needs_vllm
@pytest.mark.parametrize(
    ("kind", "three"), [*((kind, False) for kind in ROTATIONS), ("mrope", True), ("mrope_interleaved", True)]
)
def test_rotary_embeddings(kind, three, config, attention, operator_calls):
    layer, recorder = attention("qwen3", rope=ROTATIONS[kind])
    expected_from_vllm = without_plugin(layer)
    replaced(layer)
    shape = (3, 9) if three else (9,)
    hidden, positions = torch.randn(9, HIDDEN), torch.randint(reference.POSITIONS, shape)
    with torch.no_grad(), reference.forward_context(config, **{layer.attn.layer_name: torch.arange(9)}):
        layer(positions, hidden)
        qkv, _ = layer.qkv_proj(hidden)
    q, k, _ = reference.exact(layer, qkv, positions)
    their_q, their_k = expected_from_vllm(qkv, positions)
    assert len(operator_calls) == 1
    assert errors(recorder.calls[0]["query"], q) <= errors(their_q, q) < 0.01 * float(q.pow(2).mean().sqrt())
    assert errors(reference.caches(layer.attn.kv_cache)[0][:9], k) <= errors(their_k, k)


@needs_vllm
def test_a_sliding_window_is_that_of_the_layer(config, attention):
    layer, _ = attention("gemma3")
    window = layer.attn.impl.sliding_window
    assert window == ((31, 0) if layer.is_sliding else (-1, -1))
    replaced(layer)
    assert layer.attn.impl.sliding_window == window


@needs_vllm
def test_attention_that_is_left_has_a_reason(config, attention, monkeypatch):
    from jitnorm.integrations.vllm_plugin import fusion
    from jitnorm.integrations.vllm_plugin.models import replace_operators

    def reason(change=lambda layer: None, family="qwen3", **changes):
        layer, _ = attention(family)
        original = type(layer)
        change(layer)
        report = replace_operators(torch.nn.ModuleDict({"a": layer}), settings(**changes))
        assert type(layer) is original
        return report.left["a"].removeprefix(f"{original.__name__}: ")

    def attn(**values):
        def change(layer):
            for name, value in values.items():
                setattr(layer.attn, name, value)

        return change

    def parallel(**sizes):
        names = ("decode_context_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size")
        return SimpleNamespace(**dict.fromkeys(names, 1) | sizes)

    assert "context parallelism" in reason(parallel_config=parallel(decode_context_parallel_size=2))
    assert "context parallelism" in reason(parallel_config=parallel(prefill_context_parallel_size=2))
    assert "calculated in the first forward pass" in reason(attn(calculate_kv_scales=True))
    assert "type encoder_only" in reason(attn(attn_type="encoder_only"))
    assert "without an operator" in reason(attn(use_direct_call=True))
    assert reason(attn(kv_cache_dtype="fp8_e5m2")) == "kv_cache_dtype fp8_e5m2 is not supported"
    assert "its cache is torch.float16" in reason(attn(kv_cache_torch_dtype=torch.float16))
    assert "heads of v" in reason(attn(head_size_v=32))
    assert "a scale for each head" in reason(attn(query_quant=object(), _q_scale=torch.ones(2)))
    assert "the model is torch.float64" in reason(dtype=torch.float64)
    assert "its norm of q and k is LayerNorm" in reason(lambda m: setattr(m, "q_norm", torch.nn.LayerNorm(HEAD_DIM)))
    assert "differ" in reason(lambda m: setattr(m.q_norm, "variance_epsilon", 1e-3))
    assert "scales q by its position" in reason(lambda m: setattr(m, "do_llama_4_scaling", True), "mistral")
    assert "its rotary embedding is" in reason(lambda m: setattr(m, "rotary_emb", torch.nn.Identity()))
    assert "no kernel rotates 20" in reason(rotary_dim(20))
    assert "no kernel supports head_dim 40" in reason(attn(head_size=40, head_size_v=40))
    monkeypatch.setenv(engine_plugins.SKIP, "attention")
    assert reason() == "JITNORM_PLUGIN_SKIP names attention"
    monkeypatch.delenv(engine_plugins.SKIP)
    monkeypatch.setattr(fusion, "BACKENDS", {})
    assert reason() == "the attention backend FLASH_ATTN is not supported"


def rotary_dim(size):
    def change(layer):
        layer.rotary_emb = copy.deepcopy(layer.rotary_emb)  # vLLM shares one among layers
        layer.rotary_emb.rotary_dim = size
        layer.rotary_emb.cos_sin_cache = layer.rotary_emb.cos_sin_cache[:, :size]

    return change


def model_of_norms(family: str, count: int = 3) -> torch.nn.Module:
    """Return a model of vLLM with its decoder layers, which have no module but their norms, and its last norm."""
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

    models = importlib.import_module(f"vllm.model_executor.models.{family}")
    prefix, norm = family.capitalize(), GemmaRMSNorm if family == "gemma3" else RMSNorm

    def empty(cls: type) -> torch.nn.Module:
        module = cls.__new__(cls)
        torch.nn.Module.__init__(module)
        return module

    model = empty(getattr(models, f"{prefix}Model"))
    model.layers, model.norm = torch.nn.ModuleList(), norm(256)
    for _ in range(count):
        layer = empty(getattr(models, f"{prefix}DecoderLayer"))
        layer.input_layernorm, layer.post_attention_layernorm = norm(256), norm(256)
        if family == "gemma3":
            layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm = norm(256), norm(256)
        model.layers.append(layer)
    return model


@needs_vllm
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral", "gemma3"])
def test_residuals_stay_in_float32(family, layers, bfloat16):
    """Run the norms as the layers do, with random results in place of attention and MLP."""
    from jitnorm.integrations.vllm_plugin.models import replace_operators

    model = model_of_norms(family)
    random_weights(model)
    report = replace_operators(model, settings())
    marked = [name for name, what in report.replaced.items() if what.endswith("RMSNorm, residual in float32")]
    second = "pre_feedforward_layernorm" if family == "gemma3" else "post_attention_layernorm"
    names = [f"layers.{i}.{name}" for i in range(3) for name in ("input_layernorm", second)]
    assert sorted(marked) == sorted([*names, "norm"])
    norms = [model.get_submodule(name) for name in names[1:]] + [model.norm]
    start, *added = torch.randn(len(norms) + 1, 7, 256, dtype=torch.bfloat16)

    def run(forwards, residual, dtype):
        results = []
        for forward, x in zip(forwards, added, strict=True):
            result, residual = forward(x.to(dtype, copy=True), residual)
            results.append(result)
        return results, residual

    with torch.no_grad():
        results, residual = run(norms, start.clone(), torch.bfloat16)
        theirs, _ = run([stock(norm) for norm in norms], start.clone(), torch.bfloat16)
        exact, _ = run([stock(copy.deepcopy(norm).double()) for norm in norms], start.double(), torch.float64)
    assert residual.dtype == torch.float32 and {result.dtype for result in results} == {torch.bfloat16}
    assert torch.equal(residual, sum((x.float() for x in added), start.float()))
    for ours, other, expected in list(zip(results, theirs, exact, strict=True))[1:]:
        assert errors(ours, expected) < errors(other, expected)


@needs_vllm
@pytest.mark.parametrize(
    "case",
    [
        *("pipeline", "speculation", "auxiliary states", "another layer", "a norm that is left", "another source"),
        "no kernel",
    ],
)
def test_residuals_that_others_may_read_keep_their_dtype(case, layers, bfloat16, monkeypatch):
    from vllm.config import CompilationConfig

    from jitnorm.integrations.vllm_plugin import compatibility, models
    from jitnorm.integrations.vllm_plugin.models import replace_operators

    model, changes = model_of_norms("qwen3"), {}
    if case == "pipeline":
        sizes = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "pipeline_parallel_size": 2}
        changes["parallel_config"] = SimpleNamespace(**sizes)
    elif case == "speculation":
        changes["speculative_config"] = SimpleNamespace()
    elif case == "auxiliary states":
        model.aux_hidden_state_layers = (1,)
    elif case == "another layer":
        layer = model.layers[1]
        layer.__class__ = type("Other", (type(layer),), {"forward": lambda self, *arguments: arguments})
    elif case == "a norm that is left":
        model.layers[2].input_layernorm.weight.data = torch.ones(256, dtype=torch.float16)
    elif case == "no kernel":
        monkeypatch.setattr(
            models, "build_and_load", lambda specs: {s: "no compiler" for s in specs if "fp32_residual" in s.op}
        )
    else:
        changed = compatibility.changed
        monkeypatch.setattr(compatibility, "changed", lambda part: "changed" if part == "residuals" else changed(part))
    report = replace_operators(model, settings(compilation_config=CompilationConfig(), **changes))
    assert report.replaced and not [what for what in report.replaced.values() if "float32" in what]
    note = "residual in torch.bfloat16, not in float32: no compiler"
    assert report.notes == [note] * (case == "no kernel")
    x, residual = torch.randn(2, 3, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        assert model.layers[0].input_layernorm(x, residual)[1].dtype == torch.bfloat16


@needs_vllm
def test_norms_whose_arguments_others_may_read_are_left(layers):
    """Norms of heads have strided rows for several tokens, and speculative decoding keeps residuals."""
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

    from jitnorm.integrations.vllm_plugin.models import replace_operators

    norms = torch.nn.ModuleDict({"q_norm": RMSNorm(64), "norm": RMSNorm(256), "gemma": GemmaRMSNorm(256)})
    report = replace_operators(norms, settings(torch.float32, speculative_config=SimpleNamespace()))
    assert list(report.replaced) == ["norm"] and [*norms["q_norm"].parameters()]
    assert "heads in a slice of the projection" in report.left["q_norm"]
    assert "speculative decoding may keep its residual" in report.left["gemma"]


@needs_vllm
def test_a_forward_that_is_not_the_known_one_is_left_alone(config, attention):
    from jitnorm.integrations.vllm_plugin.models import replace_operators

    layer, _ = attention("llama")
    layer.__class__ = type("Other", (type(layer),), {"forward": lambda self, positions, hidden_states: hidden_states})
    report = replace_operators(torch.nn.ModuleDict({"a": layer}), settings())
    assert not report.replaced
    assert report.left["a"] == "Other: attention layers of this class are not supported"
    layer.__class__ = type("Heir", (type(layer).__base__,), {})
    assert "a" in replace_operators(torch.nn.ModuleDict({"a": layer}), settings()).replaced


@needs_vllm
def test_a_kernel_that_cannot_be_built_leaves_the_module(config, attention, monkeypatch):
    from jitnorm.integrations.vllm_plugin import models

    layer, _ = attention()
    monkeypatch.setattr(engine_plugins, "find_cached", lambda specs: ([], list(specs)))
    monkeypatch.setattr(
        engine_plugins, "build_all", lambda specs: [SimpleNamespace(spec=s, error="no compiler") for s in specs]
    )
    report = models.replace_operators(torch.nn.ModuleDict({"a": layer}), settings())
    assert report.left == {"a": "Qwen3Attention: its kernel cannot be built: no compiler"} and not report.replaced
    assert not hasattr(layer.attn, "jitnorm_fusion")


@needs_vllm
def test_builds_may_be_forbidden(config, attention, cache_dir, monkeypatch):
    from jitnorm.integrations.vllm_plugin import models

    layer, _ = attention()
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    report = models.replace_operators(torch.nn.ModuleDict({"a": layer}), settings())
    assert "JITNORM_DISABLE_JIT" in report.left["a"] and not report.replaced


@needs_vllm
def test_kernels_are_built_and_loaded_before_the_first_forward(config, attention, cache_dir, monkeypatch):
    from jitnorm.jit import find

    layer, _ = attention("qwen3", "fp8")
    replaced(layer)
    monkeypatch.setattr(find, "_build", lambda spec: pytest.fail(f"built {spec}"))
    monkeypatch.setattr(find, "open_kernel", lambda spec: pytest.fail(f"loaded {spec}"))
    with torch.no_grad(), reference.forward_context(config, **{layer.attn.layer_name: torch.arange(3)}):
        layer(torch.arange(3), torch.randn(3, HIDDEN))
    with torch.no_grad(), reference.forward_context(config):
        layer(torch.arange(3), torch.randn(3, HIDDEN))


# Compiled


def graph_of(function, *arguments):
    """Return a function that torch compiles in one graph, its result, and the functional graph after AOTAutograd."""
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep), dynamic=True)
    result = compiled(*arguments)
    (graph,) = graphs
    return result, graph


def targets(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def decoder_layers(config, count):
    """Make layers of Qwen3, random and replaced, on the CPU."""
    import transformers
    from vllm.config import CacheConfig
    from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer

    of_model = transformers.Qwen3Config(
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=reference.POSITIONS,
        rope_parameters=reference.ROPE,
    )
    known = len(config.compilation_config.static_forward_context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops._C, "silu_and_mul", None, raising=False)
        layers = torch.nn.ModuleList(
            Qwen3DecoderLayer(
                of_model, CacheConfig(block_size=BLOCK, cache_dtype="bfloat16"), prefix=f"model.layers.{known + i}"
            )
            for i in range(count)
        )
    for layer in layers:
        layer.mlp.act_fn._forward_method = layer.mlp.act_fn.forward_native  # and not by another torch.compile
        layer.self_attn.attn.kv_cache = torch.full((BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_DIM), 3.0)
        reference.Recorder(layer.self_attn.attn)
    random_weights(layers)
    return layers


def run_layers(layers):
    def function(positions, hidden_states):
        residual = None
        for layer in layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states, residual

    return function


@needs_vllm
def test_the_compiled_graph_calls_the_kernels_and_copies_nothing(config, attention, monkeypatch):
    """Two layers of Qwen3: norms by this package although vLLM's mode enables no custom operator."""
    from jitnorm.integrations.vllm_plugin.models import replace_operators

    layers = decoder_layers(config, 2)
    report = replace_operators(layers, settings())
    assert sorted(report.replaced.values()) == sorted(
        2 * ["Qwen3Attention (norm, rotation and cache store in one launch)"] + 4 * ["RMSNorm"]
    )
    assert set(report.left.values()) == {"SiluAndMul: vLLM has not enabled it, and Inductor generates it"}
    hidden, positions, slots = torch.randn(7, HIDDEN), torch.arange(7), torch.arange(20, 27)
    names = [layer.self_attn.attn.layer_name for layer in layers]
    with torch.inference_mode(), reference.forward_context(config, **dict.fromkeys(names, slots)):
        eager = run_layers(layers)(positions, hidden.clone())
        stored = [layer.self_attn.attn.kv_cache.clone() for layer in layers]
        for layer in layers:
            layer.self_attn.attn.kv_cache.fill_(3.0)
        compiled, graph = graph_of(run_layers(layers), positions, hidden.clone())
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)
    for layer, expected in zip(layers, stored, strict=True):
        assert torch.equal(layer.self_attn.attn.kv_cache[1], expected[1])
    calls = targets(graph)
    assert calls.count("jitnorm.rmsnorm.default") == 1  # of the first layer, which has no residual yet
    assert calls.count("jitnorm_vllm.qk_norm_rope_store.default") == 2
    functionalised = [n for n in graph.graph.nodes if str(n.target).startswith("auto_functionalized")]
    operators = [str(n.args[0] if n.args else n.kwargs["_op"]) for n in functionalised]
    assert sorted(operators) == 3 * ["jitnorm.fused_add_rmsnorm.default"] + 2 * [
        "vllm.unified_attention_with_output.default"
    ]
    assert not [name for name in calls if "clone" in name or "copy" in name], calls


@needs_vllm
def test_compiled_norms_of_strided_heads_are_those_of_vllm(layers, bfloat16):
    """Attention that is left normalises slices of the projection, which Inductor does without a copy."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    norm = activated(RMSNorm(HEAD_DIM), torch.bfloat16)
    qkv = torch.randn(5, 4 * HEAD_DIM)
    with torch.inference_mode():
        result, graph = graph_of(lambda x: norm(x[:, : 2 * HEAD_DIM].unflatten(-1, (2, HEAD_DIM))), qkv)
        expected = stock(norm)(qkv[:, : 2 * HEAD_DIM].unflatten(-1, (2, HEAD_DIM)))
    assert torch.equal(result, expected)
    assert "vllm_ir.rms_norm.default" in targets(graph) and "jitnorm.rmsnorm.default" not in targets(graph)


@needs_vllm
def test_inductor_generates_no_copy_around_the_kernels(config, attention):
    from torch._inductor.utils import run_and_get_code

    from jitnorm.integrations.vllm_plugin.models import replace_operators

    layers = decoder_layers(config, 2)
    replace_operators(layers, settings())
    hidden, positions, slots = torch.randn(7, HIDDEN), torch.arange(7), torch.arange(20, 27)
    names = [layer.self_attn.attn.layer_name for layer in layers]
    torch._dynamo.reset()
    with torch.inference_mode(), reference.forward_context(config, **dict.fromkeys(names, slots)):
        eager = run_layers(layers)(positions, hidden.clone())
        compiled = torch.compile(run_layers(layers), fullgraph=True, dynamic=True)
        result, (code,) = run_and_get_code(compiled, positions, hidden.clone())
    for a, b in zip(eager, result, strict=True):
        assert (a.float() - b.float()).abs().max() <= 0.05 * a.float().abs().max()
    body = code.partition("def call(")[2]
    assert body.count("torch.ops.jitnorm.fused_add_rmsnorm.default(") == 3
    assert body.count("torch.ops.jitnorm_vllm.qk_norm_rope_store.default(") == 2
    generated = [line.strip() for line in body.splitlines() if "cpp_fused" in line]
    # Both activations, and the sum of the first residual: the graph may not write its own input.
    assert len([line for line in generated if "silu" in line or "mul" in line]) == 2, generated
    assert len(generated) == 2, generated


@needs_vllm
def test_vllm_splits_the_graph_into_one_piece_for_the_launch_and_attention(config, attention):
    """Between these pieces lie those that it captures, without a launch that reads the step's slots."""
    from vllm.compilation.backends import split_graph

    from jitnorm.integrations.vllm_plugin.attention import OPERATOR
    from jitnorm.integrations.vllm_plugin.models import replace_operators

    layers = decoder_layers(config, 2)
    replace_operators(layers, settings())
    graphs = []
    torch._dynamo.reset()
    names = [layer.self_attn.attn.layer_name for layer in layers]
    with torch.inference_mode(), reference.forward_context(config, **dict.fromkeys(names, torch.arange(3))):
        compiled = torch.compile(run_layers(layers), fullgraph=True, backend=lambda g, _: graphs.append(g) or g)
        compiled(torch.arange(3), torch.randn(3, HIDDEN))
    _, items = split_graph(graphs[0], splitting_ops_of(config))
    pieces = [(item.is_splitting_graph, " ".join(targets(item.graph))) for item in items]
    assert [is_split for is_split, _ in pieces] == [False, True, False, True, False]
    for is_split, calls in pieces:
        assert (OPERATOR.replace("::", ".") in calls) is is_split
        assert ("unified_attention_with_output" in calls) is is_split
        assert ("fused_add_rmsnorm" in calls or "jitnorm.rmsnorm" in calls) is not is_split
        assert calls.count(" ") <= 1 or not is_split, "nothing but the two operators runs outside of CUDA graphs"


def splitting_ops_of(config, **options):
    """Return where vLLM splits a compiled model."""
    from vllm.config import CompilationConfig

    compilation = CompilationConfig(mode=3, **options)
    compilation.set_splitting_ops_for_v1("naive")
    return compilation.splitting_ops


@needs_vllm
def test_vllm_splits_at_the_launch_where_it_splits_at_its_own_store(config):
    from jitnorm.integrations.vllm_plugin.attention import OPERATOR
    from jitnorm.integrations.vllm_plugin.installation import _OPERATOR

    assert OPERATOR == _OPERATOR
    for options in (
        {},
        {"splitting_ops": []},
        {"use_inductor_graph_partition": True},
        {"splitting_ops": ["vllm::unified_attention_with_output", "vllm::unified_kv_cache_update"]},
        {"splitting_ops": ["vllm::unified_attention_with_output"]},
    ):
        found = splitting_ops_of(config, **options)
        assert (OPERATOR in found) is ("vllm::unified_kv_cache_update" in found), options
        assert found.count(OPERATOR) <= 1
    assert OPERATOR in splitting_ops_of(config)


@needs_vllm
def test_compiled_graphs_of_the_plugin_have_a_key_of_their_own(config):
    from vllm.config import VllmConfig

    from jitnorm.integrations.vllm_plugin import installation

    plugged = config.compute_hash()
    assert plugged == config.compute_hash()
    report = Report("Model", {"layers.0": "RMSNorm"})
    REPORTS.append(report)
    one = config.compute_hash()
    REPORTS.append(Report("Model", {"layers.0": "RMSNorm"}))
    assert config.compute_hash() == one, "a model that is loaded again has the same graph"
    del REPORTS[-1]
    report.replaced.clear()
    assert len({plugged, one, config.compute_hash()}) == 3, "a module that is left changes the graph"
    REPORTS.remove(report)
    assert config.compute_hash() == plugged
    installation.uninstall()
    try:
        assert VllmConfig.compute_hash.__module__.startswith("vllm")
        assert config.compute_hash() != plugged
    finally:
        reinstall(installation)
    assert config.compute_hash() == plugged


@needs_vllm
def test_models_are_replaced_after_loading_and_explained(config, attention, caplog, monkeypatch):
    """The loader of vLLM, with a model that has one layer of attention and one norm."""
    from vllm.config import LoadConfig
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    from jitnorm.integrations.vllm_plugin import report

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn, _ = attention()
            self.norm = RMSNorm(HIDDEN)

    monkeypatch.setattr(report, "REPORTS", [])
    monkeypatch.setattr(vllm_plugin, "REPORTS", report.REPORTS)
    monkeypatch.setattr(base_loader, "initialize_model", lambda **_: Model())
    monkeypatch.setattr(base_loader, "process_weights_after_loading", lambda *_: None)
    loader = DummyModelLoader(LoadConfig(load_format="dummy"))
    made = settings(load_config=LoadConfig())
    with caplog.at_level(logging.INFO, "jitnorm"):
        model = loader.load_model(made, made.model_config)
    assert model.norm.jitnorm_is_active and type(model.self_attn).__name__ == "JitnormQwen3Attention"
    (explained,) = vllm_plugin.explain()
    assert explained.replaced == {
        "self_attn": "Qwen3Attention (norm, rotation and cache store in one launch)",
        "norm": "RMSNorm",
    }
    assert caplog.messages.count(f"jitnorm's plugin in vLLM, {explained}") == 1
    assert str(explained).splitlines()[0] == "Model: replaced 2 modules, left 0"


# vLLM's batch-invariant mode


@pytest.fixture
def operators(config, monkeypatch):
    """Install the operators, as the plugin does with VLLM_BATCH_INVARIANT=1."""
    from vllm.model_executor.layers import batch_invariant

    from jitnorm.integrations.vllm_plugin import batch_invariant_mode

    batch_invariant_mode.install(monkeypatch.setattr)
    assert batch_invariant.bmm_batch_invariant is batch_invariant_mode.bmm_batch_invariant
    return batch_invariant_mode


@needs_vllm
@pytest.mark.parametrize("mode", [False, True])
def test_the_operators_are_replaced_in_the_mode(mode, config, monkeypatch):
    from vllm import envs
    from vllm.model_executor.layers import linear

    from jitnorm.integrations.vllm_plugin import installation

    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", mode, raising=False)
    try:
        reinstall(installation)
        function = linear.linear_batch_invariant
        assert function.__module__.startswith("jitnorm" if mode else "vllm")
        note = "replaced the GEMMs, softmax, means and norms of vLLM's batch-invariant mode"
        assert installation._notes == [note] * mode
    finally:
        monkeypatch.undo()
        reinstall(installation)
    assert linear.linear_batch_invariant.__module__.startswith("vllm")


@needs_vllm
@pytest.mark.parametrize("shape", [(1,), (17,), (2, 3)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_vllms_linear_layers_call_the_gemms(shape, has_bias, operators, monkeypatch):
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    for module, method in (
        (linear, linear.UnquantizedLinearMethod),
        (vocab_parallel_embedding, vocab_parallel_embedding.UnquantizedEmbeddingMethod),
    ):
        monkeypatch.setattr(module.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
        monkeypatch.setattr(module, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
        layer = torch.nn.Linear(96, 40, bias=has_bias, dtype=torch.bfloat16).requires_grad_(False)
        x = torch.randn(*shape, 96).bfloat16()
        result = method.apply(None, layer, x, layer.bias)
        exact = x.double() @ layer.weight.double().t() + (layer.bias.double() if has_bias else 0)
        assert result.shape == (*shape, 40)
        assert (result.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
        alone = method.apply(None, layer, x.view(-1, 96)[-1:], layer.bias)
        assert torch.equal(alone[0], result.view(-1, 40)[-1])
        torch._dynamo.reset()
        compiled, graph = graph_of(lambda y, m=method, o=layer: m.apply(None, o, y, o.bias), x)
        assert torch.equal(compiled, result) and "jitnorm_vllm.linear.default" in targets(graph)


@needs_vllm
def test_batched_gemms_and_norms(operators):
    from vllm.model_executor.layers import batch_invariant, layernorm

    a, b = torch.randn(3, 5, 96).bfloat16(), torch.randn(3, 96, 40).bfloat16()
    out = torch.full((3, 5, 40), torch.nan).bfloat16()
    assert batch_invariant.bmm_batch_invariant(a, b, out=out) is out
    exact = a.double() @ b.double()
    assert (out.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert torch.equal(batch_invariant.bmm_batch_invariant(a[1:2], b[1:2])[0], out[1])
    torch._dynamo.reset()
    compiled, graph = graph_of(lambda x, y: batch_invariant.bmm_batch_invariant(x, y), a, b)
    assert torch.equal(compiled, out) and "jitnorm_vllm.bmm.default" in targets(graph)
    # A norm over heads in a slice of the projection, and one without a weight.
    x, weight = torch.randn(7, 3, 96).bfloat16()[:, :2], torch.randn(96).bfloat16()
    for factor in (weight, None):
        result = layernorm.rms_norm_batch_invariant(x, factor, 1e-6)
        wide = x.double()
        exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 if factor is None else factor.double())
        assert result.shape == x.shape and (result.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@needs_vllm
@pytest.mark.parametrize("before", [False, True])
def test_vllm_registers_the_reductions_as_aten_operators(before):
    """In a process of its own, because vLLM's mode cannot be left: before the mode is on, and in it, as in workers."""
    done = run(
        """
        import torch, vllm.platforms
        from vllm.platforms.cpu import CpuPlatform

        vllm.platforms._current_platform = CpuPlatform()
        from jitnorm.integrations import vllm_plugin
        from jitnorm.batch_invariant.reductions import softmax_mean
        calls = []
        for name in ("aten_softmax", "aten_mean"):
            import jitnorm.integrations.vllm_plugin.batch_invariant_mode as batch_invariant_mode
            original = getattr(batch_invariant_mode, name)
            setattr(batch_invariant_mode, name, lambda *a, f=original, n=name, **k: (calls.append(n), f(*a, **k))[1])
        from vllm.model_executor.layers import batch_invariant
        vllm_plugin.register()
        from jitnorm.integrations.vllm_plugin.installation import replace_layers
        if BEFORE:
            replace_layers()

        torch.manual_seed(0)
        x = torch.randn(5, 1000).bfloat16()
        batch_invariant.enable_batch_invariant_mode()
        replace_layers()
        results = {
            "softmax": (torch.softmax(x, -1), x.double().exp() / x.double().exp().sum(-1, keepdim=True)),
            "float32": (torch.softmax(x, -1, dtype=torch.float32), x.double().exp() / x.double().exp().sum(-1, True)),
            "log": (torch.log_softmax(x, -1), x.double() - x.double().exp().sum(-1, keepdim=True).log()),
            "mean": (x.mean(-1), x.double().sum(-1) / 1000),
            "bmm": (torch.bmm(x[None], x[None].mT), (x.double() @ x.double().t())[None]),
        }
        for name, (result, exact) in results.items():
            error = (result.double() - exact).abs().max() / exact.abs().max()
            print(name, result.dtype, bool(error <= 2**-8))
        print(calls)
        """.replace("BEFORE", str(before)),
        JITNORM_VLLM="1",
        VLLM_BATCH_INVARIANT="1",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    assert done.stdout.splitlines()[-6:] == [
        "softmax torch.bfloat16 True",
        "float32 torch.float32 True",
        "log torch.bfloat16 True",
        "mean torch.bfloat16 True",
        "bmm torch.bfloat16 True",
        "['aten_softmax', 'aten_softmax', 'aten_softmax', 'aten_mean']",
    ], done.stdout + done.stderr


def test_the_import_hook_waits_for_an_import_that_succeeds(tmp_path, monkeypatch):
    from jitnorm.integrations.vllm_plugin.installation import _ImportHook

    name, found = "jitnorm_test_loader", []
    (tmp_path / f"{name}.py").write_text("import sys\nif sys.jitnorm_fails:\n    raise OSError\nvalue = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    hook = _ImportHook(name, lambda module: found.append(module.value))
    sys.meta_path.insert(0, hook)
    try:
        assert importlib.util.find_spec(name).name == name
        monkeypatch.setattr(sys, "jitnorm_fails", True, raising=False)
        with pytest.raises(OSError):
            importlib.import_module(name)
        monkeypatch.setattr(sys, "jitnorm_fails", False)
        assert not found and hook in sys.meta_path
        importlib.import_module(name)
        assert found == [3] and hook not in sys.meta_path
    finally:
        hook.remove()
        sys.modules.pop(name, None)


def test_modules_of_any_kind_have_a_name_of_their_forward():
    linear = torch.nn.Linear(2, 2)
    assert compatibility.name_of_forward(linear) == "torch.nn.modules.linear:Linear.forward"
    assert compatibility.name_of_forward(torch.jit.trace(linear, torch.zeros(1, 2))) == ":"


def test_a_module_of_vllm_that_raises_is_a_change(tmp_path, monkeypatch):
    (tmp_path / "jitnorm_test_backend.py").write_text("raise RuntimeError('no driver')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(compatibility.FINGERPRINTS, "test", {"jitnorm_test_backend:forward": ""})
    expected = "vLLM's jitnorm_test_backend:forward cannot be imported: RuntimeError: no driver"
    assert compatibility.changed("test") == expected


@needs_vllm
def test_registering_imports_no_layers(tmp_path):
    """A process that only serves requests does without them. Loading a model imports them, and the plugin follows."""
    done = run(
        """
        import sys, vllm.platforms
        from vllm.platforms.cpu import CpuPlatform

        vllm.platforms._current_platform = CpuPlatform()
        import vllm.config
        from jitnorm.integrations import vllm_plugin

        before = set(sys.modules)
        vllm_plugin.register()
        print(sorted(name for name in set(sys.modules) - before if name.startswith("vllm.")))
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
        print(BaseModelLoader.load_model.__code__.co_filename.endswith("installation.py"))
        print(vllm_plugin.installation._ImportHook in map(type, sys.meta_path))
        """,
        JITNORM_VLLM="1",
        VLLM_LOGGING_LEVEL="ERROR",
    )
    assert done.stdout.splitlines()[-3:] == ["[]", "True", "False"], done.stdout + done.stderr


@needs_vllm
def test_vllm_compiles_a_whole_model_and_loads_it_from_its_cache(tmp_path):
    """By vLLM's compiler: traced, split at the operators, compiled by Inductor piece by piece, stored and loaded."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 2, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(sizes | model | {"vocab_size": 512, "hidden_act": "silu"}))
    script = Path(__file__).with_name("vllm_compile.py")
    for is_cached in (False, True):
        done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        replaced, error = done.stdout.splitlines()[-2:]
        assert replaced == f"7 {is_cached}"  # five norms and two layers of attention
        assert float(error) < 0.02  # Inductor's activations round less often than those of eager mode


@needs_vllm
@pytest.mark.parametrize(
    ("environment", "is_active"),
    [
        ({"JITNORM_VLLM": "1"}, True),
        ({}, False),
        ({"VLLM_PLUGINS": "jitnorm"}, True),
        ({"VLLM_PLUGINS": "other", "JITNORM_VLLM": "1"}, False),  # vLLM does not load it
    ],
    ids=str,
)
def test_vllm_finds_the_plugin_by_its_entry_point(environment, is_active, tmp_path):
    """Twice, as in a process that vLLM starts with what it needs to start others."""
    metadata = tmp_path / "jitnorm_of_a_test-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: jitnorm-of-a-test\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\njitnorm = {entry_point()}\n")
    done = run(
        """
        import sys, vllm.platforms
        from vllm.platforms.cpu import CpuPlatform

        sys.path.insert(0, FOLDER)
        vllm.platforms._current_platform = CpuPlatform()
        from vllm import plugins
        from vllm.config import VllmConfig

        for _ in range(2):
            plugins.load_general_plugins()
            plugins.plugins_loaded = False
        print(VllmConfig.compute_hash.__code__.co_filename.endswith("installation.py"))
        """.replace("FOLDER", repr(str(tmp_path))),
        VLLM_LOGGING_LEVEL="ERROR",
        **environment,
    )
    assert done.stdout.splitlines()[-1:] == [str(is_active)], done.stdout + done.stderr


@needs_vllm
def test_inductor_calls_linear_layers_without_the_dispatcher(monkeypatch):
    """Compiled code gives the function memory for its result, and memory of its own for inputs with gaps."""
    from torch._inductor.utils import run_and_get_code

    from jitnorm.integrations import engine_gemms
    from jitnorm.integrations.vllm_plugin import linears

    def gemm(a, b, bias, out):
        assert a.is_contiguous() and out.is_contiguous() and bias is None
        out.copy_(2 * (a @ b))

    weight = torch.randn(32, 64)
    choices = dict.fromkeys((1, 2, 4, 8), gemm)
    monkeypatch.setitem(engine_gemms._chosen, engine_gemms.shape_of(weight), choices)
    linears._register_lowering()
    operator = torch.ops.jitnorm_vllm.linear_of_few_rows
    compiled = torch.compile(lambda x, w: operator(x, w) + 1, dynamic=True)
    for x in (torch.randn(3, 64), torch.randn(70, 64), torch.randn(64, 7).t(), torch.randn(5, 96)[:, :64]):
        got, code = run_and_get_code(compiled, x, weight)
        is_chosen = len(x) <= 8
        torch.testing.assert_close(got, (1 + is_chosen) * torch.nn.functional.linear(x, weight) + 1)
        assert all("torch.ops.jitnorm_vllm" not in text and "extern_kernels.jitnorm" in text for text in code)
    torch._dynamo.reset()
    with torch._inductor.config.patch(cpp_wrapper=True):  # which can call no Python function but by the dispatcher
        x = torch.randn(3, 64)
        compiled = torch.compile(lambda x, w: operator(x, w) + 1, dynamic=True)
        torch.testing.assert_close(compiled(x, weight), 2 * torch.nn.functional.linear(x, weight) + 1)


@needs_vllm
@pytest.mark.parametrize("activation", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_inductor_calls_gated_linear_layers_without_the_dispatcher(activation, monkeypatch):
    from torch._inductor.utils import run_and_get_code

    from jitnorm.integrations import engine_gemms
    from jitnorm.integrations.vllm_plugin import linears

    def gemm(a, b, bias, out):
        assert a.is_contiguous() and out.is_contiguous() and bias is None
        out.copy_(2 * expected(a, b.t()))

    def expected(x, weight):
        gate, up = torch.nn.functional.linear(x, weight).chunk(2, dim=-1)
        is_silu = activation == "silu_and_mul"
        return (torch.nn.functional.silu(gate) if is_silu else torch.nn.functional.gelu(gate, approximate="tanh")) * up

    weight = torch.randn(32, 64).mul_(0.1)
    choices = dict.fromkeys((1, 2, 4, 8), gemm)
    monkeypatch.setitem(engine_gemms._chosen, engine_gemms.shape_of(weight, activation), choices)
    linears._register_lowering()
    operator = torch.ops.jitnorm_vllm.gated_linear_of_few_rows
    compiled = torch.compile(lambda x, w: operator(x, w, activation) + 1, dynamic=True)
    for x in (torch.randn(3, 64), torch.randn(70, 64), torch.randn(64, 7).t(), torch.randn(5, 96)[:, :64]):
        got, code = run_and_get_code(compiled, x, weight)
        torch.testing.assert_close(got, (1 + (len(x) <= 8)) * expected(x, weight) + 1)
        assert all("torch.ops.jitnorm_vllm" not in text and "extern_kernels.jitnorm" in text for text in code)
    torch._dynamo.reset()
    with torch._inductor.config.patch(cpp_wrapper=True):
        x = torch.randn(3, 64)
        compiled = torch.compile(lambda x, w: operator(x, w, activation) + 1, dynamic=True)
        torch.testing.assert_close(compiled(x, weight), 2 * expected(x, weight) + 1)


def in_compiled_code(modules: dict[str, torch.nn.Module], do_not_compile: bool = False) -> torch.nn.ModuleDict:
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    class Compiled(TorchCompileWithNoGuardsWrapper, torch.nn.ModuleDict):
        def __init__(self):
            torch.nn.ModuleDict.__init__(self, modules)
            self.do_not_compile = do_not_compile

    return Compiled()


def with_graphs(**changes: object) -> SimpleNamespace:
    """Return a configuration with CUDA graphs of compiled code, for which linear layers are replaced."""
    from vllm.config import CompilationConfig, CUDAGraphMode

    compilation = CompilationConfig(mode=3, cudagraph_mode=CUDAGraphMode.FULL)
    for name, value in changes.pop("passes", {}).items():
        setattr(compilation.pass_config, name, value)
    for name in ("mode", "cudagraph_mode", "custom_ops"):
        setattr(compilation, name, changes.pop(name, getattr(compilation, name)))
    parallel = SimpleNamespace(tensor_parallel_size=1)
    given = {"compilation_config": compilation, "lora_config": None, "parallel_config": parallel}
    return settings(**given | changes)


@needs_vllm
def test_linear_layers_of_cuda_graphs_call_the_operator(config, layers, bfloat16, monkeypatch):
    """Layers of attention and of an MLP without a bias and a quantisation, and no others."""
    from vllm.config import CUDAGraphMode
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        ReplicatedLinear,
        RowParallelLinear,
    )

    from jitnorm.integrations import engine_gemms
    from jitnorm.integrations.vllm_plugin import linears
    from jitnorm.integrations.vllm_plugin.report import Report

    timed = []
    monkeypatch.setattr(engine_gemms, "is_candidate", lambda weight: isinstance(weight, torch.Tensor))

    def select(after_norm, others, gated):
        weights = [*after_norm, *others, *gated]
        assert not weights or ([len(weight) for weight in others] == [32, 24] and len(after_norm) == 2)
        timed.extend(weights)
        with_gemms = [weight for weight in weights if len(weight) != 24]
        return engine_gemms.Selection({engine_gemms.shape_of(weight) for weight in with_gemms}, ["what was chosen"])

    monkeypatch.setattr(engine_gemms, "select", select)

    def made(do_not_compile=False):
        modules = in_compiled_code(
            {
                "row": RowParallelLinear(64, 32, bias=False),
                "qkv": QKVParallelLinear(64, 16, 4, 2, bias=False),
                "gate and up": MergedColumnParallelLinear(64, [32, 32], bias=False),
                "biased": RowParallelLinear(64, 32, bias=True),
                "column": ColumnParallelLinear(64, 32, bias=False),
                "router": ReplicatedLinear(64, 32, bias=False),
                "offloaded": RowParallelLinear(64, 32, bias=False),
                "no other GEMM": RowParallelLinear(64, 24, bias=False),
                "the same on all ranks": RowParallelLinear(64, 32, bias=False),
            },
            do_not_compile,
        )
        random_weights(modules)
        modules["offloaded"].weight._vllm_is_uva_offloaded = True
        modules["the same on all ranks"].tp_size = 2
        return torch.nn.ModuleDict({"model": modules, "encoder": RowParallelLinear(64, 32, bias=False)})

    model, report = made(), Report("Tiny")
    linears.replace(model, with_graphs(), report)
    assert report.replaced == {
        "model.row": "RowParallelLinear for up to 64 rows",
        "model.qkv": "QKVParallelLinear for up to 64 rows",
        "model.gate and up": "MergedColumnParallelLinear for up to 64 rows",
    }
    modules = model["model"]
    replaced = [modules[name].weight for name in ("row", "qkv", "gate and up")]
    assert report.notes == ["what was chosen"]
    assert {id(weight) for weight in timed} == {id(w) for w in (*replaced, modules["no other GEMM"].weight)}
    assert len(timed) == 4
    x = torch.randn(3, 64)
    calls = []
    monkeypatch.setattr(engine_gemms, "linear", lambda x, w: calls.append(w) or torch.nn.functional.linear(x, w))
    for module in modules.values():
        expected = torch.nn.functional.linear(x, module.weight, module.bias)
        torch.testing.assert_close(module(x)[0], expected)
    assert len(calls) == 3 and all(a is b for a, b in zip(calls, replaced, strict=True))
    compiled = torch.compile(lambda x: modules["row"](x)[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), torch.nn.functional.linear(x, modules["row"].weight))
    assert len(calls) == 4

    for changes in (
        {"mode": 0},
        {"cudagraph_mode": CUDAGraphMode.NONE},
        {"passes": {"fuse_gemm_comms": True}},
        {"lora_config": SimpleNamespace()},
        {"speculative_config": SimpleNamespace()},
    ):
        report = Report("Tiny")
        linears.replace(made(), with_graphs(**changes), report)
        assert not report.replaced and not report.notes, changes
    linears.replace(made(do_not_compile=True), with_graphs(), report)
    report = Report("Tiny")
    monkeypatch.setenv(engine_plugins.SKIP, "linear_layers")
    linears.replace(made(), with_graphs(), report)
    assert report.notes == ["left linear layers: JITNORM_PLUGIN_SKIP names linear_layers"]
    assert not report.replaced and len(timed) == 4


class TestGatedMLPs:
    """vLLM's MLPs compute gate_up_proj and act_fn by one operator."""

    # Modules of vLLM with their MLP, its activation, and the operator of it.
    MLPS = (
        ("llama", "LlamaMLP", "silu", "silu_and_mul"),
        ("qwen2", "Qwen2MLP", "silu", "silu_and_mul"),
        ("mistral", "MistralMLP", "silu", "silu_and_mul"),
        ("gemma3", "Gemma3MLP", "gelu_pytorch_tanh", "gelu_tanh_and_mul"),
    )
    NOTES = {  # noqa: RUF012
        "hook of the projection": "their layers have hooks",
        "hook of the activation": "their layers have hooks",
        "skipped": "JITNORM_PLUGIN_SKIP names activations",
        "another source": "the source of vllm.model_executor.models.llama:LlamaMLP.forward is not that of vLLM 0.26.0",
        "another source of linear layers": "the source of vllm.model_executor.layers.linear:ColumnParallelLinear."
        "forward is not that of vLLM 0.26.0",
    }
    pytestmark = needs_vllm

    @pytest.fixture(autouse=True)
    def calls(self, config, layers, bfloat16, monkeypatch):
        """All weights are candidates. Return the weights and activations that are selected, and then called with."""
        from jitnorm.integrations import engine_gemms

        gated_linear, calls = engine_gemms.gated_linear, []

        def select(after_norm, others, gated):
            calls.extend((id(weight), activation) for weight, activation in gated)
            self.others = [id(weight) for weight in (*after_norm, *others)]
            shapes = {engine_gemms.shape_of(weight) for weight in (*after_norm, *others)}
            shapes |= {engine_gemms.shape_of(*each) for each in gated}
            shapes |= {engine_gemms.shape_of(weight) for weight, _ in gated}  # as if another layer had this shape
            return engine_gemms.Selection(shapes, [])

        def call(x, weight, activation, out=None):
            calls.append((id(weight), activation))
            return gated_linear(x, weight, activation, out)

        monkeypatch.setattr(engine_gemms, "is_candidate", lambda weight, activation=None: weight.dim() == 2)
        monkeypatch.setattr(engine_gemms, "select", select)
        monkeypatch.setattr(engine_gemms, "gated_linear", call)
        return calls

    @staticmethod
    def made(name="llama", cls="LlamaMLP", activation="silu"):
        """Return an MLP in a model, and the model."""
        module = importlib.import_module(f"vllm.model_executor.models.{name}")
        with pytest.MonkeyPatch.context() as patch:  # the wheel's operators are those of CUDA
            for op in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"):
                patch.setattr(torch.ops._C, op, None, raising=False)
            mlp = getattr(module, cls)(64, 32, activation)
        random_weights(mlp)
        return mlp, torch.nn.ModuleDict({"model": in_compiled_code({"mlp": mlp})})

    @staticmethod
    def replace(model, **changes):
        from jitnorm.integrations.vllm_plugin import linears
        from jitnorm.integrations.vllm_plugin.report import Report

        report = Report("Tiny", left={"model.mlp.act_fn": "Inductor generates it"})
        linears.replace(model, with_graphs(**changes), report)
        return report

    @staticmethod
    def definition(mlp, x):
        gate, up = (x.double() @ mlp.gate_up_proj.weight.double().t()).bfloat16().double().chunk(2, dim=-1)
        functional = torch.nn.functional
        gelu = "gelu" in type(mlp.act_fn).__name__.lower()
        activated = (functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)) * up
        return activated.bfloat16().double() @ mlp.down_proj.weight.double().t()

    @pytest.mark.parametrize(("name", "cls", "act", "activation"), MLPS)
    def test_computes_the_same(self, name, cls, act, activation, calls):
        mlp, model = self.made(name, cls, act)
        original, x = type(mlp), torch.randn(5, 64)
        expected = self.definition(mlp, x)
        report = self.replace(model)
        assert isinstance(mlp, original) and type(mlp).__name__ == f"Jitnorm{original.__name__}"
        assert report.replaced == {
            "model.mlp.gate_up_proj": f"MergedColumnParallelLinear with {activation} for up to 64 rows",
            "model.mlp.act_fn": f"{'GeluAndMul' if name == 'gemma3' else 'SiluAndMul'} with the linear layer before it",
            "model.mlp.down_proj": "RowParallelLinear for up to 64 rows",
        }
        assert not report.left and self.others == [id(mlp.down_proj.weight)]
        weight = (id(mlp.gate_up_proj.weight), activation)
        got = mlp(x)
        assert calls == [weight] * 2
        assert relative_error(got, expected) <= TOLERANCE[torch.bfloat16]
        compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
        assert same_bits(compiled(x), got) and calls == [weight] * 3

    def test_exact_gelu(self, calls):
        mlp, model = self.made("gemma3", "Gemma3MLP", "gelu_pytorch_tanh")
        mlp.act_fn.approximate = "none"
        self.replace(model)
        assert calls == [(id(mlp.gate_up_proj.weight), "gelu_and_mul")]
        x = torch.randn(5, 64)
        gate, up = (x.double() @ mlp.gate_up_proj.weight.double().t()).bfloat16().double().chunk(2, dim=-1)
        expected = (torch.nn.functional.gelu(gate) * up).bfloat16().double() @ mlp.down_proj.weight.double().t()
        assert relative_error(mlp(x), expected) <= TOLERANCE[torch.bfloat16]

    def test_is_pickled(self):
        """Beside a class with the same name, too."""
        mlp, model = self.made()
        other, model_of_other = self.made()
        other.__class__ = type(type(other).__name__, (type(other),), {"__module__": "another.package"})
        for each, parent in ((mlp, model), (other, model_of_other)):
            self.replace(parent)
            assert type(each) is pickle.loads(pickle.dumps(type(each)))
        assert type(mlp) is not type(other) and isinstance(other, type(mlp)._jitnorm_original)

    @pytest.mark.parametrize(
        "reason",
        ["bias", "hook of the projection", "hook of the activation", "another forward", "custom_ops", "skipped",
         "another source", "another source of linear layers", "quantised", "gathers", "unequal", "no kernel",
         "another activation", "not compiled"],
    )  # fmt: skip
    def test_others_are_left(self, reason, calls, request, monkeypatch):
        """Their linear layers are replaced alone, if these are candidates."""
        from vllm.model_executor.layers.activation import SiluAndMul

        from jitnorm.integrations import engine_gemms

        mlp, model = self.made()
        changes = {}
        if reason == "bias":
            mlp.gate_up_proj.bias = torch.nn.Parameter(torch.zeros(64))
        elif reason == "hook of the projection":
            mlp.gate_up_proj.register_forward_hook(lambda *arguments: None)
        elif reason == "hook of the activation":
            mlp.act_fn.register_forward_pre_hook(lambda *arguments: None)
        elif reason == "another forward":
            mlp.__class__ = type("Another", (type(mlp),), {"forward": lambda self, x: x})
        elif reason == "custom_ops":
            changes["custom_ops"] = ["none", "-silu_and_mul"]
        elif reason == "skipped":
            monkeypatch.setenv(engine_plugins.SKIP, "activations")
        elif reason.startswith("another source"):
            part = "MLPs" if "layers" in reason else "LlamaMLP"
            (function,) = compatibility.FINGERPRINTS[part]
            monkeypatch.setitem(compatibility.FINGERPRINTS, part, {function: "0" * 16})
            compatibility.changed.cache_clear()
            request.addfinalizer(compatibility.changed.cache_clear)
        elif reason == "quantised":
            mlp.down_proj.quant_method = object()
        elif reason == "gathers":
            mlp.gate_up_proj.gather_output = True
            mlp.gate_up_proj.tp_size = changes.setdefault(
                "parallel_config", SimpleNamespace(tensor_parallel_size=2)
            ).tensor_parallel_size
        elif reason == "unequal":
            mlp.gate_up_proj.output_sizes = [16, 48]
        elif reason == "no kernel":
            monkeypatch.setattr(engine_gemms, "is_candidate", lambda weight, activation=None: activation is None)
        elif reason == "another activation":
            mlp.act_fn.__class__ = type("Another", (SiluAndMul,), {})
        else:
            model["model"].do_not_compile = True
        original = type(mlp)
        report = self.replace(model, **changes)
        assert type(mlp) is original and not calls and "model.mlp.act_fn" in report.left
        assert report.notes == ([f"left the activations of MLPs: {self.NOTES[reason]}"] if reason in self.NOTES else [])
        is_candidate = reason not in ("bias", "not compiled")
        alone = "MergedColumnParallelLinear for up to 64 rows" if is_candidate else None
        assert report.replaced.get("model.mlp.gate_up_proj") == alone

    def test_a_kernel_that_cannot_be_built(self, calls, monkeypatch):
        from jitnorm.integrations import engine_gemms

        def select(after_norm, others, gated):
            """As where only the kernels for both failed."""
            shapes = {engine_gemms.shape_of(weight) for weight in [*others, *(weight for weight, _ in gated)]}
            return engine_gemms.Selection(shapes, ["it failed"])

        monkeypatch.setattr(engine_gemms, "select", select)
        mlp, model = self.made()
        original = type(mlp)
        report = self.replace(model)
        assert type(mlp) is original and report.notes == ["it failed"] and "model.mlp.act_fn" in report.left
        assert report.replaced["model.mlp.gate_up_proj"] == "MergedColumnParallelLinear for up to 64 rows"


class TestDecodeAttention:
    """Steps in which each sequence has one new token go to the kernel, all others to FlashAttention."""

    pytestmark = needs_vllm

    @pytest.fixture
    def made(self, attention, monkeypatch):
        """Return a function that replaces a layer: what was reported, the calls of the kernel, and the layer's."""
        from jitnorm.integrations.vllm_plugin import decode_attention as plugin
        from jitnorm.integrations.vllm_plugin.report import Report

        class Kernel:
            accepts = True

            def __init__(self, *sizes):
                self.sizes, self.calls = sizes, []
                kernels.append(self)

            def __call__(self, q, k_cache, v_cache, table, lengths, out, scale, window):
                self.calls.append((q, k_cache, v_cache, table, lengths, scale, window))
                if self.accepts:
                    out.fill_(7.0)
                return self.accepts

        kernels = []
        monkeypatch.setattr(plugin, "DecodeAttention", Kernel)
        monkeypatch.setattr(plugin, "cuda_target", lambda index: Target.cuda("9.0a"))
        monkeypatch.setattr(plugin, "build_and_load", lambda specs: {})

        def make(family="qwen3", change=lambda layer: None, **changes):
            layer, recorder = attention(family)
            change(layer)
            given = {"scheduler_config": SimpleNamespace(max_num_seqs=5)}
            report = Report("Tiny")
            plugin.replace(torch.nn.ModuleDict({"a": layer}), settings(**given | changes), report)
            return report, kernels, layer, recorder

        return make

    @staticmethod
    def metadata(tokens=3, **changes):
        from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

        values = {
            "num_actual_tokens": tokens,
            "max_query_len": 1,
            "query_start_loc": torch.arange(tokens + 1),
            "max_seq_len": 40,
            "seq_lens": torch.tensor([5, 40, 17][:tokens], dtype=torch.int32),
            "block_table": torch.zeros(tokens, 3, dtype=torch.int32),
            "slot_mapping": torch.arange(tokens),
            "use_cascade": False,
            "common_prefix_len": 0,
            "cu_prefix_query_lens": None,
            "prefix_kv_lens": None,
            "suffix_kv_lens": None,
        }
        return FlashAttentionMetadata(**values | changes)

    @staticmethod
    def call(layer, metadata, tokens=3, **scales):
        q, k, v = (torch.randn(tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        out = torch.zeros_like(q)
        result = layer.attn.impl.forward(layer.attn, q, k, v, layer.attn.kv_cache, metadata, output=out, **scales)
        assert result is out
        return q, out

    def test_decode_steps(self, made):
        report, (kernel,), layer, recorder = made()
        assert report.replaced == {"a.attn": "Attention in decode steps"} and not report.left
        assert kernel.sizes == (HEADS, KV_HEADS, HEAD_DIM, torch.bfloat16, torch.device("cpu"), 5)
        metadata = self.metadata()
        q, out = self.call(layer, metadata)
        ((given, k_cache, v_cache, table, lengths, scale, window),) = kernel.calls
        assert given is q and table is metadata.block_table and lengths is metadata.seq_lens
        assert scale == layer.attn.impl.scale and window == 0 and (out == 7).all() and not recorder.calls
        for cache, half in ((k_cache, slice(0, HEAD_DIM)), (v_cache, slice(HEAD_DIM, None))):
            assert cache.shape == (BLOCKS, BLOCK, KV_HEADS, HEAD_DIM)
            assert cache.data_ptr() == layer.attn.kv_cache[..., half].data_ptr()
        q, out = self.call(layer, metadata, tokens=8)  # padded
        assert kernel.calls[1][0].shape == (3, HEADS, HEAD_DIM)
        assert (out[:3] == 7).all() and not out[3:].any()

    def test_the_window_is_that_of_the_layer(self, made):
        _, (kernel,), layer, _ = made("gemma3")
        windows = []
        for given in (None, (-1, -1), (31, 0)):
            self.call(layer, self.metadata(sliding_window=given))
            windows.append(kernel.calls[-1][-1])
        assert windows == [32 if layer.is_sliding else 0, 0, 32]

    @pytest.mark.parametrize(
        "changes",
        [
            {"max_query_len": 2},
            {"use_cascade": True},
            {"causal": False},
            {"causal": torch.ones(3, dtype=torch.int32)},
            {"mm_prefix_range_tensor": torch.zeros(3, 1, 2)},
            {"rswa_prefix_lens": torch.zeros(3)},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_other_steps(self, changes, made):
        _, (kernel,), layer, recorder = made()
        q, out = self.call(layer, self.metadata(**changes))
        assert not kernel.calls and len(recorder.calls) == 1 and torch.equal(out, q)

    def test_what_the_kernel_does_not_take(self, made, caplog):
        from jitnorm.integrations.vllm_plugin import decode_attention as plugin

        _, (kernel,), layer, recorder = made()
        kernel.accepts = False
        plugin._warn_once.cache_clear()
        with caplog.at_level(logging.WARNING, "jitnorm"):
            q, out = self.call(layer, self.metadata())
            assert len(kernel.calls) == len(recorder.calls) == 1 and torch.equal(out, q) and kernel.has_refused
            self.call(layer, self.metadata())
        assert len(caplog.records) == 1 and "does not take" in caplog.text
        kernel.calls.pop(), recorder.calls.pop()
        self.call(layer, None)  # the profiling run
        self.call(layer, self.metadata(), output_scale=torch.ones(1))
        self.call(layer, self.metadata(), output_block_scale=torch.ones(1))
        assert len(kernel.calls) == 1 and len(recorder.calls) == 4

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ({"impl.alibi_slopes": torch.ones(4)}, "no ALiBi"),
            ({"impl.logits_soft_cap": 30.0}, "cap of logits"),
            ({"impl.sinks": torch.ones(4)}, "sinks"),
            ({"impl": SimpleNamespace()}, "its attention is SimpleNamespace"),
            ({"attn_type": "encoder_only"}, "not called by vLLM's operator for decoders"),
            ({"use_direct_call": True}, "not called by vLLM's operator"),
            ({"kv_cache_dtype": "fp8"}, "no kernel is for a model of"),
            ({"kv_cache_torch_dtype": torch.float16}, "a cache of torch.float16"),
            ({"head_size": 96, "head_size_v": 96}, "no kernel supports head_dim 96"),
            ({"head_size_v": 128}, "no kernel supports head_dim 64"),
            ({"num_heads": 34}, "34 query heads for 2 of keys"),
        ],
    )
    def test_layers_that_are_left(self, values, reason, made):
        def change(layer):
            for name, value in values.items():
                owner, _, attribute = name.rpartition(".")
                setattr(getattr(layer.attn, owner) if owner else layer.attn, attribute, value)

        report, kernels, _, _ = made(change=change)
        assert not report.replaced and not kernels
        assert reason in report.left["a.attn"] and report.left["a.attn"].startswith("Attention in decode steps: ")

    def test_models_that_are_left(self, made, monkeypatch):
        from vllm.config import CompilationConfig, CUDAGraphMode

        from jitnorm.integrations.vllm_plugin import decode_attention as plugin

        def reason(**changes):
            report, _, _, _ = made(**changes)
            assert not report.replaced
            return report.left["a.attn"].removeprefix("Attention in decode steps: ")

        sizes = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "use_ubatching": False}
        for name, words in (
            ("decode_context_parallel_size", "context parallelism"),
            ("prefill_context_parallel_size", "context parallelism"),
            ("use_ubatching", "two batches at a time"),
        ):
            assert words in reason(parallel_config=SimpleNamespace(**sizes | {name: 2}))
        with_its_cache = {"change": lambda layer: setattr(layer.attn, "kv_cache_torch_dtype", torch.float32)}
        assert "no kernel is for a model of torch.float32" in reason(dtype=torch.float32, **with_its_cache)
        with monkeypatch.context() as patch:
            patch.setattr(plugin, "cuda_target", lambda index: Target.cuda("7.5"))
            assert reason() == "no kernel supports the architecture 7.5"
        with monkeypatch.context() as patch:
            patch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
            assert "may be replayed for prompts" in reason()
        assert "several new tokens" in reason(speculative_config=SimpleNamespace())
        with monkeypatch.context() as patch:
            patch.setattr(plugin.batch_invariant_mode, "is_mode_requested", lambda: True)
            assert "in the batch-invariant mode" in reason()
        for mode in CUDAGraphMode:
            compilation = CompilationConfig(cudagraph_mode=mode, cudagraph_capture_sizes=[1, 7])
            changes = {"compilation_config": compilation}
            if mode == CUDAGraphMode.FULL:  # one graph for all steps of a size
                assert "may be replayed for prompts" in reason(**changes)
            else:
                assert not made(**changes)[0].left
        monkeypatch.setenv(engine_plugins.SKIP, "decode_attention")
        assert reason() == "JITNORM_PLUGIN_SKIP names decode_attention"

    def test_kernels_of_two_shapes(self, attention, made, monkeypatch):
        """One that cannot be built is tried once, and does not concern the layers of another."""
        from jitnorm.integrations.vllm_plugin import decode_attention as plugin
        from jitnorm.integrations.vllm_plugin.report import Report

        def build(specs):
            built.extend(specs)
            return {each: "it cannot be built" for each in specs if "64x4" in each.name}

        built = []
        monkeypatch.setattr(plugin, "build_and_load", build)
        layers = [attention()[0] for _ in range(4)]
        for layer in layers[1::2]:
            layer.attn.num_kv_heads = 1
        report = Report("Tiny")
        given = settings(scheduler_config=SimpleNamespace(max_num_seqs=5))
        given.compilation_config.max_cudagraph_capture_size = 9
        plugin.replace(torch.nn.ModuleDict(dict(zip("abcd", layers, strict=True))), given, report)
        assert [spec.name for spec in built] == ["decode_attention_64x2_bf16", "decode_attention_64x4_bf16"]
        assert set(report.replaced) == {"a.attn", "c.attn"}
        what = "Attention in decode steps: it cannot be built"
        assert report.left == {"b.attn": what, "d.attn": what}
        kernels = [layer.attn.impl.forward.args[2] for layer in layers[::2]]
        assert kernels[0] is kernels[1] and kernels[0].sizes[-1] == 9  # a graph may have more than are scheduled


class TestDecodeSteps:
    """Batches are those of vLLM's runner. What its kernels write to the GPU, test_vllm_engine.py compares."""

    pytestmark = needs_vllm
    COUNT, MAX_REQUESTS = 3, 6

    @pytest.fixture
    def runner(self, config, monkeypatch):
        """Return a runner of vLLM's class with the state of six requests, of which one is being prefilled."""
        from vllm.v1.worker.gpu import buffer_utils, model_runner
        from vllm.v1.worker.gpu.input_batch import InputBuffers

        from jitnorm.integrations.vllm_plugin import decode_steps

        class Buffers:
            """Of host memory alone."""

            def __init__(self, size, dtype):
                assert (size, dtype) == (self_.MAX_REQUESTS, torch.int32)

            def copy_to_uva(self, values):
                return torch.from_numpy(values)

        class Kernel:
            def __init__(self, *arguments):
                self.arguments, self.calls, self.accepts = arguments, [], True

            def __call__(self, *arguments):
                self.calls.append(arguments)
                return self.accepts

        self_ = self
        monkeypatch.setattr(decode_steps, "DecodeInputs", Kernel)
        monkeypatch.setattr(decode_steps, "GreedySampling", Kernel)
        monkeypatch.setattr(buffer_utils, "UvaBufferPool", Buffers)
        for name in ("prepare_pos_seq_lens", "combine_sampled_and_draft_tokens", "prepare_prefill_inputs"):
            monkeypatch.setattr(model_runner, name, lambda *_: "logits_indices")

        def copy(array, out=None, device=None):
            tensor = torch.from_numpy(array)
            return tensor.clone() if out is None else out.copy_(tensor)

        monkeypatch.setattr(model_runner, "async_copy_to_gpu", copy)
        uva = lambda array: SimpleNamespace(np=array, gpu=torch.from_numpy(array))  # noqa: E731
        ahead = np.array([13, 6, 10, 32, 9, 29], dtype=np.int32)  # what the scheduler expects of the step under way
        prefill = np.array([9, 5, 7, 6, 8, 30], dtype=np.int32)
        computed = np.array([12, 5, 9, 31, 8, 29], dtype=np.int32)
        made = object.__new__(model_runner.GPUModelRunner)
        made.__dict__ |= {
            "device": torch.device("cpu"),
            "max_num_reqs": self.MAX_REQUESTS,
            "input_buffers": InputBuffers(self.MAX_REQUESTS, 20, torch.device("cpu")),
            "req_states": SimpleNamespace(
                req_id_to_index={"a": 4, "b": 0, "c": 2, "d": 5, "e": 1, "f": 3},
                prefill_len=uva(prefill),
                num_computed_prefill_tokens=np.minimum(prefill, computed),
                num_computed_tokens=uva(computed),
                num_computed_tokens_np=ahead,
                last_sampled_tokens=torch.arange(self.MAX_REQUESTS)[:, None],
                total_len=uva(computed + 1),
                all_token_ids=uva(np.zeros((self.MAX_REQUESTS, 50), dtype=np.int32)),
                draft_tokens=None,
            ),
            "block_tables": SimpleNamespace(
                num_blocks=uva(np.ones((2, self.MAX_REQUESTS), dtype=np.int32)),
                block_table_ptrs="states",
                input_block_table_ptrs="batch",
                block_table_strides="strides",
                block_sizes_tensor="sizes",
                slot_mappings=torch.zeros(2, 20, dtype=torch.int64),
                input_block_tables=[torch.zeros(self.MAX_REQUESTS, n) for n in (3, 4)],
            ),
            "decode_query_len": 1,
            "use_dcp": False,
            "use_pp": False,
            "pcp_manager": None,
            "attn_groups": [],  # of lists, one for each kind of cache
            "model_config": SimpleNamespace(rswa_window=None),
            "model_state": SimpleNamespace(num_new_sampled_tokens_per_step=1, postprocess_state=lambda *_: None),
            "vllm_config": SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={})),
        }
        return made

    @pytest.fixture
    def steps(self):
        from jitnorm.integrations.vllm_plugin.decode_steps import DecodeSteps

        return DecodeSteps(torch.bfloat16, torch.device("cpu"))

    @staticmethod
    def scheduled(**tokens):
        return SimpleNamespace(
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=sum(tokens.values()),
            scheduled_spec_decode_tokens={},
            has_structured_output_requests=False,
            scheduled_new_reqs=[],
        )

    @staticmethod
    def sampler(**changes):
        """Return a sampler of vLLM's class for requests that sample greedily."""
        from vllm.v1.worker.gpu.sample.logprob import LogprobTokenIdsState
        from vllm.v1.worker.gpu.sample.sampler import Sampler
        from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS, SamplingStates

        def of_class(cls, **attributes):
            made = object.__new__(cls)
            made.__dict__ |= attributes
            return made

        numbers = {
            name: np.zeros(6, dtype=dtype)
            for name, dtype in {
                "temperature": np.float32,
                "use_logit_bias": bool,
                "use_penalty": bool,
                "num_bad_words": np.int32,
                "num_token_ids": np.int32,
            }.items()
        }
        numbers["num_logprobs"] = np.full(6, NO_LOGPROBS, dtype=np.int32)
        for name, (slot, value) in changes.items():
            numbers[name][slot] = value
        held = {name: SimpleNamespace(np=array) for name, array in numbers.items()}
        sampling = of_class(SamplingStates, temperature=held["temperature"], num_logprobs=numbers["num_logprobs"])
        return of_class(
            Sampler,
            compute_nans=False,
            sampling_states=sampling,
            logit_bias_state=SimpleNamespace(use_logit_bias=numbers["use_logit_bias"]),
            penalties_state=SimpleNamespace(use_penalty=numbers["use_penalty"], output_bin_counts="counts"),
            bad_words_state=SimpleNamespace(num_bad_words=held["num_bad_words"]),
            logprob_token_ids_state=of_class(LogprobTokenIdsState, num_token_ids=held["num_token_ids"]),
        )

    @pytest.mark.parametrize(("num_reqs", "num_tokens"), [(4, 4), (None, 4), (None, 3)], ids=str)  # of CUDA graphs
    def test_a_batch_is_that_of_vllm(self, runner, steps, num_reqs, num_tokens):
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        given = self.scheduled(c=1, a=1, e=1), SimpleNamespace(num_reqs=num_reqs, num_tokens=num_tokens)
        expected = vars(inspect.unwrap(GPUModelRunner.prepare_inputs)(runner, *given))
        every = self.scheduled(**dict.fromkeys("abcef", 1)), SimpleNamespace(num_reqs=6, num_tokens=8)
        assert steps.prepare_inputs(runner, *every)
        (found,) = steps.prepare_inputs(runner, *given)
        again = steps.prepare_inputs(runner, *given)[0]
        del expected["logits_indices"]  # a kernel writes vLLM's
        for batch in (found, again):
            fields = dict(vars(batch))
            chosen = fields.pop("logits_indices")
            assert chosen.tolist() == [0, 1, 2] and chosen.dtype == torch.int64 and fields.keys() == expected.keys()
            for name, value in fields.items():
                theirs = expected[name]
                if isinstance(value, torch.Tensor):
                    assert (value.shape, value.dtype) == (theirs.shape, theirs.dtype), name
                    if name not in ("idx_mapping", "expanded_idx_mapping"):  # which the kernel writes
                        assert torch.equal(value, theirs), name
                    if name in ("query_start_loc", "seq_lens", "input_ids", "positions", "is_padding"):  # of graphs
                        assert value.data_ptr() == theirs.data_ptr(), name
                elif isinstance(value, np.ndarray):
                    assert value.dtype == theirs.dtype and (value == theirs).all(), name
                else:
                    assert value == theirs, name
        tables, cache_slots = steps.prepare_attn(runner, again)[0]
        rows = num_reqs or self.COUNT
        assert [table.shape for table in tables] == [(rows, 3), (rows, 4)] and cache_slots.shape == (2, num_tokens)
        assert steps.prepare_attn(runner, found) is None  # of another step
        (_, _, call) = steps._write_inputs.calls
        states, buffers, tables = runner.req_states, runner.input_buffers, runner.block_tables
        assert call[0].tolist() == [2, 4, 1] and call[1] is states.num_computed_tokens.gpu
        assert call[2].tolist() == [*range(self.MAX_REQUESTS)] and call[3] is tables.num_blocks.gpu
        assert call[4:8] == ("states", "batch", "strides", "sizes") and call[8] is again.idx_mapping
        written = (buffers.input_ids, buffers.positions, buffers.seq_lens, buffers.query_start_loc)
        for tensor, wanted in zip(call[9:], (*written, tables.slot_mappings, rows), strict=True):
            assert tensor is wanted

    def test_a_batch_of_all_states(self, runner, steps):
        states = runner.req_states
        states.prefill_len.np[5] = 20
        scheduled = self.scheduled(**dict.fromkeys("abcdef", 1))
        scheduled.has_structured_output_requests = True
        (batch,) = steps.prepare_inputs(runner, scheduled, SimpleNamespace(num_reqs=None, num_tokens=6))
        assert batch.has_structured_output_reqs and batch.query_start_loc_np.tolist() == [*range(7)]
        lengths = {name: len(value) for name, value in vars(batch).items() if hasattr(value, "__len__")}
        longer = {"query_start_loc": 7, "query_start_loc_np": 7, "cu_num_logits": 7, "cu_num_logits_np": 7}
        assert lengths == dict.fromkeys(lengths, 6) | longer
        runner.model, runner.sampler = SimpleNamespace(compute_logits=lambda rows: rows), self.sampler()
        ((_, num_sampled, num_rejected),) = steps.sample(runner, torch.randn(6, 8), batch, None)
        for counts, value in ((num_sampled, 1), (num_rejected, 0)):
            assert counts.tolist() == [value] * 6 and counts.dtype == torch.int32
        assert steps._greedy_sampling.arguments == (torch.bfloat16, torch.device("cpu"), self.MAX_REQUESTS)
        assert steps._sampled is not None
        assert steps.prepare_inputs(runner, self.scheduled(a=1), SimpleNamespace(num_reqs=None, num_tokens=1))
        assert steps._sampled is None

    def test_other_steps_are_those_of_vllm(self, runner, steps):
        batch = SimpleNamespace(num_reqs=None, num_tokens=4)
        for tokens in ({"a": 1, "b": 2}, {"a": 0, "b": 2}, {"a": 1, "d": 1}):  # prompts; d has one token left
            assert steps.prepare_inputs(runner, self.scheduled(**tokens), batch) is None
        runner.decode_query_len = 2
        assert steps.prepare_inputs(runner, self.scheduled(a=1), batch) is None
        runner.decode_query_len = 1
        drafts = self.scheduled(a=1)
        drafts.scheduled_spec_decode_tokens = {"a": [3]}
        assert steps.prepare_inputs(runner, drafts, batch) is None
        assert not steps._is_ready
        assert steps.prepare_inputs(runner, self.scheduled(a=1), batch)
        steps._write_inputs.accepts = False
        assert steps.prepare_inputs(runner, self.scheduled(a=1), batch) is None and steps._batch is None

    def test_new_requests_have_their_parameters_copied(self, runner, steps):
        scheduled = self.scheduled(a=1)
        assert steps.add_requests(runner, scheduled) == (None,)
        scheduled.scheduled_new_reqs = ["b"]
        assert steps.add_requests(runner, scheduled) is None

    def test_sampling(self, runner, steps):
        hidden = torch.randn(4, 8)
        runner.model = SimpleNamespace(compute_logits=lambda rows: ("logits", rows))
        runner.sampler = self.sampler(temperature=(5, 1.0))  # not a request of the batch
        (batch,) = steps.prepare_inputs(
            runner, self.scheduled(c=1, a=1, e=1), SimpleNamespace(num_reqs=4, num_tokens=4)
        )
        ((output, num_sampled, num_rejected),) = steps.sample(runner, hidden, batch, None)
        ((logits, slots, tokens, last, lengths, computed, all_tokens, counts),) = steps._greedy_sampling.calls
        assert logits[0] == "logits" and torch.equal(logits[1], hidden[:3]) and counts == "counts"
        assert slots is batch.idx_mapping and last.shape == (self.MAX_REQUESTS,)
        states = runner.req_states
        assert lengths is states.total_len.gpu and computed is states.num_computed_tokens.gpu
        assert all_tokens is states.all_token_ids.gpu and tokens.dtype == torch.int64
        assert output.sampled_token_ids.data_ptr() == tokens.data_ptr() and output.sampled_token_ids.shape == (3, 1)
        assert num_sampled.tolist() == [1, 1, 1] and num_rejected.tolist() == [0, 0, 0]
        assert output.num_sampled is num_sampled and output.logprobs_tensors is output.num_nans is None
        called = []
        runner.model_state.postprocess_state = lambda *arguments: called.append(arguments)
        rest = (output.sampled_token_ids, num_sampled, num_rejected, batch.query_start_loc)
        assert steps.postprocess_sampled(runner, batch.idx_mapping.clone(), *rest) is None  # of another batch
        assert steps.postprocess_sampled(runner, batch.idx_mapping, *rest) == (None,)
        assert called == [(batch.idx_mapping, num_sampled, states.num_computed_tokens.gpu)]
        assert len(steps._greedy_sampling.calls) == 1
        assert steps.postprocess_sampled(runner, batch.idx_mapping, *rest) is None

    @pytest.mark.parametrize(
        "changes",
        [
            {"temperature": (4, 0.5)},
            {"use_logit_bias": (2, True)},
            {"use_penalty": (1, True)},
            {"num_bad_words": (1, 2)},
            {},
        ],
        ids=str,
    )
    def test_tokens_that_vllm_chooses(self, runner, steps, changes, monkeypatch):
        """For requests that are not greedy, and for logits that the kernel does not take."""
        from vllm.v1.worker.gpu.sample.sampler import Sampler

        (batch,) = steps.prepare_inputs(
            runner, self.scheduled(c=1, a=1, e=1), SimpleNamespace(num_reqs=4, num_tokens=4)
        )
        runner.sampler, tokens = self.sampler(**changes), torch.tensor([5, 6, 7])
        runner.model = SimpleNamespace(compute_logits=lambda rows: ("logits", rows))
        given = []
        monkeypatch.setattr(Sampler, "sample", lambda self, *arguments: (given.append(arguments), (tokens, None))[1])
        kernel = steps._greedy_sampling
        kernel.accepts = False
        ((output, num_sampled, num_rejected),) = steps.sample(runner, torch.randn(4, 8), batch, None)
        assert len(kernel.calls) == (not changes)
        ((logits, slots, slots_np, positions, input_ids, local),) = given
        assert logits[0] == "logits" and slots is batch.idx_mapping and slots_np is batch.idx_mapping_np
        buffers = runner.input_buffers
        assert positions.data_ptr() == buffers.positions.data_ptr() and len(positions) == len(input_ids) == 3
        assert input_ids.data_ptr() == buffers.input_ids.data_ptr() and local.tolist() == [0, 0, 0]
        assert output.sampled_token_ids.tolist() == [[5], [6], [7]] and output.logprobs_tensors is None
        assert num_sampled.tolist() == [1, 1, 1] and num_rejected.tolist() == [0, 0, 0]
        rest = (batch.idx_mapping, output.sampled_token_ids, num_sampled, num_rejected, batch.query_start_loc)
        kernel.calls.clear()
        assert steps.postprocess_sampled(runner, *rest) is None  # vLLM does it
        kernel.accepts = True
        assert steps.postprocess_sampled(runner, *rest) == (None,)
        assert [(call[0], call[2].tolist()) for call in kernel.calls] == [(None, [5, 6, 7])] * 2

    @pytest.mark.parametrize("changes", [{"num_logprobs": (4, 0)}, {"num_token_ids": (2, 1)}], ids=str)
    def test_batches_that_vllm_samples(self, runner, steps, changes):
        (batch,) = steps.prepare_inputs(
            runner, self.scheduled(c=1, a=1, e=1), SimpleNamespace(num_reqs=None, num_tokens=3)
        )
        runner.sampler = self.sampler(**changes)
        assert steps.sample(runner, torch.randn(3, 8), batch, None) is None
        runner.sampler = self.sampler()
        assert steps.sample(runner, torch.randn(3, 8), batch, "grammar") is None
        other = SimpleNamespace(idx_mapping_np=batch.idx_mapping_np)
        assert steps.sample(runner, torch.randn(3, 8), other, None) is None
        runner.sampler.compute_nans = True
        assert steps.sample(runner, torch.randn(3, 8), batch, None) is None
        runner.sampler = self.sampler()
        runner.sampler.__class__ = type("SamplerOfAModel", (type(runner.sampler),), {})
        assert steps.sample(runner, torch.randn(3, 8), batch, None) is None
        assert not steps._greedy_sampling.calls

    def test_the_runner_asks_first(self, config, monkeypatch):
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        from jitnorm.integrations.vllm_plugin import decode_steps

        def stock(self, *arguments, **keywords):
            return "vLLM's", arguments, keywords

        def ours(self, runner, *arguments):
            return None if arguments == (1,) else ("ours",)

        for name in ("add_requests", "prepare_inputs", "prepare_attn", "sample", "postprocess_sampled"):
            monkeypatch.setattr(GPUModelRunner, name, stock)
            monkeypatch.setattr(decode_steps.DecodeSteps, name, ours)
        decode_steps.install(monkeypatch.setattr)
        runner = object.__new__(GPUModelRunner)
        for model, result in (
            (SimpleNamespace(), ("vLLM's", (4, 5, 6), {})),
            (SimpleNamespace(jitnorm_decode_steps="of the model"), "ours"),
        ):
            runner.model = model
            for name in ("add_requests", "prepare_inputs", "prepare_attn", "sample", "postprocess_sampled"):
                assert getattr(runner, name)(4, 5, 6) == result
                assert getattr(runner, name)(1) == ("vLLM's", (1,), {})
        assert runner.postprocess_sampled(4, 5, named=6) == ("vLLM's", (4, 5), {"named": 6})

    def test_models_that_are_left(self, config, monkeypatch):
        from jitnorm.integrations.vllm_plugin import decode_steps
        from jitnorm.integrations.vllm_plugin.report import Report

        devices = []
        monkeypatch.setattr(decode_steps, "cuda_target", lambda index: devices.append(index) or Target.cuda("9.0a"))
        of_worker = SimpleNamespace(device=SimpleNamespace(index=3))
        monkeypatch.setattr(decode_steps.torch, "empty", lambda *_, **given: of_worker)
        built = []
        monkeypatch.setattr(decode_steps, "build_and_load", lambda specs: built.extend(specs) or failures)
        failures = {}

        def notes(changes=MappingProxyType({}), **of_model):
            values = {"head_dtype": torch.bfloat16, "runner_type": "generate", "rswa_window": None} | of_model
            given = {"model_config": SimpleNamespace(**values), "use_v2_model_runner": True} | changes
            model, report = torch.nn.Identity(), Report("Tiny")
            decode_steps.replace(model, settings(**given), report)
            (note,) = report.notes
            assert hasattr(model, "jitnorm_decode_steps") == note.startswith("replaced")
            made.append(getattr(model, "jitnorm_decode_steps", None))
            return note

        made = []

        assert notes() == "replaced the inputs and the tokens of decode steps"
        assert [spec.name for spec in built] == ["decode_inputs", "greedy_sampling_bf16"] and devices == [3]
        assert notes(head_dtype=torch.float32).startswith("replaced") and built[-1].name == "greedy_sampling_fp32"
        assert [steps._dtype for steps in made] == [torch.bfloat16, torch.float32]
        assert all(steps._device is of_worker.device for steps in made)
        with monkeypatch.context() as patch:
            patch.setattr(decode_steps.compatibility, "changed", lambda part: f"changed {part}")
            assert notes().endswith("changed decode steps")
        for words, changes in {
            "the first version of its model runner": {"use_v2_model_runner": False},
            "several new tokens": {"speculative_config": SimpleNamespace()},
        }.items():
            assert words in notes(changes)
        sizes = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "pipeline_parallel_size": 1}
        for name in sizes:
            assert "parallelism" in notes({"parallel_config": SimpleNamespace(**sizes | {name: 2})})
        assert "the model generates no tokens" in notes(runner_type="pooling")
        assert "the lengths of prompts" in notes(rswa_window=64)
        assert "the logits are torch.float64" in notes(head_dtype=torch.float64)
        with monkeypatch.context() as patch:
            patch.setenv("VLLM_MOE_SKIP_PADDING", "1")
            assert "VLLM_MOE_SKIP_PADDING is set" in notes()
        failures["spec"] = "its kernel cannot be built: why"
        assert notes().endswith("its kernel cannot be built: why")
        monkeypatch.setenv(engine_plugins.SKIP, "decode_steps")
        assert notes().endswith("JITNORM_PLUGIN_SKIP names decode_steps")

    def test_it_is_installed_with_the_layers(self, config):
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        from jitnorm.integrations.vllm_plugin import installation

        installation.uninstall()
        original = GPUModelRunner.prepare_inputs
        assert not hasattr(original, "__wrapped__")
        installation.install()
        installation.replace_layers()
        assert GPUModelRunner.prepare_inputs.__wrapped__ is original

    def test_the_scheduler_metadata_of_flash_attention(self, runner, steps):
        """It is left out of decode steps, if the kernel computes all layers of a builder and has refused none."""
        from jitnorm.integrations.vllm_plugin import decode_attention

        class Builder:
            def __init__(self, window=(-1, -1)):
                self.aot_sliding_window = window

            def build(self, common_prefix_len, common_attn_metadata, fast_build=False, **more):
                return fast_build, more | ({"prefix": common_prefix_len} if common_prefix_len else {})

        class Kernel:
            has_refused = False

        def layer(function, kernel):
            return SimpleNamespace(impl=SimpleNamespace(forward=functools.partial(function, None, None, kernel)))

        kernel = Kernel()
        layers = runner.vllm_config.compilation_config.static_forward_context
        layers |= {
            name: layer(decode_attention._forward, of_layer) for name, of_layer in (("a", kernel), ("b", Kernel()))
        }
        layers |= {"c": layer(print, kernel), "mamba": object()}
        builders = [Builder(), Builder(), Builder(window=None), SimpleNamespace(build=Builder().build)]
        names = [("a", "b"), ("a", "c"), ("a",), ("mamba",)]
        runner.attn_groups = [
            [SimpleNamespace(get_metadata_builder=lambda i, b=builder: [b][i], layer_names=of_builder)]
            for builder, of_builder in zip(builders, names, strict=True)
        ]
        assert steps.prepare_inputs(runner, self.scheduled(a=1), SimpleNamespace(num_reqs=None, num_tokens=1))
        decoding, prefill = SimpleNamespace(max_query_len=1), SimpleNamespace(max_query_len=2)
        replaced = builders[0]
        assert replaced.build(common_prefix_len=0, common_attn_metadata=decoding, a=1) == (True, {"a": 1})
        assert replaced.build(common_prefix_len=0, common_attn_metadata=prefill) == (False, {})
        assert replaced.build(7, prefill, fast_build=True) == (True, {"prefix": 7})
        for builder in builders[1:]:
            assert builder.build(0, decoding) == (False, {})
        kernel.has_refused = True
        assert replaced.build(0, decoding) == (False, {})
