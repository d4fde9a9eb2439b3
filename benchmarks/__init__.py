"""Benchmarks and gates; `fasttune bench` and `python -m benchmarks` are their command."""

from fasttune import environment

environment.prepare()  # modules are run on their own, too: before they import torch
