"""Kernels of each GPU under its ceilings: the roofline section of the results' page."""

from collections.abc import Sequence
from benchmarks.report_page import Section
from benchmarks.report_rows import Odd, Result


def rooflines(results: Sequence[Result], odd: list[Odd]) -> Section:
    return Section("kernels", "Kernels", "", "No GPU rows yet: run benchmarks/gpu/run.sh.")
