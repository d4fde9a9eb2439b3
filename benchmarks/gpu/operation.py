"""What an operation is to the benchmarks: its definition, what we run for it, its shapes and its targets.

`plain` is the definition, in PyTorch; it is what eager and torch.compile are timed on, and in float64 it
is the truth that everything is compared with. `ours` calls the operation's public function of
fasttune_kernels, or the pair of forward and backward that the blocks call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.libraries import Bind, Inputs
from benchmarks.gpu.names import BOTH, FORWARD

FLUX_TEXT, FLUX_IMAGE = 512, 4096
FLUX_TOKENS = FLUX_IMAGE + FLUX_TEXT
"""Of 1024 x 1024 pixels, and T5's positions."""
Sizes = tuple[int, ...]
Bytes = Callable[[Inputs, Sequence[Tensor], Sequence[str]], tuple[int, int]]
"""(inputs, outputs, what is trained) -> the bytes that a forward and a backward must move."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Fresh random tensors."""

    generator: torch.Generator
    dtype: torch.dtype

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        g = self.generator
        values = torch.randn(shape, generator=g, device=g.device)
        return (values * scale).to(dtype or self.dtype)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def all_once(inputs: Inputs, outputs: Sequence[Tensor], trained: Sequence[str]) -> tuple[int, int]:
    """Every input read and every output written; in the backward the incoming gradients and the inputs
    read, and the gradients written."""
    moved = bytes_of([*inputs.values(), *outputs])
    return moved, moved + bytes_of([inputs[name] for name in trained])


def backward_of(*read: str, writes: Sequence[str] | None = None) -> Bytes:
    """As `all_once`, but for a backward that reads no more than these inputs or "output 0" and the like
    beside the incoming gradients, and writes the gradients of `writes`: the others are incoming ones."""

    def found(inputs: Inputs, outputs: Sequence[Tensor], trained: Sequence[str]) -> tuple[int, int]:
        known = {**inputs, **{f"output {i}": t for i, t in enumerate(outputs)}}
        written = trained if writes is None else writes
        backward = [*outputs, *(known[n] for n in read), *(inputs[n] for n in written)]
        return bytes_of([*inputs.values(), *outputs]), bytes_of(backward)

    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What our kernel is to reach on an H200, in one direction."""

    against: str
    """Whose time it is a multiple of: "eager", "compile", or "others", the fastest of all but ours; or
    "copy": the share of the copy's bandwidth."""
    at_least: float
    direction: str
    batch: int | None = None
    """None for all."""


STREAMS = tuple(Target(against="copy", at_least=0.85, direction=way) for way in (FORWARD, BOTH))
"""Of an operation that memory alone holds up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One operation, and everything that computes it."""

    name: str
    make: Callable[[Sizes, Draw], Inputs]
    """Inputs by name."""
    plain: Callable[..., Any]
    """Inputs by name -> a tensor, or several. In float64 for float64 inputs."""
    ours: Bind
    sizes: tuple[Sizes, ...] = ()
    """In real models at batch 1; the first number is the batch. The first is the most important. Without
    any it is checked and not timed."""
    odd: tuple[Sizes, ...]
    """Where mistakes show: no multiples of anything, and small enough for float64."""
    trained: tuple[str, ...]
    """Inputs that get a gradient; none of an operation that has no backward."""
    checked: tuple[str, ...] = ()
    """Further inputs that can get a gradient: checked, and not timed."""
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    """In which it is checked."""
    contiguous: tuple[str, ...] = ()
    """Inputs that are so whoever made them: checked in no other layout."""
    has_kernel: bool = True
    """Whether `ours` launches a kernel of ours on NVIDIA and AMD. Without one it is not timed."""
    may_be_vendors: bool = False
    """Whether `ours` may be a vendor's kernel that adds with atomics, so that a second run may differ."""
    needs_triton: bool = False
    """Whether it cannot be run without one."""
    variants: Mapping[str, Bind] = field(default_factory=dict)
    """Other ways of ours, by name, timed beside it; the names begin with "ours"."""
    libraries: Mapping[str, Bind] = field(default_factory=dict)
    """The best of their kind, by name; libraries that are not there are left out by trying."""
    eager: Callable[..., Any] | None = None
    """What eager PyTorch is timed on, where that is not `plain`."""
    flops: Callable[[Sizes], int] = lambda sizes: 0
    """Of a forward, where matrix products count."""
    backward_flops: float = 2.0
    """As a multiple of the forward's."""
    moved: Bytes = all_once
    targets: tuple[Target, ...] = ()


def bound(function: Callable[..., Any]) -> Bind:
    """Of a function of the inputs that needs no preparation."""
    return lambda **inputs: partial(function, **inputs)
