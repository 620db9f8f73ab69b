"""Measure vLLM with and without jitnorm's plugin, offline on one GPU, with random weights.

    python benchmarks/engines/vllm_step.py --models DIR --model qwen3-0.6b,llama-3.2-1b --prefill --output vllm.json
    python benchmarks/engines/vllm_step.py --models DIR --mode batch_invariant --check-bits

Modes: default (Inductor and CUDA graphs), eager (`enforce_eager`), batch_invariant (`VLLM_BATCH_INVARIANT=1`). The last
two are also compared with the default mode without the plugin. Written for vLLM 0.26.0.
"""

from __future__ import annotations

import itertools
import statistics
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from engine_models import random_prompts, seed_weights
from engine_options import BIT_PROMPT, BIT_TOKENS, MAX_LENGTH, PREFILL_LENGTH, PREFILL_PROMPTS, Engine
from engine_report import DECODE, GRAPH, PLUGIN, PREFILL, profile_kernels, replay_seconds, subtract_kernels
from engine_run import main
from float32_model import hidden_state_error
from logit_bits import BitCheck, LogitRecorder, check_distinct
from torch import Tensor

GROUP = "vllm.general_plugins"
PROFILED_STEPS = 16


def environment(mode: str, line: str, caches: Path) -> dict[str, str]:
    """Return the variables of a variant, whose compiled graphs are in a folder of its own."""
    return {
        "JITNORM_VLLM": "1" if line == PLUGIN else "0",
        "VLLM_PLUGINS": "jitnorm" if line == PLUGIN else "",  # "" names no plugin
        "VLLM_BATCH_INVARIANT": "1" if mode == "batch_invariant" else "0",
        "VLLM_CACHE_ROOT": str(caches),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where its model can be reached
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy sampling needs no sampler
        "VLLM_USE_DEEP_GEMM": "0",
        "VLLM_HOST_IP": "127.0.0.1",  # a machine without a network has no route by which to find its address
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_MODULE_LOADING": "LAZY",
    }


def llm_arguments(
    model: str, eager: bool, batches: list[int], sequences: int, prompt: int, cache_bytes: int
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`. VllmEngine explains those of this function."""
    sizes = sorted({1, 2, 4, 8, *batches})
    graphs = {"cudagraph_capture_sizes": sizes, "max_cudagraph_capture_size": sizes[-1]}
    return {
        "model": model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": MAX_LENGTH,
        "max_num_seqs": sequences,
        "max_num_batched_tokens": max(PREFILL_PROMPTS * PREFILL_LENGTH, sequences * prompt),  # a prefill is one step
        # Several variants share the GPU, so none may take a fraction of it.
        "gpu_memory_utilization": 0.02,
        "kv_cache_memory_bytes": cache_bytes,
        "enforce_eager": eager,
        "compilation_config": {} if eager else graphs,
        "attention_backend": "FLASH_ATTN",
        "enable_prefix_caching": False,
        "enable_flashinfer_autotune": False,
        "disable_log_stats": True,
        "seed": 0,
    }


def record_steps(engine_core: Any) -> list[float]:
    """Return a list to which each step of an engine core with new tokens adds the time of its end, in seconds.

    `LLMEngine.step` would not do: it returns only the requests that are finished.
    """
    ends: list[float] = []
    get_output = engine_core.get_output

    def recorded() -> Any:
        found = get_output()
        if found.outputs:
            ends.append(time.perf_counter())
        return found

    engine_core.get_output = recorded
    return ends


class VllmEngine:
    """One variant of vLLM, with `LLM` in this process.

    Args:
        model: the folder of config.json.
        mode, plugin: the variant.
        batches: of decode steps: sizes that CUDA graphs are captured for, beside 1, 2, 4 and 8.
        sequences: the most prompts at once, 8 or more.
        prompt, tokens: the tokens of a prompt, and those generated for a sample.
        cache_tokens, cache_bytes: the size of the KV cache.
        vocab_size: of the model.
    """

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
    ) -> None:
        from vllm import LLM

        if plugin:
            # vLLM logs the exception of a plugin and goes on without it: call it here, where it ends the variant.
            for entry in entry_points(group=GROUP, name="jitnorm"):
                entry.load()()
        self.model, self.plugin = model, plugin
        self.prompt, self.tokens, self.vocab_size = prompt, tokens, vocab_size
        self.llm = LLM(**llm_arguments(model, mode == "eager", batches, sequences, prompt, cache_bytes))
        self.step_ends = record_steps(self.llm.llm_engine.engine_core)
        cache = self.llm.llm_engine.vllm_config.cache_config
        if (found := (cache.num_gpu_blocks or 0) * cache.block_size) < cache_tokens * 0.9:
            raise RuntimeError(f"the KV cache has {found} tokens, and a batch needs {cache_tokens}")

    def prepare(self) -> None:
        """Set the weights, and record logits where that is asked for later.

        Raises:
            RuntimeError: the plugin replaced nothing.
        """
        self.recorder, self.replaced = LogitRecorder(), ""
        if self.plugin:
            from jitnorm.integrations.vllm_plugin import explain

            if not any(report.replaced for report in explain()):
                raise RuntimeError("the plugin replaced nothing: its warnings say why")
            self.replaced = "\n".join(map(str, explain()))

        def set_up(model: torch.nn.Module) -> None:
            seed_weights(model.named_parameters())
            model.compute_logits = self.recorder.wrap(model.compute_logits)  # called by vLLM outside of CUDA graphs

        with torch.inference_mode():
            self.llm.apply_model(set_up)
        torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """Return how vLLM runs, and what the plugin replaced."""
        config = self.llm.llm_engine.vllm_config
        return {
            "graphs": str(config.compilation_config.cudagraph_mode),
            "custom_ops": list(config.compilation_config.custom_ops),
            "runner": "V2" if config.use_v2_model_runner else "V1",
            "plugin": self.replaced,
        }

    def decode(self, batch: int) -> dict[str, float]:
        """Return the median seconds of a decode step, and of the replay of its graph.

        A step lasts from the tokens of one to those of the next. The tokens of all prompts come together, as their
        prefill is one step. A mean would contain what a prefill leaves to the next step.
        """
        self.step_ends.clear()
        self._generate(random_prompts([self.prompt] * batch, self.vocab_size, seed=1), self.tokens)
        steps = [end - begin for begin, end in itertools.pairwise(self.step_ends)]
        graph = self._graph_seconds(batch)
        return {DECODE: statistics.median(steps)} | ({} if graph is None else {GRAPH: graph})

    def _graph_seconds(self, batch: int) -> float | None:
        """Return the seconds of a replay of a decode graph, on what its buffers last held; None without one."""
        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        graphs = getattr(getattr(runner, "cudagraph_manager", None), "graphs", {})  # of the V2 runner
        found = [graph for key, graph in graphs.items() if key.num_tokens == batch and key.uniform_token_count == 1]
        return replay_seconds(found[0]) if found else None

    def prefill(self) -> dict[str, float]:
        """Return the seconds to the first token of long prompts."""
        prompts = random_prompts([PREFILL_LENGTH] * PREFILL_PROMPTS, self.vocab_size, seed=2)
        return {PREFILL: self._generate(prompts, 1)[0]}

    def check_bits(self, batches: list[int], repeats: int) -> list[dict[str, Any]]:
        """Compare the logits of a prompt in batches with those that it has alone: of its tokens and of those generated.

        In each repeat the other prompts and the position in the batch are new.
        """
        (prompt,) = random_prompts([BIT_PROMPT], self.vocab_size, seed=3)
        with self.recorder:
            expected, expected_tokens = self._logits([prompt], 0)
            check_distinct(expected)
            checks = {batch: BitCheck(batch) for batch in dict.fromkeys([1, *batches])}
            for repeat in range(repeats):
                for batch, check in checks.items():
                    lengths = [1 + (37 * (repeat + i)) % (2 * BIT_PROMPT) for i in range(batch)]
                    prompts = random_prompts(lengths, self.vocab_size, seed=4 + repeat)
                    position = (7 * repeat) % batch
                    prompts[position] = prompt
                    found, tokens = self._logits(prompts, position)
                    check.add_somewhere(expected, found)
                    check.repeats += 1
                    if tokens != expected_tokens and not check.unequal:
                        raise RuntimeError("the tokens differ, and no logit does: the recorder missed a step")
        return [check.as_dict() for check in checks.values()]

    def _logits(self, prompts: list[list[int]], position: int) -> tuple[Tensor, list[int]]:
        """Return the logits of all prompts in any order, and the tokens of the prompt at `position`.

        Of that prompt the logits of each token are computed, of the others at least those of the last.
        """
        _, outputs = self._generate(prompts, BIT_TOKENS, with_prompt=position)
        return self.recorder.take(), list(outputs[position].outputs[0].token_ids)

    def perplexity(self, length: int) -> float:
        """Return the mean negative log-likelihood of the tokens of a fixed sequence after its first, in nats."""
        (prompt,) = random_prompts([length], self.vocab_size, seed=5)
        _, outputs = self._generate([prompt], 1, with_prompt=0)
        found = outputs[0].prompt_logprobs[1:]  # the first token has none
        return -sum(values[token].logprob for token, values in zip(prompt[1:], found, strict=True)) / (length - 1)

    def hidden_state_error(self, length: int, file: str) -> float:
        """Return the relative error of the hidden states of a fixed sequence, before the logits.

        `file` has those of float32, or gets them.
        """
        (prompt,) = random_prompts([length], self.vocab_size, seed=5)
        with self.recorder:
            # vLLM computes the logits of each token to return their logprobs.
            self._generate([prompt], 1, with_prompt=0)
            found = self.recorder.take_hidden_states()

        def compare(model: torch.nn.Module) -> float:
            return hidden_state_error(found, self.model, dict(model.named_parameters()), prompt, Path(file))

        return float(self.llm.apply_model(compare)[0])

    def kernels(self, batch: int, top: int) -> list[list[Any]]:
        """Return [name, calls, microseconds] of the kernels of a decode step."""
        prompts = random_prompts([self.prompt] * batch, self.vocab_size, seed=1)
        whole, part = (profile_kernels(lambda n=n: self._generate(prompts, n)) for n in (1 + PROFILED_STEPS, 1))
        return subtract_kernels(whole, part, PROFILED_STEPS, top)

    def _generate(
        self, prompts: list[list[int]], tokens: int, with_prompt: int | None = None
    ) -> tuple[float, list[Any]]:
        """Return the seconds that `generate` takes, and its outputs; with the logprobs of one prompt's tokens."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = [
            # There is no tokenizer, and no end that it knows.
            SamplingParams(
                temperature=0.0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                prompt_logprobs=1 if i == with_prompt else None,
            )
            for i in range(len(prompts))
        ]
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        torch.cuda.synchronize()
        return time.perf_counter() - begin, outputs


ENGINE = Engine(
    name="vllm_step",
    package="vllm",
    factory=VllmEngine,
    modes=["default", "eager", "batch_invariant"],
    batches=[1, 16, 64, 256],
    bit_batches=[3, 17, 64],
    measures=[DECODE, PREFILL, "bits", "perplexity", "hidden_state_error", "kernels"],
    plugin_group=GROUP,
    plugin_target="jitnorm.integrations.vllm_plugin:register",
    environment=environment,
)

if __name__ == "__main__":
    main(ENGINE, __doc__ or "")
