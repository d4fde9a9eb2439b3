"""FLOPs, bytes and launches of whatever runs inside, op by op, on real or fake tensors.

An op is one dispatched operation that is no view. It counts as one launch (a multi-tensor op may take a
few; of fasttune's own, own_launches.py finds how many), reads its inputs and writes its outputs once, and takes the FLOPs of
torch's counter: 2 a multiply-add in matrix products, convolutions and attention, none elsewhere. Those
of fasttune's own are in FLOPS. So the bytes are those of eager execution without caches; what an op
writes and reads again for itself is left out.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.roofline import OpCost
from benchmarks.static.kinds import is_own, kind_of
from benchmarks.static.own_launches import launches_of
from fasttune_kernels.attention import backward_flops, forward_flops

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# The counter of torch knows the attention kernels of GPUs alone.
_CPU: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


Named = Mapping[str, Any]
"""The arguments of a call by their names."""


def _tokens(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _low_rank(a: Named) -> tuple[int, int]:
    """Multiply-adds a token in a product with all of lora_A, and in one with all of lora_B."""
    lora_A, lora_B = a["lora_A"], a["lora_B"]
    return (0, 0) if lora_A is None else (lora_A.numel(), lora_B.numel())


def _lora_linear(a: Named) -> int:
    return 2 * _tokens(a["x"]) * (a["weight"].numel() + sum(_low_rank(a)))


def _lora_linear_backward(a: Named) -> int:
    """dlow and dlora_B of dy, dlora_A of the input; dx of dy and of dlow; dweight."""
    down, up = _low_rank(a)
    per_token = 2 * up + down
    per_token += a["wants_x"] * (a["weight"].numel() + down)
    per_token += a["wants_weight"] * a["weight"].numel()
    return 2 * _tokens(a["dy"]) * per_token


FLOPS: dict[str, Callable[[Named], int]] = {
    "fasttune::attention_forward": lambda a: forward_flops(a["q"].shape, a["k"].shape),
    "fasttune::attention_backward": lambda a: backward_flops(a["q"].shape, a["k"].shape),
    "fasttune::lora_linear_forward": _lora_linear,
    "fasttune::lora_linear_backward": _lora_linear_backward,
    "fasttune::lora_linear_backward_into": lambda a: _lora_linear_backward({**a, "wants_x": True}),
}
"""Of fasttune's operations that have products in them."""


def _unread(name: str, a: Named) -> tuple[str, ...]:
    """Arguments that are there for their shapes alone."""
    reads_input = a.get("lora_A") is not None or a.get("wants_weight")
    if name.startswith("fasttune::lora_linear_backward") and not reads_input:
        return "x", "x2"
    return ()


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
        given = named_arguments(func, args, kwargs)
        unread = _unread(func.name(), given)
        read = _bytes([value for name, value in given.items() if name not in unread])
        written = _bytes((result, _overwritten(func, args, kwargs)))  # of both, each once
        c = self.costs
        c.flops += flops
        c.bytes += read + written
        c.launches += launches_of(func, args, kwargs) if is_own(func) else Counter([kind])
        c.ops.append(OpCost(kind=kind, flops=flops, bytes=read + written, dtype=_dtype(args)))


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """FLOPs of one call; 0 for an op that is neither product, convolution nor attention."""
    packet = func._overloadpacket
    if func.name() in FLOPS:
        return FLOPS[func.name()](named_arguments(func, args, kwargs))
    if packet in _CPU:
        return _CPU[packet](*args, **kwargs)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    return 0


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def named_arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Those that were given, by the names of the op's schema."""
    names = [a.name for a in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _overwritten(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments an op writes to, by its schema; in-place multi-tensor ops return nothing."""
    given = named_arguments(func, args, kwargs)
    written = [a for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
    return [given[a.name] for a in written if a.name in given]


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
