"""GELU by its tanh approximation, the activation of Flux's feed-forwards.

    gelu(x) = x/2 (1 + tanh u) = x sigmoid(2u)        u = sqrt(2/pi) (x + 0.044715 x^3)

The backward computes it again from x, which is all that is kept. x may be the columns of a wider
projection.

Source: https://arxiv.org/abs/1606.08415
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def gelu_tanh_ref(x: Tensor) -> Tensor:
    """(..., I) -> (..., I), in float32, or float64 if that is given."""
    if x.dtype is not torch.float64:
        x = x.float()
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


@torch.library.custom_op("fasttune::gelu_tanh_forward", mutates_args=())
def gelu_tanh_forward(x: Tensor) -> Tensor:
    """(..., I) -> (..., I), contiguous."""
    return F.gelu(x, approximate="tanh").contiguous()


@torch.library.custom_op("fasttune::gelu_tanh_backward", mutates_args=())
def gelu_tanh_backward(dout: Tensor, x: Tensor) -> Tensor:
    """dout, x (..., I) -> dx (..., I), contiguous."""
    return torch.ops.aten.gelu_backward(dout, x, approximate="tanh").contiguous()


@gelu_tanh_forward.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@gelu_tanh_backward.register_fake
def _(dout: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: FunctionCtx, dout: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return gelu_tanh_backward(dout, x)


gelu_tanh_forward.register_autograd(_differentiate, setup_context=_save)


def gelu_tanh(x: Tensor) -> Tensor:
    """gelu(x) by the tanh approximation: (..., I) -> (..., I) in x's dtype, contiguous.

    float16, bfloat16, float32 or float64, computed in float32 at least; ValueError for others.
    """
    if not x.is_floating_point() or x.dtype.itemsize == 1:
        raise ValueError(f"gelu_tanh: x is {x.dtype}; give float16, bfloat16 or float32")
    return gelu_tanh_forward(x)
