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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from benchmarks.static.kinds import kind_of
from benchmarks.static.stand_in import Like
from fasttune_kernels import attention_dispatch, dispatch

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


def launches_of(op: OpOverload, args: Any, kwargs: Any) -> Counter[str]:
    """By kind: "custom" are Triton kernels, all others operations of torch inside of ours. Of tensors only
    shapes, strides and dtypes are looked at. An operation without a body of Python is one launch."""
    if op.name() not in OPDEFS:
        return Counter([kind_of(op)])
    leaves, structure = tree_flatten((args, kwargs))
    described = tuple(Like.of(x) if isinstance(x, Tensor) else x for x in leaves)
    return Counter(_launches(op.name(), described, structure))


@cache
def _launches(name: str, leaves: tuple[Any, ...], structure: Any) -> Counter[str]:
    args, kwargs = tree_unflatten(
        [_without_memory(x) if isinstance(x, Like) else x for x in leaves], structure
    )
    found: Counter[str] = Counter()

    def count(kernel: Any, args: Any, kwargs: Any) -> None:
        found["custom"] += 1

    card = Card(arch=ARCH, processors=PROCESSORS, backends=BACKENDS)
    with launching_on(card, count), _Operations(found):
        OPDEFS[name]._init_fn(*args, **kwargs)
    return found


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
