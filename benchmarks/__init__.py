"""Benchmarks and gates; `fasttune bench` and `python -m benchmarks` are their command."""
