"""The GELU-gated linear unit of SDXL's feed-forward, after its projection: y * gelu(gate).

    y, gate = projected.chunk(2, dim=-1)        gelu(x) = x Phi(x), Phi the normal distribution's

with Phi by the error function, not its tanh approximation. Both halves are read where they are; the
backward computes gelu(gate) again, so that the projection is all that is kept.

Source: https://arxiv.org/abs/2002.05202
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fasttune_kernels.dispatch import arch, custom_op, runs_triton
from fasttune_kernels.jit import jit, tl
from fasttune_kernels.launch import TARGETS, Launch


def geglu_ref(projected: Tensor) -> Tensor:
    """(..., 2I) -> (..., I), in float32, or float64 if that is given."""
    if projected.dtype is not torch.float64:
        projected = projected.float()
    y, gate = projected.chunk(2, dim=-1)
    return y * gate * 0.5 * (1 + torch.erf(gate * 0.5**0.5))


@dataclass(frozen=True, kw_only=True, slots=True)
class GegluConfig:
    """How the kernels launch. Not measured; the reasoning is in `from_heuristic`."""

    block: int
    """Columns of one row that a program computes."""
    num_warps: int

    @classmethod
    def from_heuristic(cls, width: int, itemsize: int, arch: str) -> "GegluConfig":
        """For I = `width`. A thread loads 16 bytes of each half, the widest load there is. 4 warps of at
        most 37 registers (58 on AMD) leave room for 1536 threads or more on a multiprocessor, so an
        H200 has 132 * 1536 * 32 bytes on their way, 6.5 MB; 4.8 TB/s at 700 ns of latency need 3.4.
        2 warps where 4 would leave threads of a row's last program without work.
        """
        wave = 64 if arch.startswith("gfx9") else 32
        row = wave * 16 // itemsize
        num_warps = 4 if width % (4 * row) == 0 else 2
        return cls(block=num_warps * row, num_warps=num_warps)

    @classmethod
    def by_target(cls, width: int) -> "list[tuple[tuple[str, ...], GegluConfig]]":
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
def _normal_cdf(x):
    # Phi(-|x|) = 2^p(|x|), p of degree 10 fitted to log2(erfc(|x| / sqrt(2)) / 2) on [0, 6] and falling
    # ever after. Within 3e-8 of the truth in float32, as 1 + erf is, and in the tail within 2e-5 of
    # the value, where 1 + erf cancels (at -5 one digit is left). libdevice's erf has a branch that the
    # threads of a warp disagree on, and the forward 388 instructions for a thread's 8 values on
    # sm_90; this one has 242, 30 a value. At 6 bytes a value an H200's 4.8 TB/s leave time for 36.
    a = tl.abs(x)
    p = -3.42014026e-08 * a + 9.85268571e-07
    p = p * a - 1.21675348e-05
    p = p * a + 8.2351813e-05
    p = p * a - 2.9570036e-04
    p = p * a + 2.40913341e-05
    p = p * a + 6.92816591e-03
    p = p * a - 5.24350554e-02
    p = p * a - 0.459221125
    p = p * a - 1.15110433
    tail = tl.exp2(p * a - 1.0)
    return tl.where(x < 0, tail, 1.0 - tail)


@jit
def _forward_kernel(
    projected_ptr, out_ptr, tokens, batch_stride, token_stride, width, BLOCK: tl.constexpr
):
    # One axis for rows and their blocks: the other axes of a grid end at 65535.
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    sample, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    y_ptr = projected_ptr + sample * batch_stride + token * token_stride
    y = tl.load(y_ptr + column, mask).to(tl.float32)
    gate = tl.load(y_ptr + width + column, mask).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * width + column, y * gate * _normal_cdf(gate), mask)


@jit
def _backward_kernel(
    dout_ptr,
    projected_ptr,
    dprojected_ptr,
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
    y_ptr = projected_ptr + sample * batch_stride + token * token_stride
    dy_ptr = dprojected_ptr + row.to(tl.int64) * 2 * width
    dout = tl.load(dout_ptr + column, mask).to(tl.float32)
    y = tl.load(y_ptr + column, mask).to(tl.float32)
    gate = tl.load(y_ptr + width + column, mask).to(tl.float32)
    cdf = _normal_cdf(gate)
    slope = cdf + gate * 0.3989422804 * tl.exp2(gate * gate * -0.7213475204)  # gelu'(gate)
    tl.store(dy_ptr + column, dout * gate * cdf, mask)
    tl.store(dy_ptr + width + column, dout * y * slope, mask)


def as_tokens(x: Tensor) -> Tensor:
    """(..., D) as (B, N, D) with a contiguous last dimension: a view where strides allow it."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    if x.dim() > 3:
        x = x.flatten(0, -3)
    return x[(None,) * (3 - x.dim())]


@custom_op("fasttune::geglu_forward")
def geglu_forward(projected: Tensor) -> Tensor:
    """(..., 2I) -> (..., I): the first half times gelu of the second; contiguous."""
    y, gate = projected.chunk(2, dim=-1)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    if not _launches(projected):
        return torch.mul(y, F.gelu(gate), out=out)
    x, width = as_tokens(projected), out.shape[-1]
    config = GegluConfig.from_heuristic(width, x.element_size(), arch(x.device))
    _forward_kernel[(out.numel() // width * -(-width // config.block),)](
        x, out, x.shape[1], x.stride(0), x.stride(1), width, BLOCK=config.block, **config.options()
    )
    return out


@custom_op("fasttune::geglu_backward")
def geglu_backward(dout: Tensor, projected: Tensor) -> Tensor:
    """dout (..., I), projected (..., 2I) -> dprojected (..., 2I), contiguous."""
    dprojected = torch.empty_like(projected, memory_format=torch.contiguous_format)
    if not _launches(projected):
        y, gate = projected.chunk(2, dim=-1)
        dy, dgate = dprojected.chunk(2, dim=-1)
        torch.mul(dout, F.gelu(gate), out=dy)
        dgate.copy_(torch.ops.aten.gelu_backward(dout * y, gate))
        return dprojected
    x, dout, width = as_tokens(projected), as_tokens(dout), dout.shape[-1]
    config = GegluConfig.from_heuristic(width, x.element_size(), arch(x.device))
    _backward_kernel[(dout.numel() // width * -(-width // config.block),)](
        dout,
        x,
        dprojected,
        x.shape[1],
        dout.stride(0),
        dout.stride(1),
        x.stride(0),
        x.stride(1),
        width,
        BLOCK=config.block,
        **config.options(),
    )
    return dprojected


def _launches(x: Tensor) -> bool:
    return runs_triton(x) and x.dtype is not torch.float64 and x.numel() > 0


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


_SIZES = dict.fromkeys(("tokens", "batch_stride", "token_stride", "width"), "i32")
_FORWARD = {"projected_ptr": "*bf16", "out_ptr": "*bf16", **_SIZES}
_BACKWARD = {
    "dout_ptr": "*bf16",
    "projected_ptr": "*bf16",
    "dprojected_ptr": "*bf16",
    "dout_batch_stride": "i32",
    "dout_token_stride": "i32",
    **_SIZES,
}

# SD 1 and SDXL have widths of 320 to 1280 and an inner one four times as wide.
LAUNCHES = tuple(
    Launch(
        name=f"geglu_{name} I={width} bf16",
        kernel=kernel,
        signature=signature,
        constants={"BLOCK": config.block},
        aligned=tuple(signature),
        **config.options(),
        targets=targets,
    )
    for width in (2560, 5120)
    for targets, config in GegluConfig.by_target(width)
    for name, kernel, signature in (
        ("forward", lambda: _forward_kernel, _FORWARD),
        ("backward", lambda: _backward_kernel, _BACKWARD),
    )
)
