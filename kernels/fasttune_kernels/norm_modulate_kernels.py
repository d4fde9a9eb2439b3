"""Kernels of `norm_modulate`, and of `gated_residual` where the norm follows it.

1. `norm_forward_kernel`: a program has whole rows in registers, several where rows are short. With a
   branch y, the rows are x + gate y, which it stores and does not read again.
2. `norm_backward_kernel`: a program walks a range of rows of one sample. It writes dx, and keeps the
   range's S1 = sum dy x_hat and S0 = sum dy in registers, written once at its end.
3. `norm_sums_kernel`: adds the ranges up, in their order, and makes the gradients of the vectors of it.

There are no atomics: the same input gives the same bits.
"""

from dataclasses import dataclass
from typing import Any

from fasttune_kernels.jit import jit, next_power_of_2, tl
from fasttune_kernels.launch import TARGETS

MAX_WIDTH = 8192
"""A row is in the registers of one program. The widest model in sight has 6144."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NormConfig:
    """How the kernels launch. Not measured; the reasoning is in `from_heuristic`."""

    block_rows: int
    block_width: int
    """A tile is (block_rows, block_width), the width a power of two with the row in it."""
    num_warps: int
    programs_per_processor: int
    """Of the backward: ranges of rows that are walked at the same time."""
    min_rows: int
    """Of the backward: rows of a range, at least."""

    @classmethod
    def from_heuristic(cls, width: int, arch: str) -> "NormConfig":
        """A thread has 16 elements of a tile, two loads of 16 bytes of bfloat16, or 8 on wide waves,
        and a tile has 2048 elements or a row.

        The backward holds w, S1, S0 and rows of dy, x and dx: 6 tiles of float32, so 16 elements a
        thread take 96 registers and some; 16 warps of them fill a processor's 65536. So there are
        as many programs as make 16 warps, and all of them run at once. A range writes and reads 16
        bytes of sums a column, which 4 rows bring down to what one bfloat16 tensor costs; most of
        that stays in L2.
        """
        block_width = next_power_of_2(width)
        block_rows = max(1, 2048 // block_width)
        threads = block_rows * block_width // 16
        lanes = 64 if arch.startswith("gfx9") else 32
        num_warps = min(16, max(1, threads // lanes))
        return cls(
            block_rows=block_rows,
            block_width=block_width,
            num_warps=num_warps,
            programs_per_processor=max(1, 16 // num_warps),
            min_rows=max(4, block_rows),
        )

    @classmethod
    def by_target(cls, width: int) -> "list[tuple[tuple[str, ...], NormConfig]]":
        """(targets, config): targets of one config together."""
        configs = {target: cls.from_heuristic(width, target) for target in TARGETS}
        return [
            (tuple(target for target in TARGETS if configs[target] == config), config)
            for config in dict.fromkeys(configs.values())
        ]

    def rows_of_range(self, samples: int, tokens: int, processors: int) -> int:
        """Rows that a program of the backward walks, a multiple of the tile's."""
        ranges = max(1, self.programs_per_processor * processors // samples)
        rows = max(self.min_rows, -(-tokens // ranges))
        return -(-rows // self.block_rows) * self.block_rows

    def blocks(self) -> dict[str, int]:
        """The kernels' constants."""
        return {"BLOCK_ROWS": self.block_rows, "BLOCK_WIDTH": self.block_width}

    def options(self) -> dict[str, Any]:
        """The compiler's. Rows are loaded once and whole, with nothing to pipeline."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


@jit
def _load(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask, other=0.0).to(tl.float32)


@jit
def _factor(scale_ptr, sample, scale_stride, column, mask):
    factor = tl.full(column.shape, 1.0, tl.float32)
    if scale_ptr is not None:
        factor += _load(scale_ptr + sample * scale_stride, column, mask)
    return factor


@jit
def norm_forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    tokens,
    width,
    x_batch_stride,
    x_row_stride,
    y_batch_stride,
    y_row_stride,
    gate_stride,
    scale_stride,
    shift_stride,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    sample = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    mask = (first + row < tokens)[:, None] & inside[None, :]
    # Sample and first row are 64-bit and uniform; offsets within the tile fit into 32.
    x_ptr += sample * x_batch_stride + first * x_row_stride
    x = _load(x_ptr, row[:, None] * x_row_stride + column[None, :], mask)
    row_of_all = sample * tokens + first
    offsets = row[:, None] * width + column[None, :]
    if y_ptr is not None:
        y_ptr += sample * y_batch_stride + first * y_row_stride
        y = _load(y_ptr, row[:, None] * y_row_stride + column[None, :], mask)
        if gate_ptr is not None:
            y *= _load(gate_ptr + sample * gate_stride, column, inside)[None, :]
        out = (x + y).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row_of_all * width + offsets, out, mask)
        x = out.to(tl.float32)  # what the backward reads
    if mean_ptr is not None:
        mean = tl.sum(x, 1) / width
        tl.store(mean_ptr + row_of_all + row, mean, first + row < tokens)
        x = tl.where(inside[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    tl.store(rstd_ptr + row_of_all + row, rstd, first + row < tokens)
    factor = _factor(scale_ptr, sample, scale_stride, column, inside)
    w = factor
    if weight_ptr is not None:
        w *= _load(weight_ptr, column, inside)
    normed = x * rstd[:, None] * w[None, :]
    if bias_ptr is not None:
        normed += (_load(bias_ptr, column, inside) * factor)[None, :]
    if shift_ptr is not None:
        normed += _load(shift_ptr + sample * shift_stride, column, inside)[None, :]
    normed = normed.to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + row_of_all * width + offsets, normed, mask)


@jit
def norm_backward_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    weight_ptr,
    residual_ptr,
    dx_ptr,
    sums_ptr,
    tokens,
    rows_of_range,
    width,
    dy_batch_stride,
    dy_row_stride,
    x_batch_stride,
    x_row_stride,
    residual_batch_stride,
    residual_row_stride,
    scale_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    w = _factor(scale_ptr, sample, scale_stride, column, inside)
    if weight_ptr is not None:
        w *= _load(weight_ptr, column, inside)
    s1 = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    s0 = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * rows_of_range
    count = tl.minimum(tokens - tl.program_id(0) * rows_of_range, rows_of_range)
    # Sample and first row of the range are 64-bit and uniform; offsets within it fit into 32.
    row_of_all = sample * tokens + begin
    dy_ptr += sample * dy_batch_stride + begin * dy_row_stride
    x_ptr += sample * x_batch_stride + begin * x_row_stride
    if residual_ptr is not None:
        residual_ptr += sample * residual_batch_stride + begin * residual_row_stride
    for start in range(0, count, BLOCK_ROWS):
        rows = start + row
        here = rows < count
        mask = here[:, None] & inside[None, :]
        x_hat = _load(x_ptr, rows[:, None] * x_row_stride + column[None, :], mask)
        dy = _load(dy_ptr, rows[:, None] * dy_row_stride + column[None, :], mask)
        if residual_ptr is not None:  # now, so that it is on its way during the reductions
            offsets = rows[:, None] * residual_row_stride + column[None, :]
            residual = _load(residual_ptr, offsets, mask)
        rstd = _load(rstd_ptr + row_of_all, rows, here)
        if mean_ptr is not None:
            x_hat -= _load(mean_ptr + row_of_all, rows, here)[:, None]
        x_hat *= rstd[:, None]
        # Beyond the width x_hat is not 0, but every product with it has a dy that is.
        if sums_ptr is not None:
            s1 += dy * x_hat
            s0 += dy
        dy *= w[None, :]
        if mean_ptr is None:
            dx = dy - x_hat * (tl.sum(dy * x_hat, 1) / width)[:, None]
        else:  # one exchange between the warps for both sums
            product, plain = tl.split(tl.sum(tl.join(dy * x_hat, dy), 1))
            dx = dy - x_hat * (product / width)[:, None] - (plain / width)[:, None]
        dx *= rstd[:, None]
        if residual_ptr is not None:
            dx += residual
        offsets = rows[:, None] * width + column[None, :]
        tl.store(dx_ptr + row_of_all * width + offsets, dx.to(dx_ptr.dtype.element_ty), mask)
    if sums_ptr is not None:
        sums_ptr += (sample * tl.num_programs(0) + tl.program_id(0)) * 2 * width
        tl.store(sums_ptr + column, tl.sum(s1, 0), inside)
        tl.store(sums_ptr + width + column, tl.sum(s0, 0), inside)


@jit
def norm_sums_kernel(
    sums_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    dscale_ptr,
    dshift_ptr,
    dweight_ptr,
    dbias_ptr,
    samples,
    ranges,
    width,
    scale_stride,
    BLOCK_RANGES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    row = tl.arange(0, BLOCK_RANGES)
    dweight = tl.zeros((BLOCK_WIDTH,), tl.float32)
    dbias = tl.zeros((BLOCK_WIDTH,), tl.float32)
    # A program a sample; one for all of them where the weights' gradients add them up.
    for k in range(samples // tl.num_programs(1)):
        sample = (tl.program_id(1) + k).to(tl.int64)
        tile1 = tl.zeros((BLOCK_RANGES, BLOCK_WIDTH), tl.float32)
        tile0 = tl.zeros((BLOCK_RANGES, BLOCK_WIDTH), tl.float32)
        sums = sums_ptr + sample * ranges * 2 * width
        for start in range(0, ranges, BLOCK_RANGES):
            mask = (start + row < ranges)[:, None] & inside[None, :]
            offsets = (start + row)[:, None] * 2 * width + column[None, :]
            tile1 += _load(sums, offsets, mask)
            tile0 += _load(sums + width, offsets, mask)
        s1, s0 = tl.sum(tile1, 0), tl.sum(tile0, 0)
        if dweight_ptr is not None:
            factor = _factor(scale_ptr, sample, scale_stride, column, inside)
            dweight += factor * s1
            dbias += factor * s0
        if dscale_ptr is not None:
            tl.store(dshift_ptr + sample * width + column, s0, inside)
            if weight_ptr is not None:
                s1 *= _load(weight_ptr, column, inside)
            if bias_ptr is not None:
                s1 += s0 * _load(bias_ptr, column, inside)
            tl.store(dscale_ptr + sample * width + column, s1, inside)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + column, dweight, inside)
        tl.store(dbias_ptr + column, dbias, inside)


# 128 bytes of 32 ranges at once: 16 elements of each sum in a thread, and 96 programs for 3072 columns.
SUMS_BLOCKS = {"BLOCK_RANGES": 32, "BLOCK_WIDTH": 32}
SUMS_OPTIONS: dict[str, Any] = {"num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}
