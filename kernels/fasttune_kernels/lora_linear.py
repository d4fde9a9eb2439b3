"""A linear layer with low-rank adapters, as one operation: y = x W^T + b + s (dropout(x) A^T) B^T.

Several targets that share an input, such as q, k, v and the MLP's projection, are one weight matrix and
one product; `slices` says which outputs each of them has. The input's channels may lie in two buffers,
so that the concatenation [attention | gelu(mlp)] that Flux's proj_out reads is never made.

With dlow = dy B, which has R columns, the backward is
    dB = s dy^T low        dA = s dlow^T dropout(x)        dx = dy W + s dropout'(dlow A)
and kept are the input, which dA needs, and low = dropout(x) A^T. The mask of the dropout is a function of
seed, token and channel: it is computed again where it is needed, the same on every implementation.

What Triton's kernels read: low is a launch of its own, which reads x once more than the product does.
dy is read for dB and dlow together, again for dx, and above rank 32 once more, as dlow is then a product
of its own. On sm_90, sm_100, gfx942 and gfx950 the vendor makes the product and a second kernel adds the
rank-r product, which reads and writes y, and in the backward dx, once more.

M tokens (all leading dimensions), K = K1 + K2 input channels, O output channels, P of them adapted, r
rank, R = r times the number of targets.

Source: https://arxiv.org/abs/2106.09685, and https://arxiv.org/abs/2510.00206 for what is fused
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttune_kernels.dispatch import custom_op
from fasttune_kernels.lora_linear_products import (
    Adapters,
    adapters_of,
    as_matrix,
    base_product,
    buffers_of,
    dropout_mask,
    forward_by_torch,
    forward_by_triton,
    gradients_by_torch,
    gradients_by_triton,
    input_gradient,
    launches_kernels,
    pairs,
    wide_dtype,
)


def lora_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    slices: Sequence[int] | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    x2: Tensor | None = None,
) -> Tensor:
    """As `lora_linear`, in float32, or float64 if that is given."""
    dtype = wide_dtype(x)
    x = (x if x2 is None else torch.cat([x, x2], dim=-1)).to(dtype)
    y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    if lora_A is None or lora_B is None:
        return y
    if seed is not None and dropout > 0:
        rows = math.prod(x.shape[:-1])
        x = x * dropout_mask(seed, rows, 0, x.shape[-1], dropout).view_as(x) / (1 - dropout)
    updates = torch.zeros_like(y)
    row, rank = 0, lora_B.shape[1]
    for target, (begin, end) in enumerate(pairs(slices or [0, len(weight)])):
        A = lora_A[target * rank : (target + 1) * rank].to(dtype)
        B = lora_B[row : row + end - begin].to(dtype)
        updates[..., begin:end] = scale * (x @ A.T) @ B.T
        row += end - begin
    return y + updates


@custom_op("fasttune::lora_linear_forward")
def lora_linear_forward(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    slices: list[int],
    scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """-> y (..., O) and low (..., R) = dropout(x) A^T before the scale; contiguous.

    x (..., K1), x2 (..., K2), weight (O, K), bias (O,), lora_A (R, K), lora_B (P, r), all of one dtype;
    slices are begin and end of each target's outputs, in increasing order; seed (1,) int64. low is empty
    without adapters.
    """
    shape = x.shape[:-1]
    x, x2 = as_matrix(x), None if x2 is None else as_matrix(x2)
    adapters = adapters_of(lora_A, lora_B, slices, scale, dropout, seed)
    if adapters is None:
        y, low = base_product(x, x2, weight, bias), None
    elif launches_kernels(x):
        y, low = forward_by_triton(x, x2, weight, bias, adapters)
    else:
        y, low = forward_by_torch(x, x2, weight, bias, adapters)
    y = y.view(*shape, y.shape[1])
    return y, x.new_empty(0) if low is None else low.view(*shape, low.shape[1])


@custom_op("fasttune::lora_linear_backward")
def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    low: Tensor,
    slices: list[int],
    scale: float,
    dropout: float,
    seed: Tensor | None,
    residual: Tensor | None,
    wants_x: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dx (..., K1) plus residual, dx2 (..., K2), dweight (O, K) in its dtype, and in float32 dbias (O,),
    dlora_A (R, K) and dlora_B (P, r); empty where not wanted or not there.

    Without adapters and wants_weight nothing of x is read but its shape.
    """
    adapters = adapters_of(lora_A, lora_B, slices, scale, dropout, seed)
    wants = wants_x, wants_weight, wants_bias
    return _gradients(dy, x, x2, weight, adapters, low, residual, wants, None)


@custom_op("fasttune::lora_linear_backward_into", mutates_args=("dx",))
def lora_linear_backward_into(
    dx: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    low: Tensor,
    slices: list[int],
    scale: float,
    dropout: float,
    seed: Tensor | None,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`lora_linear_backward` of one buffer with its dx, (..., K), written where the caller wants it: into its part
    of a larger tensor, which then need not be joined. -> dweight, dbias, dlora_A, dlora_B.

    Products write rows that follow each other without a gap. In a larger tensor those of several samples
    do not, and are copied.
    """
    adapters = adapters_of(lora_A, lora_B, slices, scale, dropout, seed)
    wants = True, wants_weight, wants_bias
    _, _, *others = _gradients(dy, x, None, weight, adapters, low, None, wants, dx)
    dweight, dbias, dA, dB = others
    return dweight, dbias, dA, dB


def _gradients(
    dy: Tensor,
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    adapters: Adapters | None,
    low: Tensor,
    residual: Tensor | None,
    wants: tuple[bool, bool, bool],  # of input, weight and bias
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `lora_linear_backward` returns, with dx in `out` if given."""
    wants_x, wants_weight, wants_bias = wants
    shape, dy = dy.shape[:-1], as_matrix(dy)
    buffers = buffers_of(x, x2)
    if wants_weight or adapters is not None:
        buffers = [(as_matrix(buffer), begin, end) for buffer, begin, end in buffers]
    dlow, dA, dB = None, dy.new_empty(0), dy.new_empty(0)
    if adapters is not None:
        gradients = gradients_by_triton if launches_kernels(dy) else gradients_by_torch
        dlow, dA, dB = gradients(dy, buffers, as_matrix(low), adapters)
    dinputs = [dy.new_empty(0), dy.new_empty(0)]
    for i, (_, begin, end) in enumerate(buffers if wants_x else []):
        added = as_matrix(residual) if residual is not None and i == 0 else None
        place = _rows_of(out) if i == 0 else None
        dx = input_gradient(dy, weight, dlow, adapters, added, begin, end, place)
        dinputs[i] = dx.view(*shape, end - begin)
    if out is not None and _rows_of(out) is None:
        out.copy_(dinputs[0])
    dweight = torch.empty_like(weight) if wants_weight else dy.new_empty(0)
    for buffer, begin, end in buffers if wants_weight else []:
        torch.mm(dy.t(), buffer, out=dweight[:, begin:end])
    dbias = dy.sum(dim=0, dtype=wide_dtype(dy)) if wants_bias else dy.new_empty(0)
    return dinputs[0], dinputs[1], dweight, dbias, dA, dB


def _rows_of(x: Tensor | None) -> Tensor | None:
    """(..., K) as a contiguous (M, K) of the same memory; None if it is none."""
    return x.view(-1, x.shape[-1]) if x is not None and x.is_contiguous() and x.numel() else None


@lora_linear_forward.register_fake
def _(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    low = 0 if lora_A is None else (*x.shape[:-1], lora_A.shape[0])
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty(low)


@lora_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    def empty(shape: Sequence[int] | None, dtype: torch.dtype) -> Tensor:
        return dy.new_empty(0) if shape is None else dy.new_empty(shape, dtype=dtype)

    wants_x, wants_weight, wants_bias = arguments[-3:]
    return (
        empty(x.shape if wants_x else None, dy.dtype),
        empty(x2.shape if wants_x and x2 is not None else None, dy.dtype),
        empty(weight.shape if wants_weight else None, dy.dtype),
        empty(weight.shape[:1] if wants_bias else None, wide_dtype(dy)),
        empty(None if lora_A is None else lora_A.shape, wide_dtype(dy)),
        empty(None if lora_B is None else lora_B.shape, wide_dtype(dy)),
    )


@lora_linear_backward_into.register_fake
def _(
    dx: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    def empty(like: Tensor | None, dtype: torch.dtype) -> Tensor:
        return dy.new_empty(0) if like is None else dy.new_empty(like.shape, dtype=dtype)

    wants_weight, wants_bias = arguments[-2:]
    return (
        empty(weight if wants_weight else None, dy.dtype),
        empty(weight[:, 0] if wants_bias else None, wide_dtype(dy)),
        empty(lora_A, wide_dtype(dy)),
        empty(lora_B, wide_dtype(dy)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, x2, weight, _, lora_A, lora_B, slices, scale, dropout, seed = inputs
    wants_weight, wants_bias = ctx.needs_input_grad[2:4]
    keeps_input = wants_weight or lora_A is not None
    ctx.mark_non_differentiable(output[1])
    low = None if lora_A is None else output[1]
    kept = (x, x2) if keeps_input else (None, None)
    ctx.save_for_backward(*kept, weight, lora_A, lora_B, low, seed)
    ctx.widths = x.shape[-1], None if x2 is None else x2.shape[-1]
    ctx.settings = slices, scale, dropout
    ctx.wanted = any(ctx.needs_input_grad[:2]), wants_weight, wants_bias


def _differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, x2, weight, lora_A, lora_B, low, seed = ctx.saved_tensors
    if x is None:
        width, width2 = ctx.widths
        x = dy.new_empty(1).expand(*dy.shape[:-1], width)
        x2 = None if width2 is None else dy.new_empty(1).expand(*dy.shape[:-1], width2)
    low = dy.new_empty(0) if low is None else low
    gradients = lora_linear_backward(
        dy, x, x2, weight, lora_A, lora_B, low, *ctx.settings, seed, None, *ctx.wanted
    )
    needed = ctx.needs_input_grad
    dx, dx2, dweight, dbias, dA, dB = (
        gradient.to(dy.dtype) if is_needed else None
        for gradient, is_needed in zip(gradients, needed[:6], strict=True)
    )
    return dx, dx2, dweight, dbias, dA, dB, None, None, None, None


lora_linear_forward.register_autograd(_differentiate, setup_context=_save)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    slices: Sequence[int] | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    x2: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b + scale (dropout(x) A^T) B^T, for one or several targets that share their input.

    x is (..., K1) and x2 (..., K2) has further channels of the input, K = K1 + K2; weight (O, K), bias
    (O,). lora_A (R, K) and lora_B (P, r) stack the targets' matrices, R = r times their number; `slices`
    is begin and end of each target's outputs, (0, O) if not given. seed (1,) int64 on x's device decides
    the dropout's mask; without dropout it is not read. Returns (..., O). All are of one dtype: float16,
    bfloat16, float32 or float64; products are accumulated in float32 at least. ValueError otherwise.
    """
    slices = (
        list(slices) if slices is not None else [0, weight.shape[0]] if lora_A is not None else []
    )
    _check(x, weight, bias, lora_A, lora_B, slices, dropout, seed, x2)
    if dropout == 0 or lora_A is None:
        seed = None
    return lora_linear_forward(x, x2, weight, bias, lora_A, lora_B, slices, scale, dropout, seed)[0]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    slices: list[int],
    dropout: float,
    seed: Tensor | None,
    x2: Tensor | None,
) -> None:
    given = {"x": x, "x2": x2, "weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if len(set(dtypes.values())) > 1 or not x.is_floating_point() or x.dtype.itemsize == 1:
        raise ValueError(f"lora_linear: {dtypes}; give one of float16, bfloat16 and float32 to all")
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    outputs, channels = weight.shape if weight.dim() == 2 else (-1, -1)
    width2 = 0 if x2 is None or x2.dim() == 0 else x2.shape[-1]
    if (
        x.dim() == 0
        or x.shape[-1] + width2 != channels
        or (x2 is not None and x2.shape[:-1] != x.shape[:-1])
        or (bias is not None and bias.shape != (outputs,))
    ):
        raise ValueError(
            f"lora_linear: {shapes}; give x (..., K1), x2 (..., K2), weight (O, K1 + K2)"
        )
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_linear: give lora_A and lora_B, or neither")
    bounds = [0, *slices, outputs]
    if len(slices) % 2 or bounds != sorted(bounds) or any(a == b for a, b in pairs(slices)):
        raise ValueError(
            f"lora_linear: slices {slices} of {outputs} outputs; give begin, end, begin, end, ..., increasing"
        )
    if lora_A is not None and lora_B is not None:
        adapted = sum(end - begin for begin, end in pairs(slices))
        rank = lora_B.shape[-1]
        if lora_A.shape != (rank * len(slices) // 2, channels) or lora_B.shape != (adapted, rank):
            raise ValueError(
                f"lora_linear: {shapes}, slices {slices}; give lora_A (rank * targets, K) and lora_B"
                f" ({adapted}, rank)"
            )
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_linear: dropout {dropout}; give 0 <= dropout < 1")
    if (
        dropout > 0
        and lora_A is not None
        and (seed is None or seed.dtype != torch.int64 or seed.shape != (1,))
    ):
        raise ValueError("lora_linear: dropout needs a seed, (1,) int64")
