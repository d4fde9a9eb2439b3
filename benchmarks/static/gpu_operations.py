"""Operations that are one kernel on a GPU, for networks on fake CPU tensors that stand for one.

torch takes RMSNorm apart on the CPU, with float32 copies of its input, and has a kernel for it on
GPUs (`_fused_rms_norm`). Memory, bytes and launches counted on the CPU would be of the former.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttune.models.layers import RMSNorm


@contextmanager
def as_on_gpu(network: nn.Module) -> Iterator[None]:
    """Within, the RMSNorm layers of `network` are one operation in each direction, which keeps its
    input and the inverse norms for the backward, as the kernel does."""
    layers = [module for module in network.modules() if type(module) is RMSNorm]
    for layer in layers:
        layer.__class__ = _OneOperation
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = RMSNorm


class _OneOperation(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        assert self.elementwise_affine and self.eps is not None
        return rms_norm(x, self.weight.to(x.dtype), self.eps)[0]


@torch.library.custom_op("fasttune_benchmarks::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., N), weight (N,) -> normalised x in its dtype, inverse norms (..., 1) float32."""
    inverse = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return F.rms_norm(x, weight.shape, weight, eps), inverse


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("fasttune_benchmarks::rms_norm_backward", mutates_args=())
def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, which is empty unless asked for."""
    normalised, by_normalised = x.float() * inverse, gradient.float() * weight.float()
    along = (by_normalised * normalised).mean(-1, keepdim=True)
    by_x = inverse * (by_normalised - normalised * along)
    by_weight = (gradient.float() * normalised).flatten(0, -2).sum(0)
    return by_x.to(x.dtype), by_weight.to(weight.dtype) if with_weight else weight.new_empty(0)


@_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, with_weight: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight) if with_weight else weight.new_empty(0)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, weight, inverse = ctx.saved_tensors
    with_weight = ctx.needs_input_grad[1]
    by_x, by_weight = _backward(gradient, x, weight, inverse, with_weight)
    return by_x, by_weight if with_weight else None, None


rms_norm.register_autograd(_gradients, setup_context=_save)
