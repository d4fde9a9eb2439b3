"""FLOPs, bytes and launches of whatever runs inside, op by op, on real or fake tensors.

An op is one dispatched operation that is no view. It counts as one launch (a multi-tensor op may
take a few), reads its inputs and writes its outputs once, and takes the FLOPs of torch's counter:
2 a multiply-add in matrix products, convolutions and attention, none elsewhere. So the bytes are those
of eager PyTorch without caches: a fused kernel has fewer.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.roofline import OpCost
from benchmarks.static.kinds import kind_of

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# The counter of torch knows the attention kernels of GPUs alone.
_OWN: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(slots=True)
class Costs:
    """Sums over ops. `ops` has each for the roofline."""

    flops: int = 0
    bytes: int = 0
    launches: Counter[str] = field(default_factory=Counter)
    """By kind, views left out."""
    ops: list[OpCost] = field(default_factory=list)

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.ops + other.ops,
        )

    def times(self, count: int) -> "Costs":
        """The same, `count` times over."""
        launches = Counter({kind: n * count for kind, n in self.launches.items()})
        return Costs(self.flops * count, self.bytes * count, launches, self.ops * count)


class CountCosts(TorchDispatchMode):
    """Within, `costs` grows with every op."""

    def __init__(self) -> None:
        super().__init__()
        self.costs = Costs()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count(func, args, kwargs or {}, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        kind = kind_of(func)
        if kind == "view":
            return
        flops = flops_of(func, args, kwargs, result)
        read = _bytes((args, kwargs))
        written = _bytes((result, _overwritten(func, args, kwargs)))  # of both, each once
        c = self.costs
        c.flops += flops
        c.bytes += read + written
        c.launches[kind] += 1
        c.ops.append(OpCost(kind=kind, flops=flops, bytes=read + written, dtype=_dtype(args)))


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """FLOPs of one call; 0 for an op that is neither product, convolution nor attention."""
    packet = func._overloadpacket
    if packet in _OWN:
        return _OWN[packet](*args, **kwargs)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    return 0


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _overwritten(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments an op writes to, by its schema; in-place multi-tensor ops return nothing."""
    named = zip(func._schema.arguments, args, strict=False)
    given = [(a, value) for a, value in named] + [
        (a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs
    ]
    return [value for a, value in given if a.alias_info is not None and a.alias_info.is_write]


def _bytes(tree: Any) -> int:
    """Of each tensor once; an expanded one is as large as its memory."""
    found = {id(t): t for t in _tensors(tree)}
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in found.values())


def _dtype(args: Any) -> str:
    """Of the first floating tensor: what the product is computed in."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    for tensor in _tensors(args):
        if tensor.dtype in names:
            return names[tensor.dtype]
    return "fp32"
