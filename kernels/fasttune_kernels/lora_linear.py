"""A linear layer with low-rank adapters, as one operation: y = x W^T + b + s (dropout(x) A^T) B^T.

Several targets that share an input, such as q, k, v and the MLP's projection, are one weight matrix and
one product; `slices` says which outputs each of them has. The input's channels may lie in two buffers,
so that the concatenation [attention | gelu(mlp)] that Flux's proj_out reads is never made.

With dlow = dy B, which has R columns, the backward is
    dB = s dy^T low        dA = s dlow^T dropout(x)        dx = dy W + s dropout'(dlow A)
and kept are the input, which dA needs, and low = dropout(x) A^T. The mask of the dropout is a function of
seed, token and channel: it is computed again where it is needed, the same on every implementation.

M tokens (all leading dimensions), K = K1 + K2 input channels, O output channels, P of them adapted, r
rank, R = r times the number of targets.

Source: https://arxiv.org/abs/2106.09685, and https://arxiv.org/abs/2510.00206 for what is fused
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B1, 0x7FEB352D, 0x846CA68B


def dropout_mask(seed: Tensor, rows: int, begin: int, end: int, dropout: float) -> Tensor:
    """(rows, end - begin) bool: which channels of which tokens are kept. seed (1,) int64.

    A hash of 32 bits (lowbias32, https://nullprogram.com/blog/2018/07/31/) of the channel with two keys
    of the row and the seed, compared with the probability. No generator has to be set, so that nothing
    waits for a seed on the device, and the kernels compute the same bits.
    """
    low, high = seed.view(torch.int32).unbind()
    key = _mixed(_mixed(low ^ _signed(_GOLDEN)) ^ high)
    row = _mixed(torch.arange(rows, dtype=torch.int32, device=seed.device) + key)
    column = torch.arange(begin, end, dtype=torch.int32, device=seed.device)
    bits = (column * _signed(_GOLDEN)) ^ row[:, None]
    return _mixed(bits, _mixed(row ^ key)[:, None]) >= mask_threshold(dropout)


def mask_threshold(dropout: float) -> int:
    """The int32 from which on a hash keeps its element."""
    return min(round(dropout * 2**32), 2**32 - 1) - 2**31


def _mixed(bits: Tensor, key: Tensor | int = 0) -> Tensor:
    bits = (bits ^ ((bits >> 16) & 0xFFFF)).mul_(_MIX_1).add_(key)
    bits = bits.bitwise_xor_((bits >> 15) & 0x1FFFF).mul_(_signed(_MIX_2))
    return bits.bitwise_xor_((bits >> 16) & 0xFFFF)


def _signed(bits: int) -> int:
    return bits - (bits >> 31 << 32)


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
    dtype = _wide(x)
    x = (x if x2 is None else torch.cat([x, x2], dim=-1)).to(dtype)
    y = torch.nn.functional.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    if lora_A is None or lora_B is None:
        return y
    if seed is not None and dropout > 0:
        rows = math.prod(x.shape[:-1])
        x = x * dropout_mask(seed, rows, 0, x.shape[-1], dropout).view_as(x) / (1 - dropout)
    updates = torch.zeros_like(y)
    row, rank = 0, lora_B.shape[1]
    for target, (begin, end) in enumerate(_pairs(slices or [0, len(weight)])):
        A = lora_A[target * rank : (target + 1) * rank].to(dtype)
        B = lora_B[row : row + end - begin].to(dtype)
        updates[..., begin:end] = scale * (x @ A.T) @ B.T
        row += end - begin
    return y + updates


def _pairs(slices: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(slices[::2], slices[1::2], strict=True))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _matrix(x: Tensor) -> Tensor:
    """(..., D) as (M, D) with rows that do not overlap: a view where strides allow it."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride() == (max(x.stride(0), x.shape[1]), 1) else x.contiguous()


def base_product(x: Tensor, x2: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[x | x2] W^T + b of matrices: the vendor's product. Together with `base_product_backward` all that
    reads the base weights outside of our own kernels, for quantized forms to replace."""
    width = x.shape[1]
    first = weight if x2 is None else weight[:, :width]
    y = torch.mm(x, first.t()) if bias is None else torch.addmm(bias, x, first.t())
    return y if x2 is None else y.addmm_(x2, weight[:, width:].t())


def base_product_backward(
    dy: Tensor, weight: Tensor, begin: int, end: int, residual: Tensor | None
) -> Tensor:
    """dy W + residual, for the input channels from begin to end."""
    weight = weight[:, begin:end]
    return torch.mm(dy, weight) if residual is None else torch.addmm(residual, dy, weight)


@torch.library.custom_op("fasttune::lora_linear_forward", mutates_args=())
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
    x, x2 = _matrix(x), None if x2 is None else _matrix(x2)
    y = base_product(x, x2, weight, bias)
    if lora_A is None or lora_B is None:
        return y.view(*shape, -1), x.new_empty(0)
    low = x.new_empty(len(x), len(lora_A))
    keep = 1.0 if seed is None else 1 - dropout
    for buffer, begin, end in _buffers(x, x2):
        part, A = _dropped(buffer, seed, begin, end, dropout), lora_A[:, begin:end].t()
        torch.addmm(low, part, A, beta=float(begin > 0), alpha=1 / keep, out=low)
    for begin, end, ranks, rows in _targets(slices, lora_B.shape[1]):
        y[:, begin:end].addmm_(low[:, ranks], lora_B[rows].t(), alpha=scale)
    return y.view(*shape, -1), low.view(*shape, -1)


@torch.library.custom_op("fasttune::lora_linear_backward", mutates_args=())
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
    dy2 = _matrix(dy)
    reads_x = wants_weight or lora_A is not None
    x_shape, x2_shape = x.shape, None if x2 is None else x2.shape
    widths = [x.shape[-1]] + ([] if x2 is None else [x2.shape[-1]])
    x = _matrix(x) if reads_x else x
    x2 = _matrix(x2) if reads_x and x2 is not None else x2
    dA, dB = dy.new_empty(0), dy.new_empty(0)
    dlow = None
    if lora_A is not None and lora_B is not None:
        dlow = dy.new_empty(len(dy2), len(lora_A))
        low, dB = low.view(len(dy2), -1), torch.empty_like(lora_B)
        for begin, end, ranks, rows in _targets(slices, lora_B.shape[1]):
            torch.mm(dy2[:, begin:end], lora_B[rows], out=dlow[:, ranks])
            torch.mm(dy2[:, begin:end].t(), low[:, ranks], out=dB[rows])
        dB = dB.to(_wide(dy)).mul_(scale)
        keep = 1.0 if seed is None else 1 - dropout
        dA = torch.empty_like(lora_A)
        for buffer, begin, end in _buffers(x, x2):
            part = _dropped(buffer, seed, begin, end, dropout)
            torch.mm(dlow.t(), part, out=dA[:, begin:end])
        dA = dA.to(_wide(dy)).mul_(scale / keep)
    dinputs = []
    begin = 0
    for width in widths if wants_x else []:
        end = begin + width
        added = _matrix(residual) if residual is not None and begin == 0 else None
        dx = base_product_backward(dy2, weight, begin, end, added)
        if dlow is not None and lora_A is not None:
            if seed is None:
                dx.addmm_(dlow, lora_A[:, begin:end], alpha=scale)
            else:
                update = _dropped(torch.mm(dlow, lora_A[:, begin:end]), seed, begin, end, dropout)
                dx.add_(update, alpha=scale / keep)
        dinputs.append(dx)
        begin = end
    dx = dinputs[0].view(x_shape) if dinputs else dy.new_empty(0)
    dx2 = (
        dinputs[1].view(x2_shape) if len(dinputs) > 1 and x2_shape is not None else dy.new_empty(0)
    )
    dweight = dy.new_empty(0)
    if wants_weight:
        dweight = torch.empty_like(weight)
        for buffer, begin, end in _buffers(x, x2):
            torch.mm(dy2.t(), buffer, out=dweight[:, begin:end])
    dbias = dy2.sum(dim=0, dtype=_wide(dy)) if wants_bias else dy.new_empty(0)
    return dx, dx2, dweight, dbias, dA, dB


def _buffers(x: Tensor, x2: Tensor | None) -> list[tuple[Tensor, int, int]]:
    """Each matrix of the input with its channels."""
    width = x.shape[1]
    return [(x, 0, width)] + ([] if x2 is None else [(x2, width, width + x2.shape[1])])


def _targets(slices: Sequence[int], rank: int) -> list[tuple[int, int, slice, slice]]:
    """Outputs of each target, from begin to end, its columns of low and its rows of lora_B."""
    found, row = [], 0
    for target, (begin, end) in enumerate(_pairs(slices)):
        ranks = slice(target * rank, (target + 1) * rank)
        found.append((begin, end, ranks, slice(row, row + end - begin)))
        row += end - begin
    return found


def _dropped(x: Tensor, seed: Tensor | None, begin: int, end: int, dropout: float) -> Tensor:
    """x (M, end - begin) with zeros where the mask has them, not yet divided by 1 - dropout."""
    if seed is None:
        return x
    return torch.where(dropout_mask(seed, len(x), begin, end, dropout), x, 0)


@lora_linear_forward.register_fake
def _(
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
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if lora_A is None:
        return y, x.new_empty(0)
    return y, x.new_empty((*x.shape[:-1], lora_A.shape[0]))


@lora_linear_backward.register_fake
def _(
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
    def empty(like: Tensor | None, wanted: bool, dtype: torch.dtype | None = None) -> Tensor:
        return dy.new_empty(like.shape if like is not None and wanted else 0, dtype=dtype)

    wide = _wide(dy)
    dbias = dy.new_empty(weight.shape[0] if wants_bias else 0, dtype=wide if wants_bias else None)
    adapted = lora_A is not None
    return (
        empty(x, wants_x),
        empty(x2, wants_x),
        empty(weight, wants_weight),
        dbias,
        empty(lora_A, True, wide if adapted else None),
        empty(lora_B, True, wide if adapted else None),
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
    if len(slices) % 2 or bounds != sorted(bounds) or any(a == b for a, b in _pairs(slices)):
        raise ValueError(
            f"lora_linear: slices {slices} of {outputs} outputs; give begin, end, begin, end, ..., increasing"
        )
    if lora_A is not None and lora_B is not None:
        adapted = sum(end - begin for begin, end in _pairs(slices))
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
