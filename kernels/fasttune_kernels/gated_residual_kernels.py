"""Kernels of `gated_residual` alone; those with the norm are in norm_modulate_kernels.

The backward's programs have a range of rows of one sample each and leave dgate's sums over them, which
are added up in their order: no atomics, the same bits on every run.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune_kernels.dispatch import arch
from fasttune_kernels.jit import jit, tl
from fasttune_kernels.launch import TARGETS, Launch
from fasttune_kernels.norm_modulate_launch import contiguous_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """How the kernels launch. Not measured; the reasoning is in `from_heuristic`."""

    block_rows: int
    block_columns: int
    num_warps: int
    max_rows: int
    """Of the backward: rows that a program adds up."""

    @classmethod
    def from_heuristic(cls, width: int, arch: str) -> "GateConfig":
        """A thread has 16 elements of a tile, two loads of 16 bytes from each tensor. Columns do
        not meet, so a tile is as wide as divides the width, 64 being one cache line of bfloat16.
        Sums of 64 rows are 2 % of the backward's bytes, and Flux's 4608 rows are 864 programs.
        """
        columns = next((n for n in (256, 128, 64) if width % n == 0), 64)
        lanes = 64 if arch.startswith("gfx9") else 32
        return cls(
            block_rows=2048 // columns, block_columns=columns, num_warps=128 // lanes, max_rows=64
        )

    @classmethod
    def by_target(cls, width: int) -> "list[tuple[tuple[str, ...], GateConfig]]":
        """(targets, config): targets of one config together."""
        configs = {target: cls.from_heuristic(width, target) for target in TARGETS}
        return [
            (tuple(target for target in TARGETS if configs[target] == config), config)
            for config in dict.fromkeys(configs.values())
        ]

    def blocks(self) -> dict[str, int]:
        """The kernels' constants."""
        return {"BLOCK_ROWS": self.block_rows, "BLOCK_COLUMNS": self.block_columns}

    def options(self) -> dict[str, Any]:
        """The compiler's."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


@jit
def gate_forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    out_ptr,
    tokens,
    width,
    x_batch_stride,
    x_row_stride,
    y_batch_stride,
    y_row_stride,
    gate_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    begin = tl.program_id(1).to(tl.int64) * BLOCK_ROWS
    sample = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_ROWS)
    mask = (begin + row < tokens)[:, None] & (column < width)[None, :]
    x_ptr += sample * x_batch_stride + begin * x_row_stride
    y_ptr += sample * y_batch_stride + begin * y_row_stride
    x = tl.load(x_ptr + row[:, None] * x_row_stride + column[None, :], mask).to(tl.float32)
    y = tl.load(y_ptr + row[:, None] * y_row_stride + column[None, :], mask).to(tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + sample * gate_stride + column, column < width)
        y *= gate.to(tl.float32)[None, :]
    out = (x + y).to(out_ptr.dtype.element_ty)
    out_ptr += (sample * tokens + begin) * width
    tl.store(out_ptr + row[:, None] * width + column[None, :], out, mask)


@jit
def gate_backward_kernel(
    dout_ptr,
    y_ptr,
    gate_ptr,
    dy_ptr,
    sums_ptr,
    tokens,
    max_rows,
    width,
    dout_batch_stride,
    dout_row_stride,
    y_batch_stride,
    y_row_stride,
    gate_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    begin = tl.program_id(1).to(tl.int64) * max_rows
    count = tl.minimum(tokens - tl.program_id(1) * max_rows, max_rows)
    sample = tl.program_id(2).to(tl.int64)
    inside = column < width
    gate = tl.load(gate_ptr + sample * gate_stride + column, inside).to(tl.float32)[None, :]
    dout_ptr += sample * dout_batch_stride + begin * dout_row_stride
    dy_ptr += (sample * tokens + begin) * width
    if sums_ptr is not None:
        y_ptr += sample * y_batch_stride + begin * y_row_stride
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, count, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < count)[:, None] & inside[None, :]
        offsets = row[:, None] * dout_row_stride + column[None, :]
        dout = tl.load(dout_ptr + offsets, mask, other=0.0).to(tl.float32)
        if sums_ptr is not None:
            offsets = row[:, None] * y_row_stride + column[None, :]
            sums += dout * tl.load(y_ptr + offsets, mask, other=0.0).to(tl.float32)
        dy = (dout * gate).to(dy_ptr.dtype.element_ty)
        tl.store(dy_ptr + row[:, None] * width + column[None, :], dy, mask)
    if sums_ptr is not None:
        sums_ptr += (sample * tl.num_programs(1) + tl.program_id(1)) * width
        tl.store(sums_ptr + column, tl.sum(sums, 0), inside)


def launch_gate(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """As gated_residual_forward."""
    samples, tokens, width = x.shape
    config = GateConfig.from_heuristic(width, arch(x.device))
    x, y = contiguous_rows(x), contiguous_rows(y)
    gate = None if gate is None else contiguous_rows(gate)
    out = x.new_empty(x.shape)
    grid = (-(-width // config.block_columns), -(-tokens // config.block_rows), samples)
    gate_forward_kernel[grid](
        x,
        y,
        gate,
        out,
        tokens,
        width,
        *x.stride()[:2],
        *y.stride()[:2],
        0 if gate is None else gate.stride(0),
        **config.blocks(),
        **config.options(),
    )
    return out


def launch_gate_backward(
    dout: Tensor, y: Tensor | None, gate: Tensor, wants_gate: bool
) -> tuple[Tensor, Tensor]:
    """As gated_residual_backward, with a gate."""
    samples, tokens, width = dout.shape
    config = GateConfig.from_heuristic(width, arch(dout.device))
    dout, gate = contiguous_rows(dout), contiguous_rows(gate)
    y = contiguous_rows(y) if wants_gate and y is not None else None
    ranges = -(-tokens // config.max_rows)
    dy = dout.new_empty(dout.shape)
    sums = dout.new_empty((samples, ranges, width), dtype=torch.float32) if wants_gate else None
    gate_backward_kernel[(-(-width // config.block_columns), ranges, samples)](
        dout,
        y,
        gate,
        dy,
        sums,
        tokens,
        config.max_rows,
        width,
        *dout.stride()[:2],
        *((0, 0) if y is None else y.stride()[:2]),
        gate.stride(0),
        **config.blocks(),
        **config.options(),
    )
    return dy, dy.new_empty(0, dtype=torch.float32) if sums is None else sums.sum(1)


_STRIDES = ("y_batch_stride", "y_row_stride", "gate_stride")
_FORWARD = {
    **dict.fromkeys(("x_ptr", "y_ptr", "gate_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("tokens", "width", "x_batch_stride", "x_row_stride", *_STRIDES), "i32"),
}
_BACKWARD = {
    **dict.fromkeys(("dout_ptr", "y_ptr", "gate_ptr", "dy_ptr"), "*bf16"),
    "sums_ptr": "*fp32",
    **dict.fromkeys(("tokens", "max_rows", "width", "dout_batch_stride", "dout_row_stride"), "i32"),
    **dict.fromkeys(_STRIDES, "i32"),
}

# Gates are Flux's, 3072 wide; SDXL's and SD 1's residuals have none, and a norm that follows.
LAUNCHES = tuple(
    Launch(
        name=f"{name} D=3072 bf16",
        kernel=kernel,
        signature=signature,
        constants=config.blocks(),
        aligned=tuple(signature),
        **config.options(),
        targets=targets,
    )
    for targets, config in GateConfig.by_target(3072)
    for name, kernel, signature in (
        ("gated_residual_forward", lambda: gate_forward_kernel, _FORWARD),
        ("gated_residual_backward", lambda: gate_backward_kernel, _BACKWARD),
    )
)
