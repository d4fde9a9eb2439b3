"""What becomes of each tensor that a block keeps for its backward.

A fused block names what it keeps ("qkv", "mlp", "attention", ...). A `Policy` says of each name

    save        as it is
    int8        one scale for `GROUP` neighbours, half the bytes; the backward works with the rounded values
    offload     in host memory, copied beside the computation (offload.py; where the device is the host, it
                is there already)
    recompute   not at all: the backward computes it again from what there is

and so the kept set is data that a user writes and a planner can solve for. Statistics and other small
tensors have no name in the policy and are saved.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fasttune_kernels.quantize_rows import dequantize_rows, quantize_rows

Choice = Literal["save", "int8", "offload", "recompute"]
CHOICES: tuple[Choice, ...] = get_args(Choice)

# What a choice does, so that one that does both is a word more.
_ROUNDED: frozenset[Choice] = frozenset({"int8"})
_MOVED: frozenset[Choice] = frozenset({"offload"})

_CODES, _SCALES = ".codes", ".scales"

GROUP = 128
"""Elements that share a scale in int8: 3 % more bytes than with one for a token, whose largest channel would
leave little to the others, in other heads and neurons. The worst gradient of a block, all tensors
rounded, has an SQNR of 31 to 36 dB where heads and channels are uneven, 16 to 23 with a scale for
a token; where they are even, 28 to 37 and 25 to 35 (benchmarks/int8_saves.py). 64 would give 1 to 3 dB
more for another 3 %. What is left in Flux is attention's output: of the gradients of queries and keys
its rounding takes up to 9 dB, which "recompute" for it gives back."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A choice for each name, and one for the names that it does not mention."""

    default: Choice = "save"
    choices: Mapping[str, Choice] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Choice:
        return self.choices.get(name, self.default)


def policy_of(activations: Choice | Mapping[Any, Choice]) -> Policy:
    """The policy of one choice for all, or of a table whose "default" is for what it leaves out."""
    if isinstance(activations, str):
        return Policy(activations)
    choices = {name: choice for name, choice in activations.items() if name != "default"}
    return Policy(activations.get("default", "save"), choices)


def pack(tensors: Mapping[str, Tensor], named: frozenset[str], policy: Policy) -> dict[str, Tensor]:
    """What is kept of `tensors` under the policy; of those not in `named`, all as it is."""
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        choice = _choice(name, named, policy)
        if choice in _ROUNDED:
            codes, kept[name + _SCALES] = quantize_rows(_groups(tensor))
            kept[name + _CODES] = _ungrouped(codes, tensor)
        elif choice != "recompute":
            kept[name] = tensor
    return kept


def _groups(x: Tensor) -> Tensor:
    """x (B, N, ...) as (B, groups, `GROUP`), of neighbours in memory: a view of a dense tensor. Groups are
    of 64 where 128 does not divide what a token has, and else all that it has."""
    rows = _as_in_memory(x).flatten(2)
    width = rows.shape[2]
    size = next((size for size in (GROUP, GROUP // 2) if width and width % size == 0), width)
    return rows.reshape(len(rows), -1, size) if size else rows


def _ungrouped(groups: Tensor, like: Tensor) -> Tensor:
    """The groups of a tensor in its shape and memory format."""
    found = groups.view(_as_in_memory(like).shape)
    return found.permute(0, 3, 1, 2) if _is_channels_last(like) else found


def _as_in_memory(x: Tensor) -> Tensor:
    """Feature maps with channels innermost, (B, H, W, C), if that is how they lie."""
    return x.permute(0, 2, 3, 1) if _is_channels_last(x) else x


def _is_channels_last(x: Tensor) -> bool:
    dense = x.is_contiguous()  # attention's (B, N, H, E) among others
    return x.ndim == 4 and not dense and x.is_contiguous(memory_format=torch.channels_last)


def moved(kept: Iterable[str], named: frozenset[str], policy: Policy) -> frozenset[str]:
    """Those of the keys of `pack` whose tensors are to wait in host memory."""
    return frozenset(key for key in kept if _choice(key, named, policy) in _MOVED)


def _choice(key: str, named: frozenset[str], policy: Policy) -> Choice:
    """Of a tensor, or a part of it: "mlp", "mlp/text" and "mlp.codes" go by the name "mlp"."""
    name = key.partition("/")[0].partition(".")[0]
    return policy[name] if name in named else "save"


class Kept:
    """What `pack` kept, by name. Inside a compiled function all questions are answered while tracing."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._tensors = dict(tensors)
        self._dtype = dtype

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name + _CODES in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        """The tensor; of int8 rows a new one each time. KeyError if it was not kept."""
        if name in self._tensors:
            return self._tensors[name]
        codes, scales = self._tensors[name + _CODES], self._tensors[name + _SCALES]
        return _ungrouped(dequantize_rows(_groups(codes), scales, self._dtype), codes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)
