"""Benchmark kernels with a few declarative lines: see `jitnorm.benchmark.marker` and docs/guides/benchmarking.md."""
