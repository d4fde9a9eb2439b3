"""Computation that is left out: outputs of the right shapes, made by nothing.

What runs around it, forward and backward, is as it would be; what is inside costs no time and starts
no kernel. Saved inputs are asked for in the backward, so recomputation takes place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Like:
    """What an output looks like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "Like":
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


def stand_in(outputs: Sequence[Like], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Uninitialised tensors like `outputs`, whose gradients reach every tensor of `inputs` that takes
    one, uninitialised too."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    made: tuple[Tensor, ...] = _Nothing.apply(tuple(outputs), *tensors)  # type: ignore[no-untyped-call]
    return made


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: tuple[Like, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        made = tuple(like.empty() for like in outputs)
        fixed = [x for x, like in zip(made, outputs, strict=True) if not like.requires_grad]
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)  # zeros in the place of absent gradients are a launch
        return made

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.empty_like(x) if needs else None for x, needs in needed)
