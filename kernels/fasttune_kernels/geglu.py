"""The GELU-gated linear unit of SDXL's feed-forward, after its projection: y * gelu(gate).

    y, gate = projected.chunk(2, dim=-1)        gelu(x) = x Phi(x), Phi the normal distribution's

with Phi by the error function, not its tanh approximation. Both halves are read where they are; the
backward computes gelu(gate) again, so that the projection is all that is kept.

Source: https://arxiv.org/abs/2002.05202
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def geglu_ref(projected: Tensor) -> Tensor:
    """(..., 2I) -> (..., I), in float32, or float64 if that is given."""
    if projected.dtype is not torch.float64:
        projected = projected.float()
    y, gate = projected.chunk(2, dim=-1)
    return y * gate * 0.5 * (1 + torch.erf(gate * 0.5**0.5))


@torch.library.custom_op("fasttune::geglu_forward", mutates_args=())
def geglu_forward(projected: Tensor) -> Tensor:
    """(..., 2I) -> (..., I): the first half times gelu of the second; contiguous."""
    y, gate = projected.chunk(2, dim=-1)
    return torch.mul(
        y, F.gelu(gate), out=torch.empty_like(y, memory_format=torch.contiguous_format)
    )


@torch.library.custom_op("fasttune::geglu_backward", mutates_args=())
def geglu_backward(dout: Tensor, projected: Tensor) -> Tensor:
    """dout (..., I), projected (..., 2I) -> dprojected (..., 2I), contiguous."""
    y, gate = projected.chunk(2, dim=-1)
    dprojected = torch.empty_like(projected, memory_format=torch.contiguous_format)
    dy, dgate = dprojected.chunk(2, dim=-1)
    torch.mul(dout, F.gelu(gate), out=dy)
    dgate.copy_(torch.ops.aten.gelu_backward(dout * y, gate))
    return dprojected


@geglu_forward.register_fake
def _(projected: Tensor) -> Tensor:
    return projected.new_empty((*projected.shape[:-1], projected.shape[-1] // 2))


@geglu_backward.register_fake
def _(dout: Tensor, projected: Tensor) -> Tensor:
    return projected.new_empty(projected.shape)


def _save(ctx: FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: FunctionCtx, dout: Tensor) -> Tensor:
    (projected,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return geglu_backward(dout, projected)


geglu_forward.register_autograd(_differentiate, setup_context=_save)


def geglu(projected: Tensor) -> Tensor:
    """y * gelu(gate) of the halves y and gate of `projected`, with the exact gelu.

    (..., 2I) -> (..., I) in its dtype: float16, bfloat16, float32 or float64, computed in float32 at
    least. ValueError for other dtypes and an odd last dimension.
    """
    if not projected.is_floating_point() or projected.dtype.itemsize == 1:
        raise ValueError(
            f"geglu: projected is {projected.dtype}; give float16, bfloat16 or float32"
        )
    if projected.dim() == 0 or projected.shape[-1] % 2:
        raise ValueError(
            f"geglu: projected is {tuple(projected.shape)}; its last dimension has two halves, (..., 2I)"
        )
    return geglu_forward(projected)
