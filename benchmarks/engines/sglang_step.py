"""Measure SGLang with and without jitnorm's plugin, offline on one GPU, with random weights.

    python benchmarks/engines/sglang_step.py --models DIR --model qwen3-0.6b --output sglang.json
    python benchmarks/engines/sglang_step.py --models DIR --mode default,deterministic --check-bits

Modes: default and deterministic (`enable_deterministic_inference`, which is also compared with the default mode without
the plugin), both with CUDA graphs and Triton attention. SGLang's ModelRunner runs as in `sglang.benchmark.one_batch`: a
decode step is timed with its scheduling and sampling, and the replay of its graph alone. Written for SGLang 0.5.16.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from engine_models import random_prompts, seed_weights
from engine_options import BIT_PROMPT, BIT_TOKENS, MAX_LENGTH, PREFILL_LENGTH, PREFILL_PROMPTS, Engine
from engine_report import DECODE, GRAPH, PLUGIN, PREFILL, profile_kernels, replay_seconds, subtract_kernels
from engine_run import main
from float32_model import hidden_state_error
from logit_bits import BitCheck, check_distinct
from torch import Tensor

GROUP = "sglang.srt.plugins"
PROFILED_STEPS = 16


def environment(mode: str, line: str, caches: Path) -> dict[str, str]:
    """Return the variables of a variant."""
    found = {
        "JITNORM_SGLANG": "1" if line == PLUGIN else "0",
        "SGLANG_PLUGINS": "jitnorm" if line == PLUGIN else "none",  # "" would allow all
        "HF_HUB_OFFLINE": "1",
        "SGLANG_HOST_IP": "127.0.0.1",  # a machine without a network has no route by which to find its address
        "HOST_IP": "127.0.0.1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if "CUDA_HOME" not in os.environ and Path("/usr/local/cuda/bin/nvcc").exists():
        found["CUDA_HOME"] = "/usr/local/cuda"  # SGLang takes the folder of the first nvcc on PATH for a toolkit
    return found


def server_arguments(
    model: str, deterministic: bool, batches: list[int], sequences: int, cache_tokens: int, device: str
) -> dict[str, Any]:
    """Return the arguments of SGLang's ServerArgs. VllmEngine explains those of this function."""
    return {
        "model_path": model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "device": device,
        "context_length": MAX_LENGTH,
        "max_running_requests": sequences + 8,
        "max_total_tokens": cache_tokens,
        "mem_fraction_static": 0.9,  # an upper bound: max_total_tokens is less, and other variants share the GPU
        "attention_backend": "torch_native" if device == "cpu" else "triton",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_radix_cache": True,
        "disable_overlap_schedule": True,
        "cuda_graph_bs_decode": sorted({1, 2, 4, 8, *batches}),
        "cuda_graph_backend_prefill": "disabled",
        "disable_decode_cuda_graph": device == "cpu",
        "enable_deterministic_inference": deterministic,
        "log_level": "info",
        "random_seed": 0,
    }


class SglangEngine:
    """One variant of SGLang, with its ModelRunner in this process. VllmEngine explains the arguments."""

    def __init__(
        self,
        model: str,
        mode: str,
        plugin: bool,
        batches: list[int],
        sequences: int,
        prompt: int,
        tokens: int,
        cache_tokens: int,
        cache_bytes: int,
        vocab_size: int,
        device: str = "cuda",
    ) -> None:
        from sglang.benchmark import one_batch
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import PortArgs, ServerArgs

        load_plugins()  # as sglang.Engine does
        self.one_batch, self.model, self.plugin, self.device = one_batch, model, plugin, device
        self.prompt, self.tokens, self.vocab_size = prompt, tokens, vocab_size
        deterministic = mode == "deterministic"
        arguments = ServerArgs(**server_arguments(model, deterministic, batches, sequences, cache_tokens, device))
        one_batch._set_envs_and_config(arguments)
        one_batch.initialize_moe_config(arguments)
        one_batch.initialize_fp8_gemm_config(arguments)
        one_batch.initialize_fp4_gemm_config(arguments)
        one_batch.configure_logger(arguments)
        one_batch.get_tokenizer = lambda *args, **kwargs: None  # there is none
        self.arguments = arguments
        self.runner, _ = one_batch.load_model(arguments, PortArgs.init_new(arguments), 0, 0)
        self.model_runner = self.runner.torch_runner
        if (found := self.model_runner.max_total_num_tokens) < cache_tokens * 0.9:
            raise RuntimeError(f"the KV cache has {found} tokens, and a batch needs {cache_tokens}")

    def prepare(self) -> None:
        """Set the weights.

        Raises:
            RuntimeError: the plugin replaced nothing.
        """
        self.replaced = ""
        if self.plugin:
            from jitnorm.integrations.sglang_plugin import explain

            self.replaced = "\n".join(map(str, explain()))
            if "replaced: " not in self.replaced:
                raise RuntimeError(f"the plugin replaced nothing: {self.replaced}")
        seed_weights(self.model_runner.model.named_parameters())
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """Return how SGLang runs, and what the plugin replaced."""
        from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled

        return {
            "attention": self.arguments.attention_backend,
            "batch_invariant_ops": is_batch_invariant_mode_enabled(),
            "plugin": self.replaced,
        }

    def decode(self, batch: int) -> dict[str, float]:
        """Return the median seconds of a decode step, and of the replay of its graph."""
        steps = self._generate(random_prompts([self.prompt] * batch, self.vocab_size, seed=1), self.tokens)
        graph = self._graph_seconds(batch)
        return {DECODE: statistics.median(steps)} | ({} if graph is None else {GRAPH: graph})

    def _graph_seconds(self, batch: int) -> float | None:
        """Return the seconds of a replay of a decode graph, on what its buffers last held; None without one."""
        if self.device == "cpu":
            return None
        graphs = self.model_runner.decode_cuda_graph_runner.backend._graphs
        graph = next((graph for key, graph in graphs.items() if key.size == batch), None)
        return None if graph is None else replay_seconds(graph)

    def prefill(self) -> dict[str, float]:
        """Return the seconds to the first token of long prompts."""
        prompts = random_prompts([PREFILL_LENGTH] * PREFILL_PROMPTS, self.vocab_size, seed=2)
        self._synchronize()
        begin = time.perf_counter()
        self._generate(prompts, 1)
        return {PREFILL: time.perf_counter() - begin}

    def check_bits(self, batches: list[int], repeats: int) -> list[dict[str, Any]]:
        """Compare the logits of each prompt of a batch with those that it has alone, at its last token and in decoding.

        In each repeat the prompts have other places in the batch.
        """
        lengths = [1 + (37 * i) % (2 * BIT_PROMPT) for i in range(max(batches))]
        prompts = random_prompts(lengths, self.vocab_size, seed=3)
        alone = torch.stack([self._logits([prompt])[0] for prompt in prompts])
        check_distinct(alone.flatten(0, 1))
        checks = {batch: BitCheck(batch) for batch in dict.fromkeys([1, *batches])}
        for repeat in range(repeats):
            for batch, check in checks.items():
                chosen = [(11 * repeat + i) % len(prompts) for i in range(batch)]
                found = self._logits([prompts[i] for i in chosen])
                check.add(alone[chosen].flatten(0, 1), found.flatten(0, 1))
                check.repeats += 1
        return [check.as_dict() for check in checks.values()]

    def _logits(self, prompts: list[list[int]]) -> Tensor:
        """Return the logits of all steps, `[prompts, steps, vocabulary]`."""
        found: list[Tensor] = []
        self._generate(prompts, BIT_TOKENS, logits=found)
        return torch.stack(found, 1)

    def hidden_state_error(self, length: int, file: str) -> float:
        """Return the relative error of the hidden states of a fixed sequence, before the logits.

        `file` has those of float32, or gets them.
        """
        (prompt,) = random_prompts([length], self.vocab_size, seed=5)
        model, found = self.model_runner.model, []
        with model.model.register_forward_hook(lambda module, args, output: found.append(output.clone())):
            self._generate([prompt], 1)
        return hidden_state_error(found[0], self.model, dict(model.named_parameters()), prompt, Path(file))

    def kernels(self, batch: int, top: int) -> list[list[Any]]:
        """Return [name, calls, microseconds] of the kernels of a decode step."""
        prompts = random_prompts([self.prompt] * batch, self.vocab_size, seed=1)
        counts = 1 + PROFILED_STEPS, 1
        whole, part = (profile_kernels(lambda n=n: self._generate(prompts, n)) for n in counts)
        return subtract_kernels(whole, part, PROFILED_STEPS, top)

    def _generate(self, prompts: list[list[int]], tokens: int, logits: list[Tensor] | None = None) -> list[float]:
        """Return the seconds of each decode step, and append the logits of all steps to a list."""
        self.runner.clear()
        requests = self.one_batch.prepare_synthetic_inputs_for_latency_test(len(prompts), 0, prompts)
        last, found, batch = self.runner.extend(requests)
        seconds = []
        for step in range(tokens):
            if logits is not None:
                logits.append(found.clone())  # a graph writes its logits to the same buffer each time
            self._synchronize()
            if step < tokens - 1:
                begin = time.perf_counter()
                last, found = self.runner.decode(last, batch)
                self._synchronize()
                seconds.append(time.perf_counter() - begin)
        return seconds

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


ENGINE = Engine(
    name="sglang_step",
    package="sglang",
    factory=SglangEngine,
    modes=["default", "deterministic"],
    batches=[1, 16, 64],
    bit_batches=[3, 16, 17, 64],
    measures=[DECODE, PREFILL, "bits", "hidden_state_error", "kernels"],
    plugin_group=GROUP,
    plugin_target="jitnorm.integrations.sglang_plugin:register",
    environment=environment,
)

if __name__ == "__main__":
    main(ENGINE, __doc__ or "")
