"""SGLang's own ModelRunner with the plugin and without it, on small models of random weights.

Tests marked engine run it on a GPU, with CUDA graphs. On the CPU it runs without SGLang's compiled kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative_error, same_bits

ROOT = Path(__file__).parents[2]
QWEN3 = {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 512},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512},
    **{"tie_word_embeddings": True, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 1024},
    **{
        "rope_theta": 1e6,
        "rope_scaling": None,
        "attention_bias": False,
        "max_window_layers": 2,
        "sliding_window": None,
    },
    **{"use_sliding_window": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2},
}
LLAMA = {
    **{name: value for name, value in QWEN3.items() if "window" not in name},
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, "mlp_bias": False},
    "rope_scaling": {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 512,
    },
}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "rope_scaling": None}
QWEN2 = {**QWEN3, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
GEMMA3 = {
    **{name: value for name, value in QWEN3.items() if name not in ("hidden_act", "tie_word_embeddings")},
    **{"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 3},
    **{"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 64, "rope_local_base_freq": 1e4},
    **{"sliding_window": 16, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
MODELS = {"qwen3": QWEN3, "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "gemma3": GEMMA3}
ATTENTION = {
    **{"qwen3": "QK-norm, rotation and KV store of Qwen3Attention", "llama": "rotation and KV store of LlamaAttention"},
    **{"mistral": "rotation and KV store of LlamaAttention", "qwen2": "rotation and KV store of Qwen2Attention"},
    "gemma3": "QK-norm, rotation and KV store of Gemma3Attention",
}


def run_engine(tmp_path, model: str, device: str, variants: list[str], **options) -> dict:
    """Run SGLang's ModelRunner in a process of its own, and return its results by variant."""
    pytest.importorskip("sglang", reason="SGLang cannot be imported")
    out = tmp_path / f"{model}-{'-'.join(variants)}.pt"
    given = {"config": MODELS[model], "device": device, "variants": variants, "batches": [1, 3, 17], "steps": 6}
    worker = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "sglang_worker.py")]
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*worker, json.dumps({**given, **options}), str(out)],
        # On a machine with a GPU, SGLang would call CUDA's kernels for a model on the CPU.
        env={**os.environ, "PYTHONPATH": path} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return torch.load(out)


def assert_same_model(stock: dict, plugin: dict, tolerance: float = 0.02, margin: float = 0.1) -> None:
    """Assert that two runs compute one model: logits differ by rounding while the tokens before them are the same.

    A token differs only if stock's two best logits differ by less than `margin`.
    """
    for n, run in stock["runs"].items():
        for row in range(n):
            for step in range(run["logits"].shape[1]):
                a, b = (r["runs"][n]["logits"][row, step].double() for r in (stock, plugin))
                assert relative_error(b, a) < tolerance, (n, row, step)
                if run["tokens"][row, step] != plugin["runs"][n]["tokens"][row, step]:
                    best = a.topk(2).values
                    assert best[0] - best[1] < margin, (n, row, step)
                    break


@pytest.mark.parametrize("model", MODELS)
def test_the_runner_on_the_cpu(tmp_path, model):
    results = run_engine(tmp_path, model, "cpu", ["stock", "plugin"])
    assert results["stock"]["report"] == "register has not been called"
    assert_same_model(results["stock"], results["plugin"])
    layers = MODELS[model]["num_hidden_layers"]
    report = results["plugin"]["report"]
    assert f"replaced: {layers} x {ATTENTION[model]} by qk_norm_rope_store" in report
    assert "left" not in report
    norms = f"{4 * layers + 1} x Gemma3RMSNorm" if model == "gemma3" else f"{2 * layers + 1} x RMSNorm"
    assert f"replaced: {norms} of 256" in report


@pytest.mark.gpu
@pytest.mark.engine
@pytest.mark.parametrize(
    ("model", "prefill"),
    [*((model, "disabled") for model in ("qwen3", "llama", "qwen2", "gemma3")), ("qwen3", "breakable")],
)
def test_the_runner_in_cuda_graphs(tmp_path, model, prefill):
    stock, plugin = (
        run_engine(tmp_path, model, "cuda", [variant], prefill=prefill)[variant] for variant in ("stock", "plugin")
    )
    assert_same_model(stock, plugin)
    assert f"{ATTENTION[model]} by qk_norm_rope_store" in plugin["report"]
    assert "left" not in plugin["report"]
    decodes = sum(run["tokens"].shape[1] - 1 for run in plugin["runs"].values())
    assert plugin["replays"] == stock["replays"] >= decodes
    assert (plugin["replays"] > decodes) == (prefill == "breakable")


@pytest.mark.gpu
@pytest.mark.engine
def test_float8_caches(tmp_path):
    """The first step, a prefill without a prefix, does not read the caches; the others do."""
    stock, plugin = (
        run_engine(tmp_path, "qwen3", "cuda", [variant], kv_cache_dtype="fp8_e4m3")[variant]
        for variant in ("stock", "plugin")
    )
    assert "KV store of Qwen3Attention by qk_norm_rope_store" in plugin["report"]
    assert "left" not in plugin["report"]
    assert_same_model(stock, plugin, tolerance=0.06, margin=0.3)


@pytest.mark.gpu
@pytest.mark.engine
@pytest.mark.parametrize("model", ["qwen3", "llama"])
def test_deterministic_logits_have_the_same_bits_in_every_batch(tmp_path, model):
    stock, plugin = (
        run_engine(tmp_path, model, "cuda", [variant], deterministic=True)[variant] for variant in ("stock", "plugin")
    )
    assert_same_model(stock, plugin)
    assert "operator of the deterministic mode by jitnorm.batch_invariant" in plugin["report"]
    largest = plugin["runs"][17]
    for n, run in plugin["runs"].items():
        assert same_bits(run["logits"], largest["logits"][:n]), n
        assert torch.equal(run["tokens"], largest["tokens"][:n]), n
