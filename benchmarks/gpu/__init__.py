"""Measures the head on one GPU: `benchmarks/gpu.sh` runs it."""
