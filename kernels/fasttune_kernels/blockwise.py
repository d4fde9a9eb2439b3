"""8-bit state in blocks of 256, https://arxiv.org/abs/2110.02861: a code for one of 256 values an element
and the largest magnitude of its block."""

from functools import cache

import torch
from torch import Tensor

from fasttune_kernels.arena import QUANTUM, read, round_bits, write
from fasttune_kernels.jit import jit, tl


@cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """(256,) float32, increasing: the values of 8-bit state over its block's largest magnitude, as
    bitsandbytes' create_dynamic_map. Seven decades, each with twice as many equal steps as the one
    below it, whose centres are the values; 0; and 1.
    """
    positive: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1)
        positive += (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    negative = [-value for value in reversed(positive)] if signed else []
    return torch.tensor([*negative, 0.0, *positive, 1.0], device=device)


@cache
def middles(signed: bool, device: torch.device) -> Tensor:
    """(255,) float32: the borders between the values."""
    values = dynamic_map(signed, device)
    return (values[1:] + values[:-1]) / 2


def quantize_blockwise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(n,) float32, n a multiple of 256 -> (n,) uint8 codes of the nearest values, and (n / 256,)
    float32 largest magnitudes. A block of zeros is zeros."""
    rows = x.view(-1, QUANTUM)
    absmax = rows.abs().amax(dim=1)
    scaled = rows / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, middles(signed, x.device))
    return codes.to(torch.uint8).view(-1), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """(n,) uint8 and (n / 256,) -> (n,) float32."""
    values = dynamic_map(signed, codes.device)[codes.int()]
    return values.view(-1, QUANTUM).mul_(absmax[:, None]).view(-1)


# -- the same inside of Triton kernels ---------------------------------------------------------------


@jit
def _dequantize(code, SIGNED: tl.constexpr):
    """uint8 -> the value of `dynamic_map`. With k counted from 1, the values of a decade are those with
    one exponent e of k = 2^e (1 + f), which makes the code a small float."""
    code = code.to(tl.int32)
    top: tl.constexpr = 7 if SIGNED else 8
    k = tl.abs(code - 127) if SIGNED else code + 1
    raw = k.to(tl.float32).to(tl.int32, bitcast=True)
    e = (raw >> 23) - 127
    mantissa = ((raw & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    half = ((126 - e) << 23).to(tl.float32, bitcast=True)  # 2^-e / 2
    decade = tl.exp2((e - (top - 1)).to(tl.float32) * 3.321928094887362)
    value = decade * (0.9 * (mantissa + half) - 0.8)
    value = tl.where(e == top, 1.0, value)
    if SIGNED:
        value = tl.where(code < 127, -value, value)
        return tl.where(k == 0, 0.0, value)
    return tl.where(k == 1, 0.0, value)


@jit
def _quantize(x, SIGNED: tl.constexpr):
    """The code of the value that is nearest to x, of magnitude at most 1. The cells of a decade are of
    equal width; 0.2 of its first cell are nearer to the decade below."""
    top: tl.constexpr = 7 if SIGNED else 8
    lowest: tl.constexpr = (
        0.175 if SIGNED else 0.125
    ) / 0.9  # half of the smallest value, in cells
    size = tl.abs(x)
    # A float's bits are its logarithm but for at most 0.09 of an octave that are missing: the decade
    # is the right one, or the one below.
    octaves = size.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920928955078125e-07 - 127.0
    decade = tl.floor(octaves * 0.30102999566398120) + 1.0
    decade = tl.minimum(tl.maximum(decade, -6.0), 0.0)
    y = size * tl.exp2(decade * -3.321928094887362)
    carry = (y >= 1.0) & (decade < 0.0)
    y = tl.where(carry, y * 0.1, y)
    e = decade.to(tl.int32) + (top - 1) + carry.to(tl.int32)
    cells = ((e + 127) << 23).to(tl.float32, bitcast=True)  # 2^e
    t = (y - 0.1) * (cells * (1 / 0.9))
    k = (cells + tl.minimum(tl.maximum(t, 0.0), cells - 0.5)).to(tl.int32)
    k -= (t < tl.where(e == top - 7, lowest, 0.2)).to(tl.int32)
    k = tl.where((e == top - 1) & (t >= cells - 0.25), 1 << top, k)
    if SIGNED:  # there is no -1
        code = tl.where(x < 0.0, 127 - tl.minimum(k, 127), 127 + k)
    else:
        code = k - 1
    return code.to(tl.uint8)


@jit
def load_state(
    ptr, absmax_ptr, at, block, mask, present, MASKED: tl.constexpr, SIGNED: tl.constexpr
):
    """(ROWS, 256) float32."""
    if absmax_ptr is None:
        x = read(ptr + at, mask, MASKED)
    else:
        if MASKED:
            code = tl.load(ptr + at, mask=mask, other=0)
        else:
            code = tl.load(ptr + at)
        x = _dequantize(code, SIGNED) * read(absmax_ptr + block, present, MASKED)[:, None]
    return x


@jit
def store_state(
    ptr, absmax_ptr, at, block, x, bits, mask, present, MASKED: tl.constexpr, SIGNED: tl.constexpr
):
    if absmax_ptr is not None:
        absmax = tl.max(tl.abs(x), axis=1)
        scaled = x * (1.0 / tl.maximum(absmax, 1e-37))[:, None]
        if MASKED:
            tl.store(ptr + at, _quantize(scaled, SIGNED), mask=mask)
        else:
            tl.store(ptr + at, _quantize(scaled, SIGNED))
        write(absmax_ptr + block, absmax, present, MASKED)
    else:
        if ptr.dtype.element_ty == tl.bfloat16:
            x = round_bits(x, bits)
        write(ptr + at, x, mask, MASKED)
