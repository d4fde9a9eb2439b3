"""What an operation is to the benchmarks: its definition, what we run for it, and its shapes.

`plain` is the definition, in PyTorch; it is what eager and torch.compile are timed on, and in float64 it
is the truth that everything is compared with. `ours` runs what the models run, through their own code, and so
a kernel of ours as soon as the models call one; `has_kernel` says whether they do, since without one
`ours` is eager PyTorch by another way and is compared but not timed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.libraries import Bind, Inputs

FLUX_TOKENS = 4096 + 512
"""Of 1024 x 1024 pixels, and T5's positions."""
Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Draw:
    """Fresh random tensors."""

    generator: torch.Generator
    dtype: torch.dtype

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        g = self.generator
        values = torch.randn(shape, generator=g, device=g.device)
        return (values * scale).to(dtype or self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One operation, and everything that computes it."""

    name: str
    make: Callable[[Sizes, Draw], Inputs]
    """Inputs by name."""
    plain: Callable[..., Any]
    """Inputs by name -> a tensor, or several. In float64 for float64 inputs."""
    ours: Bind
    sizes: tuple[Sizes, ...]
    """In real models at batch 1; the first number is the batch. The first is the most important."""
    odd: tuple[Sizes, ...]
    """Where mistakes show: no multiples of anything, and small enough for float64."""
    trained: tuple[str, ...]
    """Inputs that get a gradient."""
    has_kernel: bool = False
    libraries: Mapping[str, Bind] = field(default_factory=dict)
    """The best of their kind, by name; libraries that are not there are left out by trying."""
    eager: Callable[..., Any] | None = None
    """What eager PyTorch is timed on, where that is not `plain`."""
    flops: Callable[[Sizes], int] = lambda sizes: 0
    """Of a forward, where matrix products count."""
    backward_flops: float = 2.0
    """As a multiple of the forward's."""


def bound(function: Callable[..., Any]) -> Bind:
    """Of a function of the inputs that needs no preparation."""
    return lambda **inputs: partial(function, **inputs)
