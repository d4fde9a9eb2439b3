"""GELU by its tanh approximation, the activation of Flux's feed-forwards.

    gelu(x) = x/2 (1 + tanh u) = x sigmoid(2u)        u = sqrt(2/pi) (x + 0.044715 x^3)

The backward computes it again from x, which is all that is kept. x may be the columns of a wider
projection.

Source: https://arxiv.org/abs/1606.08415
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fasttune_kernels.dispatch import arch, custom_op, runs_triton
from fasttune_kernels.geglu import as_tokens
from fasttune_kernels.jit import jit, tl
from fasttune_kernels.launch import TARGETS, Launch


def gelu_tanh_ref(x: Tensor) -> Tensor:
    """(..., I) -> (..., I), in float32, or float64 if that is given."""
    if x.dtype is not torch.float64:
        x = x.float()
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


@dataclass(frozen=True, kw_only=True, slots=True)
class GeluTanhConfig:
    """How the kernels launch. Not measured; the reasoning is in `from_heuristic`."""

    block: int
    """Columns of one row that a program computes."""
    num_warps: int

    @classmethod
    def from_heuristic(cls, width: int, itemsize: int, arch: str) -> "GeluTanhConfig":
        """For I = `width`. A thread loads 16 bytes, the widest load there is. With 4 warps and the
        forward's 30 registers or less a multiprocessor holds 2048 threads, so an H200 has
        132 * 2048 * 16 bytes on their way, 4.3 MB; 4.8 TB/s at 700 ns of latency need 3.4. 2 warps
        where 4 would leave threads of a row's last program without work.
        """
        wave = 64 if arch.startswith("gfx9") else 32
        row = wave * 16 // itemsize
        num_warps = 4 if width % (4 * row) == 0 else 2
        return cls(block=num_warps * row, num_warps=num_warps)

    @classmethod
    def by_target(cls, width: int) -> "list[tuple[tuple[str, ...], GeluTanhConfig]]":
        """(targets, config) for bfloat16: targets of one config together."""
        configs = {target: cls.from_heuristic(width, 2, target) for target in TARGETS}
        return [
            (tuple(target for target in TARGETS if configs[target] == config), config)
            for config in dict.fromkeys(configs.values())
        ]

    def options(self) -> dict[str, Any]:
        """The compiler's. One load a thread leaves nothing to pipeline, so there is one stage."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


@jit
def _exp_minus_2u(x):
    # Neither end cancels, as 1 + tanh does from x = -4 on. The bound keeps e * sigmoid^2 from being
    # infinity times 0; sigmoid is 1e-38 there, at x = -10.
    return tl.exp2(tl.minimum(x * (-2.302208198 - 0.1029432396 * x * x), 126.0))


@jit
def _forward_kernel(x_ptr, out_ptr, tokens, batch_stride, token_stride, width, BLOCK: tl.constexpr):
    # One axis for rows and their blocks: the other axes of a grid end at 65535.
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    sample, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    x_ptr += sample * batch_stride + token * token_stride
    x = tl.load(x_ptr + column, mask).to(tl.float32)
    out = x / (1.0 + _exp_minus_2u(x))
    tl.store(out_ptr + row.to(tl.int64) * width + column, out, mask)


@jit
def _backward_kernel(
    dout_ptr,
    x_ptr,
    dx_ptr,
    tokens,
    dout_batch_stride,
    dout_token_stride,
    batch_stride,
    token_stride,
    width,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    sample, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    dout_ptr += sample * dout_batch_stride + token * dout_token_stride
    x_ptr += sample * batch_stride + token * token_stride
    dout = tl.load(dout_ptr + column, mask).to(tl.float32)
    x = tl.load(x_ptr + column, mask).to(tl.float32)
    e = _exp_minus_2u(x)
    sigmoid = 1.0 / (1.0 + e)
    # x d sigmoid(2u) / dx = x sigmoid(2u) sigmoid(-2u) d(2u) / dx
    slope = x * (e * sigmoid) * sigmoid * (1.5957691216 + 0.2140644385 * x * x)
    tl.store(dx_ptr + row.to(tl.int64) * width + column, dout * (sigmoid + slope), mask)


@custom_op("fasttune::gelu_tanh_forward")
def gelu_tanh_forward(x: Tensor) -> Tensor:
    """(..., I) -> (..., I), contiguous."""
    if not _launches(x):
        return F.gelu(x, approximate="tanh").contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, width = as_tokens(x), x.shape[-1]
    config = GeluTanhConfig.from_heuristic(width, x.element_size(), arch(x.device))
    _forward_kernel[(out.numel() // width * -(-width // config.block),)](
        x, out, x.shape[1], x.stride(0), x.stride(1), width, BLOCK=config.block, **config.options()
    )
    return out


@custom_op("fasttune::gelu_tanh_backward")
def gelu_tanh_backward(dout: Tensor, x: Tensor) -> Tensor:
    """dout, x (..., I) -> dx (..., I), contiguous."""
    if not _launches(x):
        return torch.ops.aten.gelu_backward(dout, x, approximate="tanh").contiguous()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, dout, width = as_tokens(x), as_tokens(dout), x.shape[-1]
    config = GeluTanhConfig.from_heuristic(width, x.element_size(), arch(x.device))
    _backward_kernel[(dx.numel() // width * -(-width // config.block),)](
        dout,
        x,
        dx,
        x.shape[1],
        dout.stride(0),
        dout.stride(1),
        x.stride(0),
        x.stride(1),
        width,
        BLOCK=config.block,
        **config.options(),
    )
    return dx


def _launches(x: Tensor) -> bool:
    return runs_triton(x) and x.dtype is not torch.float64 and x.numel() > 0


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

    float16, bfloat16, float32 or float64, computed in float32 at least; ValueError for others and
    without a dimension.
    """
    if x.dim() == 0:
        raise ValueError("gelu_tanh: x has no dimension; give (..., I)")
    if not x.is_floating_point() or x.dtype.itemsize == 1:
        raise ValueError(f"gelu_tanh: x is {x.dtype}; give float16, bfloat16 or float32")
    return gelu_tanh_forward(x)


_SIZES = dict.fromkeys(("tokens", "batch_stride", "token_stride", "width"), "i32")
_FORWARD = {"x_ptr": "*bf16", "out_ptr": "*bf16", **_SIZES}
_BACKWARD = {
    "dout_ptr": "*bf16",
    "x_ptr": "*bf16",
    "dx_ptr": "*bf16",
    "dout_batch_stride": "i32",
    "dout_token_stride": "i32",
    **_SIZES,
}

# Flux: 4 * 3072.
LAUNCHES = tuple(
    Launch(
        name=f"gelu_tanh_{name} I=12288 bf16",
        kernel=kernel,
        signature=signature,
        constants={"BLOCK": config.block},
        aligned=tuple(signature),
        **config.options(),
        targets=targets,
    )
    for targets, config in GeluTanhConfig.by_target(12288)
    for name, kernel, signature in (
        ("forward", lambda: _forward_kernel, _FORWARD),
        ("backward", lambda: _backward_kernel, _BACKWARD),
    )
)
