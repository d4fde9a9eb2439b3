"""Triton, where there is one.

`from fasttune_kernels.jit import jit, tl` in place of triton's own names keeps a file with kernels
importable on machines without triton (macOS, Windows): there `jit` leaves a function that cannot be
launched, and `dispatch` never asks for it.
"""

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton import jit, next_power_of_2
    from triton.language.extra import libdevice

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        """Stands for `triton.language` in signatures, which are all that is evaluated of a kernel."""

        constexpr = int

    triton = None  # type: ignore[assignment]
    tl = _Absent()  # type: ignore[assignment]
    libdevice = None  # type: ignore[assignment]

    def jit(fn: Callable[..., Any]) -> Callable[..., Any]:  # type: ignore[no-redef]
        """Returns the function."""
        return fn

    def next_power_of_2(n: int) -> int:  # type: ignore[no-redef]
        """The smallest power of two that is at least n."""
        return 1 << max(n - 1, 0).bit_length()


__all__ = ["HAS_TRITON", "jit", "libdevice", "next_power_of_2", "tl", "triton"]
