"""An engine for test_engines.py: a small model in PyTorch behind the methods that the scripts call in its process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from engine_models import random_prompts, seed_weights
from engine_options import Engine
from engine_report import DECODE, PREFILL
from logit_bits import BitCheck, check_distinct

SIZE = 32


def environment(mode: str, line: str, caches: Path) -> dict[str, str]:
    return {"TINY_PLUGIN": str(int(line == "plugin")), "TINY_MODE": mode}


class TinyEngine:
    """A model whose logits depend on the last two tokens; without the plugin also on the batch, by a rounding."""

    def __init__(self, model: str, mode: str, plugin: bool, vocab_size: int, **settings: Any) -> None:
        if os.environ["TINY_PLUGIN"] != str(int(plugin)) or os.environ["TINY_MODE"] != mode:
            raise RuntimeError("the environment is that of another variant")
        print(f"starting {mode}, plugin {plugin}")
        self.mode, self.plugin, self.vocab_size = mode, plugin, vocab_size
        self.model = torch.nn.Sequential(torch.nn.Embedding(vocab_size, SIZE), torch.nn.Linear(SIZE, vocab_size))

    def prepare(self) -> None:
        seed_weights(self.model.named_parameters())

    def describe(self) -> dict[str, Any]:
        return {"device": "cpu", "plugin": "Tiny:\nreplaced 1" if self.plugin else ""}

    def decode(self, batch: int) -> dict[str, float]:
        if batch == 4 and self.plugin:
            raise ValueError("no graph\nfor 4")
        if batch == 5 and self.plugin:
            print("leaving", flush=True)
            os._exit(7)
        if batch == 6:
            time.sleep(3600)
        return {DECODE: (1 if self.plugin else 2) * batch * 1e-6}

    def prefill(self) -> dict[str, float]:
        return {PREFILL: 3e-3}

    @torch.no_grad()
    def _logits(self, prompts: list[list[int]]) -> torch.Tensor:
        rows = torch.stack([self.model(torch.tensor(prompt[-2:])).sum(0) for prompt in prompts])
        return rows if self.plugin else rows * (1 + 1e-6 * (len(prompts) - 1))

    def check_bits(self, batches: list[int], repeats: int) -> list[dict[str, Any]]:
        prompts = random_prompts([5] * max(batches), self.vocab_size, seed=1)
        alone = torch.cat([self._logits([prompt]) for prompt in prompts])
        check_distinct(alone)
        checks = [BitCheck(batch) for batch in batches]
        for check in checks:
            for _ in range(repeats):
                check.add(alone[: check.batch], self._logits(prompts[: check.batch]))
                check.repeats += 1
        return [check.as_dict() for check in checks]

    @torch.no_grad()
    def perplexity(self, length: int) -> float:
        (prompt,) = random_prompts([length], self.vocab_size, seed=2)
        logits = self.model(torch.tensor(prompt[:-1]))
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(prompt[1:])))

    def hidden_state_error(self, length: int, file: str) -> float:
        assert file.endswith("small_float32.pt"), "all variants of a model share the file"
        return (3e-3 if self.plugin else 4e-3) * length

    def kernels(self, batch: int, top: int) -> list[list[Any]]:
        return [["gemm", 2.0, 1.5]]


ENGINE = Engine(
    name="tiny",
    package="tabulate",  # any package that is installed
    factory=TinyEngine,
    modes=["default", "invariant"],
    batches=[1, 3],
    bit_batches=[3],
    measures=[DECODE, PREFILL, "bits", "perplexity", "hidden_state_error", "kernels"],
    plugin_group="tiny.plugins",
    plugin_target="tiny_engine:TinyEngine",
    environment=environment,
)

assert "vllm" not in sys.modules and "sglang" not in sys.modules
