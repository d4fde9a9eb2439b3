"""qk_norm_rope by PyTorch's operations, of one buffer's q or k: (B, N, H, E), weight (E,), rotation
(N, 1, E / 2) complex."""

import torch
from torch import Tensor


def _rstd(x: Tensor, eps: float) -> Tensor:
    """(..., 1), in float32 at least; the norm squares bfloat16 without a float32 copy of it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()


def _turn_(x: Tensor, rotation: Tensor) -> Tensor:
    """Neighbouring pairs are complex numbers, whose product is the rotation: one pass, in place."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(rotation)
    return x


def norm_rotate(x: Tensor, weight: Tensor, rotation: Tensor, eps: float, out: Tensor) -> None:
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    torch.mul(x, _rstd(x, eps), out=y).mul_(weight)
    out.copy_(_turn_(y, rotation))


def norm_rotate_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rotation: Tensor, eps: float, dx: Tensor, dweight: Tensor
) -> None:
    """Writes dx, and dweight unless it is empty."""
    rstd = _rstd(x, eps)
    dz = torch.empty(dy.shape, dtype=rstd.dtype, device=dy.device).copy_(dy)
    _turn_(dz, rotation)
    product = torch.mul(dz, x).mul_(rstd)
    if dweight.numel():
        torch.sum(product, (0, 1, 2), out=dweight)
    mean = product.mul_(weight).mean(-1, keepdim=True)
    dx.copy_(dz.mul_(weight).addcmul_(x, mean.mul_(rstd), value=-1).mul_(rstd))
