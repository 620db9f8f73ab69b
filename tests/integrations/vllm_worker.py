"""Run vLLM on tiny models with random weights, for test_vllm_engine.py, which starts it in a process of its own.

    python tests/integrations/vllm_worker.py FOLDER '{"model": "qwen3", "eager": true, ...}'

It writes FOLDER/result.pt: the tokens and the logits of each request of each batch, what the plugin reports, and how
many steps it prepared, how many it sampled, and how many requests were preempted. With "sampling", arguments of
SamplingParams that the prompts of a batch take in turns, there are no logits.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that this process can reach the model
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "TOKENIZERS_PARALLELISM": "false",
}
VOCABULARY = 2048
_SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"},
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 512,
            "rope_type": "llama3",
        },
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu"},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 64,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True,
    },
}


def seed_weights(model: Any) -> None:
    """Give a model random weights that depend on its parameters' names alone."""
    import torch

    generator = None
    for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if generator is None:
            generator = torch.Generator(device=parameter.device).manual_seed(7)
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=torch.float32)
        is_gemma_norm = parameter.dim() == 1 and "Gemma" in type(model).__name__
        centre = 0.0 if is_gemma_norm or parameter.dim() > 1 else 1.0
        parameter.data.copy_(centre + (0.1 if parameter.dim() == 1 else 0.06) * noise)


def count_decode_steps(counts: Counter[str]) -> None:
    """Count the steps whose inputs the plugin writes, and whose tokens it chooses."""
    from jitnorm.integrations.vllm_plugin.decode_steps import DecodeSteps

    def count(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: Any, *arguments: Any) -> Any:
            result = original(self, *arguments)
            counts[name] += result is not None
            counts["greedy"] += name == "sample" and self._sampled is not None
            return result

        return counted

    for name in ("prepare_inputs", "prepare_attn", "sample", "postprocess_sampled"):
        setattr(DecodeSteps, name, count(name, getattr(DecodeSteps, name)))


def count_preemptions(scheduler: Any, counts: Counter[str]) -> None:
    """Count the requests that the scheduler preempts."""
    schedule = scheduler.schedule

    def counted(*arguments: Any, **keywords: Any) -> Any:
        output = schedule(*arguments, **keywords)
        counts["preempted"] += len(output.preempted_req_ids or ())
        return output

    scheduler.schedule = counted


def main(folder: Path, request: dict[str, Any]) -> None:
    """Generate for each batch of a request, and write what came of it."""
    os.environ.update(ENVIRONMENT)
    os.environ["VLLM_CACHE_ROOT"] = str(folder / "cache")
    model_folder = folder / request["model"]
    model_folder.mkdir(exist_ok=True)
    (model_folder / "config.json").write_text(json.dumps(_SIZES | MODELS[request["model"]]))
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from jitnorm.integrations import vllm_plugin

    vllm_plugin.register()  # vLLM does not call it if jitnorm is on PYTHONPATH only, and has no entry point
    counts: Counter[str] = Counter()
    if os.environ.get("JITNORM_VLLM"):
        count_decode_steps(counts)
    batches: list[list[list[int]]] = request["batches"]
    compilation = {} if request["eager"] else {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24]}
    compilation |= request.get("compilation", {})
    llm = LLM(
        model=str(model_folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=request.get("max_length", 1024),
        max_num_seqs=32,
        # Several workers may share the GPU, so that none may take a fraction of it.
        gpu_memory_utilization=0.02,
        kv_cache_memory_bytes=request.get("cache_bytes", 1 << 28),
        enforce_eager=request["eager"],
        compilation_config=compilation,
        attention_backend=request.get("backend", "FLASH_ATTN"),
        kv_cache_dtype=request.get("cache_dtype", "auto"),
        enable_prefix_caching=False,
        disable_log_stats=True,
        enable_flashinfer_autotune=False,
        max_logprobs=VOCABULARY,
        logprobs_mode="raw_logits",
        seed=0,
    )
    with torch.inference_mode():
        llm.apply_model(seed_weights)
    count_preemptions(llm.llm_engine.engine_core.engine_core.scheduler, counts)
    modules = llm.apply_model(lambda model: sorted({type(module).__name__ for module in model.modules()}))[0]
    # Every logit of every token: detokenize is off, as there is no tokenizer.
    usual = {"temperature": 0.0, "max_tokens": request["tokens"], "ignore_eos": True, "detokenize": False}
    sampling = request.get("sampling", [{"logprobs": VOCABULARY}])
    for each in sampling:
        if "logit_bias" in each:  # JSON has no keys that are numbers
            each["logit_bias"] = {int(token): bias for token, bias in each["logit_bias"].items()}
    results = []
    for prompts in batches:
        parameters = [SamplingParams(**usual | sampling[i % len(sampling)]) for i in range(len(prompts))]
        outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)
        results.append([_of_request(output.outputs[0]) for output in outputs])
    report = [(r.model, r.replaced, r.left, r.notes) for r in vllm_plugin.explain()]
    torch.save({"results": results, "report": report, "modules": modules, "counts": counts}, folder / "result.pt")


def _of_request(completion: Any) -> tuple[list[int], Any]:
    """Return the tokens of a completion and its logits, `[tokens, vocabulary]`, or None without all of them."""
    import torch

    if not completion.logprobs or len(completion.logprobs[0]) < VOCABULARY:
        return list(completion.token_ids), None
    logits = torch.full((len(completion.token_ids), VOCABULARY), float("nan"), dtype=torch.float64)
    for row, of_token in zip(logits, completion.logprobs, strict=True):
        for token, value in of_token.items():
            row[token] = value.logprob
    assert not logits.isnan().any()
    return list(completion.token_ids), logits


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
