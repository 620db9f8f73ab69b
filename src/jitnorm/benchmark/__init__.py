"""Benchmarks of kernels in a few declarative lines: see `jitnorm.benchmark.marker` and docs/benchmarking.md."""
