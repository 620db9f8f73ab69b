"""Measure what vLLM's host does in a decode step, with and without jitnorm's plugin, offline on one GPU.

    python benchmarks/engines/vllm_host.py --models DIR --model qwen3-0.6b --batches 1,256

A step of a small model lasts as long as the host takes for it. The rows are the whole step and the parts of PARTS, each
the median over the steps of a sample. Written for vLLM 0.26.0, with its second model runner.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import vllm_step
from engine_report import DECODE
from engine_run import main
from vllm_step import VllmEngine

# The functions of vLLM's engine that are timed, by their paths from LLM.
RUNNER = "llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner"
PARTS = {
    "schedule": "llm_engine.engine_core.engine_core.scheduler.schedule",
    "sampling parameters": f"{RUNNER}.add_requests",
    "inputs": f"{RUNNER}.prepare_inputs",
    "block tables and slots": f"{RUNNER}.prepare_attn",
    "metadata of attention": f"{RUNNER}.model_state.prepare_attn",
    "launch of the graph": f"{RUNNER}.cudagraph_manager.run_fullgraph",
    "logits and sampling": f"{RUNNER}.sample",
    "state of the requests": f"{RUNNER}.postprocess_sampled",
    "update of the scheduler": "llm_engine.engine_core.engine_core.scheduler.update_from_output",
    "outputs": "llm_engine.output_processor.process_outputs",
}


class HostEngine(VllmEngine):
    """A variant of vLLM whose functions are timed."""

    def prepare(self) -> None:
        """Do as VllmEngine does, and let the functions record their times."""
        super().prepare()
        self.times = record_times(self.llm)

    def decode(self, batch: int) -> dict[str, float]:
        """Return the median seconds of a decode step, and of its parts."""
        for seconds in self.times.values():
            seconds.clear()
        step = super().decode(batch)[DECODE]
        return {DECODE: step} | {name: statistics.median(seconds) for name, seconds in self.times.items() if seconds}


def record_times(llm: Any) -> dict[str, list[float]]:
    """Return lists to which each call of the functions of PARTS adds its seconds."""
    times: dict[str, list[float]] = {}
    for part, path in PARTS.items():
        owner, _, name = path.rpartition(".")
        times[part] = []
        found = attrgetter(owner)(llm)
        setattr(found, name, _recorded(getattr(found, name), times[part]))
    return times


def _recorded(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def recorded(*arguments: Any, **keywords: Any) -> Any:
        begin = time.perf_counter()
        result = function(*arguments, **keywords)
        seconds.append(time.perf_counter() - begin)
        return result

    return recorded


ENGINE = dataclasses.replace(
    vllm_step.ENGINE,
    name="vllm_host",
    factory=HostEngine,
    modes=["default", "batch_invariant"],
    measures=[DECODE],
)

if __name__ == "__main__":
    main(ENGINE, __doc__ or "")
