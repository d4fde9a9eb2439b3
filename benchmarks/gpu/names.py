"""Names that rows of kernels are told apart by."""

EAGER, COMPILED, OURS = "eager", "compile", "ours"
"""Contenders; others of ours begin with the last."""
FORWARD, BOTH = "forward", "forward+backward"
"""What is timed of an operation."""
