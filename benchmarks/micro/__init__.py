"""Micro-benchmarks for pytest-benchmark: `pytest benchmarks`."""
