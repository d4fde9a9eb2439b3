"""What our operations launch on a GPU, found by running the code that launches it.

The body of an operation runs on tensors without memory, with its Triton kernels replaced by a note and the
questions it asks of a GPU answered for one card. So a second stage, a vendor's product inside, a copy for
the sake of strides are counted where they take place, and there is no list of operations to keep up.
recorded_launches.py keeps what each kernel is launched with.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from benchmarks.static.kinds import kind_of
from benchmarks.static.stand_in import Like
from fasttune.memory.tensors import tensors_in
from fasttune.memory.trace import MemoryTrace, Scratch
from fasttune_kernels import attention_dispatch, dispatch
from fasttune_kernels.jit import HAS_TRITON

ARCH = "sm_89"
PROCESSORS = 128
"""The card's, an RTX 4090's (NVIDIA's Ada tuning guide): how sums are split, whose products are used."""
BACKENDS = frozenset({"short", "flash", "efficient", "own_flash"})
"""Of attention, on such a card."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """What operations ask of a GPU."""

    arch: str
    processors: int
    """As PyTorch counts them."""
    backends: frozenset[str]
    """Of attention: what `attention_dispatch.available` finds there."""


def _card() -> Card:
    return Card(arch=ARCH, processors=PROCESSORS, backends=BACKENDS)


def launches_of(op: OpOverload, args: Any, kwargs: Any) -> Counter[str]:
    """By kind: "custom" are Triton kernels, all others operations of torch inside of ours. Of tensors only
    shapes, strides and dtypes are looked at. An operation without a body of Python is one launch, and so is
    any of ours where Triton is not installed."""
    if op.name() not in OPDEFS or not HAS_TRITON:
        return Counter([kind_of(op)])
    leaves, structure = tree_flatten((args, kwargs))
    described = tuple(Like.of(x) if isinstance(x, Tensor) else x for x in leaves)
    return Counter(_launches(op.name(), described, structure))


def scratch_of(rounding: Callable[[int], int], *, backend: dispatch.Backend = "triton") -> Scratch:
    """For `MemoryTrace`: what a body of ours allocates while it runs, outputs and partial sums alike, with
    our kernels or with PyTorch's operations in their place."""

    def scratch(op: OpOverload, args: Any, kwargs: Any) -> int:
        if op.name() not in OPDEFS or (backend == "triton" and not HAS_TRITON):
            return 0
        leaves, structure = tree_flatten((args, kwargs))
        described = tuple(Like.of(x) if isinstance(x, Tensor) else x for x in leaves)
        return _allocated(op.name(), described, structure, rounding, backend)

    return scratch


@cache
def _allocated(
    name: str,
    leaves: tuple[Any, ...],
    structure: Any,
    rounding: Callable[[int], int],
    backend: dispatch.Backend,
) -> int:
    with unset_fake_temporarily(), torch.no_grad():
        args, kwargs = _given(leaves, structure)
        inside = scratch_of(rounding, backend=backend)  # of ours that one of ours calls
        trace = MemoryTrace(rounding=rounding, device_type="meta", scratch=inside)
        trace.label("inputs", tensors_in([args, kwargs]))
        given = trace.live
        on_card = launching_on(_card(), lambda *_: None)
        implemented = on_card if backend == "triton" else dispatch.computed_as_on("cpu")
        with implemented, trace:
            OPDEFS[name]._init_fn(*args, **kwargs)
        return trace.peak.bytes - given


@cache
def _launches(name: str, leaves: tuple[Any, ...], structure: Any) -> Counter[str]:
    found: Counter[str] = Counter()

    def count(kernel: Any, args: Any, kwargs: Any) -> None:
        found["custom"] += 1

    with unset_fake_temporarily(), torch.no_grad():
        given, keywords = _given(leaves, structure)
        with launching_on(_card(), count), _Operations(found):
            OPDEFS[name]._init_fn(*given, **keywords)
    return found


def _given(leaves: tuple[Any, ...], structure: Any) -> tuple[Any, Any]:
    """Arguments with tensors without memory."""
    made = [_without_memory(x) if isinstance(x, Like) else x for x in leaves]
    args, kwargs = tree_unflatten(made, structure)
    return args, kwargs


def _without_memory(like: Like) -> Tensor:
    return torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device="meta")


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in OPDEFS:  # one of ours calls another
            self.counts.update(launches_of(func, args, kwargs or {}))
        elif (kind := kind_of(func)) != "view":
            self.counts[kind] += 1
        return func(*args, **(kwargs or {}))


Launched = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
"""Gets a kernel and what it is launched with."""


@contextmanager
def launching_on(card: Card, launched: Launched) -> Iterator[None]:
    """Within, operations take their tensors for ones on this card, and kernels of Triton are given to
    `launched` and not run."""
    from triton.runtime.jit import KernelInterface  # absent on some machines

    def at(kernel: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: launched(kernel, args, kwargs)

    def backend_of(q: Tensor, k: Tensor, mask: Tensor | None) -> attention_dispatch.Backend:
        case = attention_dispatch.Case(
            arch=card.arch,
            dtype=q.dtype,
            num_queries=q.shape[1],
            num_keys=k.shape[1],
            num_heads=q.shape[2],
            width=q.shape[3],
            is_masked=mask is not None,
        )
        return attention_dispatch.choose(case, card.backends)

    answers = {
        dispatch.arch: lambda device: card.arch,
        dispatch.num_processors: lambda device: card.processors,
        attention_dispatch.backend_of: backend_of,
    }
    with ExitStack() as stack:
        stack.enter_context(dispatch.forced("triton"))
        stack.enter_context(mock.patch.object(KernelInterface, "__getitem__", at))
        for module in [m for n, m in sys.modules.items() if n.startswith("fasttune_kernels.")]:
            for asked, answer in answers.items():
                if vars(module).get(asked.__name__) is asked:
                    stack.enter_context(mock.patch.object(module, asked.__name__, answer))
        yield
