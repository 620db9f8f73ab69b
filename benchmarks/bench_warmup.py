"""Measure warm-ups from the configs of models for sm_90a, with an empty cache and with one that has the kernels.

model_configs.json has the keys of each model's published config.json that warm-up reads. Each sample is a new process;
its time begins after the imports. With an empty cache a source checkout also builds the launcher, which an installed
wheel contains.
"""

from __future__ import annotations

import functools
import tempfile

from bench_build import CONFIGS, warm_up_model

from jitnorm.benchmark import marker

SAMPLES = 3


@functools.cache  # the rows of empty and of warm caches have the same samples
def take_samples(model: str) -> list[tuple[float, float, int]]:
    """Return the seconds with an empty cache, those of a second warm-up, and the number of kernels."""
    found = []
    for _ in range(SAMPLES):
        with tempfile.TemporaryDirectory() as folder:
            seconds, kernels = warm_up_model(model, folder)
            found.append((seconds, warm_up_model(model, folder)[0], kernels))
    return found


@marker.parametrize("model", list(CONFIGS), ["Llama-3.1-8B"])
@marker.parametrize("caches", ["empty", "warm"])
@marker.benchmark("impl", ["jitnorm"], unit="s")
def bench(model: str, caches: str, impl: str) -> marker.BenchResult:
    """Measure warm-ups from the configs of models for sm_90a, with an empty cache and with a warm one."""
    samples = take_samples(model)
    seconds = [[empty if caches == "empty" else warm] for empty, warm, _ in samples]
    return marker.BenchResult.of(seconds, metrics=(0.5, "min", "max"), notes=(f"{samples[0][2]} kernels",))


if __name__ == "__main__":
    bench.main()
