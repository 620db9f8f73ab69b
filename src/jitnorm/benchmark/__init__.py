"""Benchmark kernels with a few declarative lines: see `jitnorm.benchmark.marker` and docs/benchmarking.md."""
