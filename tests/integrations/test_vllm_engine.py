"""vLLM itself with the plugin and without, on tiny random models: the same tokens and logits.

It needs vLLM 0.26 and a GPU. Each run is a process of its own, because what the plugin changes lasts as long as one.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from integrations.vllm_worker import MODELS, VOCABULARY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

WORKER = Path(__file__).with_name("vllm_worker.py")


@functools.cache
def prompts() -> list[list[int]]:
    """Return random prompts of different lengths; the third is longer than a sliding window."""
    source = random.Random(5)
    return [[source.randrange(3, VOCABULARY) for _ in range(length)] for length in (5, 40, 300, 17, 1, 64, *[9] * 16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


def generate(folder: Path, *, plugin: bool, invariant: bool = False, skip: str = "", **request: object) -> dict:
    """Run the worker. Return its results."""
    environment = {name: value for name, value in os.environ.items() if name not in ("JITNORM_VLLM", "VLLM_PLUGINS")}
    environment |= {"JITNORM_VLLM": "1"} if plugin else {"VLLM_PLUGINS": ""}
    environment |= {"VLLM_BATCH_INVARIANT": "1"} if invariant else {}
    environment |= {"JITNORM_PLUGIN_SKIP": skip} if skip else {}
    request = {"tokens": 8, "batches": [prompts()[:5]], "eager": True} | request
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), json.dumps(request)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return torch.load(folder / "result.pt", weights_only=False)


def assert_close(plugged: dict, stock: dict) -> None:
    """Compare the logits of each request up to the first token that differs, which only nearly equal logits may cause.

    Both round to bfloat16 many times in three layers, at different places. A wrong rotation or a wrong slot changes
    logits by as much as they vary.
    """
    equal = total = 0
    for of_plugged, of_stock in zip(plugged["results"], stock["results"], strict=True):
        for (tokens, logits), (their_tokens, theirs) in zip(of_plugged, of_stock, strict=True):
            same = next((i for i, (a, b) in enumerate(zip(tokens, their_tokens, strict=True)) if a != b), len(tokens))
            for a, b in zip(logits[: same + 1], theirs[: same + 1], strict=True):
                spread = float(b.std())
                assert float((a - b).pow(2).mean().sqrt()) <= 0.05 * spread
                assert float((a - b).abs().max()) <= 0.3 * spread
            if same < len(tokens):
                assert float(theirs[same].max() - theirs[same][tokens[same]]) <= 0.3 * float(theirs[same].std())
            equal, total = equal + same, total + len(tokens)
    assert equal >= 0.3 * total, f"decoding was compared for {equal} of {total} tokens"


def distance(found: dict, reference: dict) -> float:
    """Return the root mean square of the logits' differences, divided by their spread.

    Those of a request count up to the first token that differs, as in `assert_close`.
    """
    squares = []
    for mine, theirs in zip(found["results"], reference["results"], strict=True):
        for (tokens, logits), (their_tokens, their_logits) in zip(mine, theirs, strict=True):
            same = next((i for i, (a, b) in enumerate(zip(tokens, their_tokens, strict=True)) if a != b), len(tokens))
            for a, b in zip(logits[: same + 1], their_logits[: same + 1], strict=True):
                squares.append(float((a - b).pow(2).mean() / b.var()))
    return (sum(squares) / len(squares)) ** 0.5


def count_launches(plugged: dict) -> int:
    """Return how many attention layers of the model call the fused kernel."""
    ((_, replaced, _, _),) = plugged["report"]
    return len([what for what in replaced.values() if "one launch" in what])


@functools.cache
def stock(folder: Path, model: str, eager: bool) -> dict:
    result = generate(folder, plugin=False, model=model, eager=eager)
    assert not result["report"] and not [name for name in result["modules"] if name.startswith("Jitnorm")]
    return result


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("model", MODELS)
def test_tokens_and_logits_are_those_of_vllm(model, eager, folder):
    plugged = generate(folder, plugin=True, model=model, eager=eager)
    ((_, replaced, left, _),) = plugged["report"]
    assert count_launches(plugged) == 3, left
    norms = [what for what in replaced.values() if "RMSNorm" in what]
    assert len(norms) == (13 if model == "gemma3" else 7), left
    assert len([what for what in norms if what.endswith(", residual in float32")]) == 7
    assert not left
    assert len([what for what in replaced.values() if "in decode steps" in what]) == 3
    assert len([what for what in replaced.values() if "with the linear layer before it" in what]) == 3 * (not eager)
    assert_close(plugged, stock(folder, model, eager))


GREEDY = [{}, {"max_tokens": 25}, {"max_tokens": 3}]  # requests that end at different steps
MIXED = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"logprobs": 4, "max_tokens": 20},
    {"frequency_penalty": 1.5, "max_tokens": 30},
    {"temperature": 1.0, "seed": 8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"logit_bias": {7: 50.0}, "max_tokens": 9},
    {"allowed_token_ids": [*range(100, 200)]},
    {"min_tokens": 12, "stop_token_ids": [*range(0, VOCABULARY, 20)]},
]


@pytest.mark.parametrize("sampling", [GREEDY, MIXED], ids=["greedy", "mixed"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_decode_steps_choose_the_tokens_that_vllm_chooses(eager, sampling, folder):
    """The model is the same, so the tokens are. The cache is so small that vLLM preempts and resumes some requests."""
    request = {"model": "qwen3", "eager": eager, "sampling": sampling, "tokens": 60}
    request |= {"max_length": 400, "cache_bytes": 28 * 16 * 1536}  # 28 blocks; a sequence of 400 tokens has 25
    request["batches"] = [prompts()[:1], prompts(), prompts()[3:6]]
    found = generate(folder, plugin=True, **request)
    expected = generate(folder, plugin=True, skip="decode_steps", **request)
    notes = [of_plugin["report"][0][3] for of_plugin in (found, expected)]
    assert "replaced the inputs and the tokens of decode steps" in notes[0]
    assert "left the inputs and the tokens of decode steps: JITNORM_PLUGIN_SKIP names decode_steps" in notes[1]
    counts = found["counts"]
    assert counts["preempted"] and counts["prepare_inputs"] == counts["prepare_attn"] == counts["postprocess_sampled"]
    assert counts["prepare_inputs"] >= 3 * 25 and counts["sample"] >= 25  # of all three batches, and without logprobs
    assert (counts["greedy"] == counts["sample"]) == (sampling is GREEDY)
    assert not expected["counts"]["prepare_inputs"]
    for mine, theirs in zip(found["results"], expected["results"], strict=True):
        for (tokens, _), (their_tokens, _) in zip(mine, theirs, strict=True):
            assert tokens == their_tokens


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("model", "backend"), [("qwen3", "FLASH_ATTN"), ("qwen3", "TRITON_ATTN"), ("llama", "TRITON_ATTN")]
)
def test_float8_caches(model, backend, eager, folder):
    """Logits are as near to those with a bfloat16 cache as vLLM's own are with a float8 cache.

    The two round keys at different places, so that some of them get neighbouring float8 numbers, 6 to 12% apart.
    """
    request = {"model": model, "backend": backend, "eager": eager}
    plugged = generate(folder, plugin=True, cache_dtype="fp8", **request)
    assert count_launches(plugged) == 3, plugged["report"]
    unquantised = generate(folder, plugin=False, **request)
    theirs = distance(generate(folder, plugin=False, cache_dtype="fp8", **request), unquantised)
    assert 0.01 < theirs < 0.2, "the float8 cache changes nothing, or everything"
    assert distance(plugged, unquantised) <= 1.25 * theirs


@pytest.mark.parametrize(
    "compilation",
    [{"cudagraph_mode": "PIECEWISE"}, {"cudagraph_mode": "FULL"}, {"use_inductor_graph_partition": True}],
    ids=str,
)
def test_modes_of_cuda_graphs(compilation, folder):
    plugged = generate(folder, plugin=True, model="qwen3", eager=False, compilation=compilation)
    assert count_launches(plugged) == 3, plugged["report"]
    assert_close(plugged, stock(folder, "qwen3", False))


def test_compiled_graphs_that_vllm_has_cached_are_not_mixed_up(tmp_path_factory):
    """All runs share a cache folder; the second of each loads what the first has stored."""
    folder = tmp_path_factory.mktemp("shared")
    first = [generate(folder, plugin=plugin, model="llama", eager=False) for plugin in (True, False)]
    again = [generate(folder, plugin=plugin, model="llama", eager=False) for plugin in (True, False)]
    for a, b in zip(first, again, strict=True):
        assert [t for r in a["results"] for t, _ in r] == [t for r in b["results"] for t, _ in r]


def test_the_triton_backend(folder):
    plugged = generate(folder, plugin=True, model="qwen3", backend="TRITON_ATTN")
    assert count_launches(plugged) == 3, plugged["report"]
    assert_close(plugged, generate(folder, plugin=False, model="qwen3", backend="TRITON_ATTN"))


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("model", ["qwen3", "llama", "gemma3"])
def test_logits_have_the_same_bits_alone_and_in_every_batch(model, eager, folder):
    """In vLLM's batch-invariant mode. Prefill is the first token's logits, decoding the others'."""
    asked = prompts()[:3]
    batches = [[prompt] for prompt in asked]
    batches += [asked, [*prompts()[3:10], *asked, *prompts()[10:17]]]
    assert [len(batch) for batch in batches[3:]] == [3, 17]
    result = generate(folder, plugin=True, invariant=True, model=model, eager=eager, batches=batches)
    (report,) = result["report"]
    assert "replaced the GEMMs, softmax, means and norms of vLLM's batch-invariant mode" in report[3]
    assert count_launches(result) == 3, report
    assert_close(result, generate(folder, plugin=False, invariant=True, model=model, eager=eager, batches=batches))
    alone = [of_batch[0] for of_batch in result["results"][:3]]
    for of_batch, start in ((result["results"][3], 0), (result["results"][4], 7)):
        for (tokens, logits), (their_tokens, theirs) in zip(alone, of_batch[start : start + 3], strict=True):
            assert tokens == their_tokens
            assert torch.equal(logits, theirs)
