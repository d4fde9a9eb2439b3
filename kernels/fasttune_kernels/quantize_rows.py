"""Rows of an activation in int8 with one scale each, and back: what a block keeps in half the bytes.

x (B, N, ...) is taken as B x N rows of W elements. Symmetric, to nearest: scale = amax / 127 of the row,
|error| <= scale / 2. Per row because an activation's outliers sit in rows of their own (padding tokens,
the first text token): one scale for the whole tensor would leave 3 bits to the others. Against a normal
row of 3072 the error is 41 dB down.

One pass each way: 1.5 times x's bytes, where PyTorch writes a float32 copy, its absolute value, the
quotients and their rounded form first (12 times, and 8 times x's bytes of memory).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune_kernels.dispatch import custom_op, runs_triton
from fasttune_kernels.jit import jit, next_power_of_2, tl, triton
from fasttune_kernels.launch import TARGETS, Launch

_CHUNK = 1 << 20
"""Elements that PyTorch quantizes at once, so that float32 copies stay small."""


def quantize_rows_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize_rows`, in x's own precision or float32."""
    rows = x.flatten(2)
    rows = rows if x.dtype == torch.float64 else rows.float()
    scales = rows.abs().amax(-1) / 127
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return (rows * inverse[..., None]).round().to(torch.int8).view(x.shape), scales.float()


@dataclass(frozen=True, slots=True)
class RowConfig:
    """A program takes `rows` rows; a row is read in blocks of `width`, twice if it has more than one."""

    rows: int
    width: int
    num_warps: int

    @classmethod
    def from_heuristic(cls, width: int) -> "RowConfig":
        """For rows of `width` elements.

        Up to 4096 elements a row stays in registers between the two uses (at 8 warps of 32 lanes, 16
        float32 a lane); longer ones (Flux's MLP, 12288) are read again from the L2 that they are in.
        Several short rows fill a program. By arithmetic; not measured.
        """
        block = min(next_power_of_2(width), 4096)
        return cls(max(1, 1024 // block), block, 8 if block >= 2048 else 4)


@jit
def _quantize(
    x_ptr,  # (rows, width), any distance between rows
    codes_ptr,  # (rows, width) int8
    scales_ptr,  # (rows,) float32
    num_rows,
    width,
    x_stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = row[:, None] < num_rows
    begin = row.to(tl.int64)[:, None]
    if ONE_BLOCK:
        mask = inside & (column[None, :] < width)
        x = tl.load(x_ptr + begin * x_stride + column[None, :], mask, 0.0).to(tl.float32)
        largest = _largest(_bits(x))
        inverse = 127.0 / tl.where(largest > 0, largest, 127.0)
        tl.store(codes_ptr + begin * width + column[None, :], _rounded(x, inverse), mask)
    else:
        found = tl.zeros((ROWS, WIDTH), tl.int32)
        for first in range(0, width, WIDTH):
            mask = inside & (first + column[None, :] < width)
            x = tl.load(x_ptr + begin * x_stride + first + column[None, :], mask, 0.0)
            found = tl.maximum(found, _bits(x))
        largest = _largest(found)
        inverse = 127.0 / tl.where(largest > 0, largest, 127.0)
        for first in range(0, width, WIDTH):
            mask = inside & (first + column[None, :] < width)
            x = tl.load(x_ptr + begin * x_stride + first + column[None, :], mask, 0.0)
            codes = _rounded(x.to(tl.float32), inverse)
            tl.store(codes_ptr + begin * width + first + column[None, :], codes, mask)
    tl.store(scales_ptr + row, largest / 127.0, row < num_rows)


@jit
def _bits(x):
    """Of magnitudes, which as integers have their order, with NaN above all: GPUs' float maxima drop it."""
    return tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True)


@jit
def _largest(bits):
    return tl.max(bits, 1).to(tl.float32, bitcast=True)


@jit
def _rounded(x, inverse):
    """Half to even, as torch.round: adding 1.5 * 2^23 leaves no bits for a fraction."""
    scaled = x * inverse[:, None]
    return ((scaled + 12582912.0) - 12582912.0).to(tl.int8)


@jit
def _dequantize(
    codes_ptr, scales_ptr, x_ptr, num_rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (row[:, None] < num_rows) & (column[None, :] < width)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    scale = tl.load(scales_ptr + row, row < num_rows, 0.0)
    x = tl.load(codes_ptr + at, mask, 0).to(tl.float32) * scale[:, None]
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask)


@custom_op("fasttune::quantize_rows")
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = x.new_empty(x.shape[:2], dtype=torch.float32)
    if not x.numel():
        return codes, scales.zero_()
    rows = x.flatten(2).flatten(
        0, 1
    )  # a view of a slice of columns; a copy where there is no way round
    if runs_triton(x) and x.dtype != torch.float64:
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        config = RowConfig.from_heuristic(rows.shape[1])
        _quantize[(triton.cdiv(len(rows), config.rows),)](
            rows, codes, scales, *rows.shape, rows.stride(0),
            ROWS=config.rows, WIDTH=config.width, ONE_BLOCK=rows.shape[1] <= config.width,
            num_warps=config.num_warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
        return codes, scales
    step = max(1, _CHUNK // rows.shape[1])
    flat_codes, flat_scales = codes.view(rows.shape), scales.view(-1)
    for first in range(0, len(rows), step):
        found, scale = quantize_rows_ref(rows[None, first : first + step])
        flat_codes[first : first + step], flat_scales[first : first + step] = found[0], scale[0]
    return codes, scales


@_quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, x.new_empty(x.shape[:2], dtype=torch.float32)


@custom_op("fasttune::dequantize_rows")
def _dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    x = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if not x.numel():
        return x
    rows = codes.reshape(scales.numel(), -1)
    if runs_triton(codes) and dtype != torch.float64:
        config = RowConfig.from_heuristic(rows.shape[1])
        grid = triton.cdiv(len(rows), config.rows), triton.cdiv(rows.shape[1], config.width)
        _dequantize[grid](
            rows, scales, x, *rows.shape, ROWS=config.rows, WIDTH=config.width,
            num_warps=config.num_warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
        return x
    step = max(1, _CHUNK // rows.shape[1])
    flat, flat_scales = x.view(rows.shape), scales.reshape(-1, 1)
    for first in range(0, len(rows), step):
        flat[first : first + step] = rows[first : first + step] * flat_scales[first : first + step]
    return x


@_dequantize_rows.register_fake
def _(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, N, ...), floating point -> int8 codes of its shape and contiguous, scales (B, N) float32.

    A row of zeros has scale 0. Not differentiable. ValueError for fewer than three dimensions."""
    if x.ndim < 3 or not x.is_floating_point():
        raise ValueError(f"quantize_rows: {x.dtype} {tuple(x.shape)}; floating point (B, N, ...)")
    codes, scales = _quantize_rows(x)
    return codes, scales


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 codes (B, N, ...) and scales (B, N) of `quantize_rows` -> the rounded x in `dtype`."""
    if codes.dtype != torch.int8 or scales.shape != codes.shape[:2]:
        raise ValueError(
            f"dequantize_rows: {codes.dtype} {tuple(codes.shape)} with scales {tuple(scales.shape)}; "
            "int8 (B, N, ...) and (B, N)"
        )
    found: Tensor = _dequantize_rows(codes, scales, dtype)
    return found


def _launches() -> Iterator[Launch]:
    for width in (64, 128):
        config = RowConfig.from_heuristic(width)
        shared: dict[str, Any] = {
            "num_warps": config.num_warps,
            "num_stages": 1,
            "enable_fp_fusion": False,
            "targets": TARGETS,
        }
        sizes = {"ROWS": config.rows, "WIDTH": config.width}
        yield Launch(
            name=f"quantize_rows W={width} bf16",
            kernel=lambda: _quantize,
            signature={
                "x_ptr": "*bf16", "codes_ptr": "*i8", "scales_ptr": "*fp32",
                "num_rows": "i32", "width": "i32", "x_stride": "i32",
            },
            constants={**sizes, "ONE_BLOCK": width <= config.width},
            aligned=("x_ptr", "codes_ptr", "scales_ptr", "width", "x_stride"),
            **shared,
        )  # fmt: skip
    config = RowConfig.from_heuristic(128)
    yield Launch(
        name="dequantize_rows W=128 bf16",
        kernel=lambda: _dequantize,
        signature={
            "codes_ptr": "*i8", "scales_ptr": "*fp32", "x_ptr": "*bf16",
            "num_rows": "i32", "width": "i32",
        },
        constants={"ROWS": config.rows, "WIDTH": config.width},
        aligned=("codes_ptr", "scales_ptr", "x_ptr", "width"),
        num_warps=config.num_warps,
        num_stages=1,
        enable_fp_fusion=False,
    )  # fmt: skip


LAUNCHES = tuple(_launches())
