"""Triton kernels of lora_linear.

`linear_kernel` is a matrix product that begins with the rank-r product: r more steps of the inner
dimension, 0.5 % of the work at r = 16 and 3072 channels, in place of another pass over the output. It
is the forward, the input's gradient, the product with A alone, and the update of a product that the
vendor's library made, which is that other pass. `gradient_kernel` is both adapters' gradients, and up to
rank 32 dlow while it has dy at hand; the product for dx reads dy again.
"""

from fasttune_kernels.jit import jit, tl


@jit
def _mixed(bits, key):
    # lowbias32, as `dropout_mask` computes it
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D + key
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@jit
def _row_keys(seed_ptr, row):
    """Two keys of the dropout for each row. The seed is loaded a row at a time, as the interpreter
    warns where a scalar overflows, and a vector does not."""
    seed = tl.load(seed_ptr + row * 0)
    key = _mixed(_mixed(seed.to(tl.uint32) ^ 0x9E3779B1, 0) ^ (seed >> 32).to(tl.uint32), 0)
    first = _mixed(row.to(tl.uint32) + key, 0)
    return first, _mixed(first ^ key, 0)


@jit
def _keeps(first, second, column, threshold):
    bits = _mixed((column.to(tl.uint32) * 0x9E3779B1) ^ first, second)
    return bits.to(tl.int32, bitcast=True) >= threshold


@jit
def _accumulate(
    acc,
    x_ptr,
    weight_ptr,
    first,
    second,
    threshold,
    offset,
    width,
    row,
    column,
    M,
    N,
    x_stride,
    weight_n_stride,
    weight_k_stride,
    DROPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + x weight^T over `width` channels; `offset` is that of x's first among all of the input."""
    channel = tl.arange(0, BLOCK_K)
    x_ptr += row[:, None] * x_stride + channel[None, :]
    weight_ptr += channel[:, None] * weight_k_stride + column[None, :] * weight_n_stride
    for k in range(tl.cdiv(width, BLOCK_K)):
        inside = channel < width - k * BLOCK_K
        x = tl.load(x_ptr, (row < M)[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_ptr, inside[:, None] & (column < N)[None, :], other=0.0)
        if DROPS:
            kept = _keeps(first, second, (offset + k * BLOCK_K + channel)[None, :], threshold)
            x = tl.where(kept, x, 0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
        x_ptr += BLOCK_K
        weight_ptr += BLOCK_K * weight_k_stride
    return acc


@jit
def linear_kernel(
    out_ptr,  # (M, N)
    x_ptr,  # (M, width), (M, width2); without x there is the rank-r product alone
    x2_ptr,
    weight_ptr,  # (N, width + width2) by its strides
    bias_ptr,  # (N,)
    low_ptr,  # (M, targets * RANK)
    up_ptr,  # (adapted columns, RANK) by its strides
    residual_ptr,  # (M, N), may be out itself
    seed_ptr,
    scale,
    threshold,
    offset,  # of the first of these columns in the layer's input, for its dropout
    M,
    N,
    width,
    width2,
    x_stride,
    x2_stride,
    weight_n_stride,
    weight_k_stride,
    low_stride,
    up_n_stride,
    up_r_stride,
    residual_stride,
    SLICES: tl.constexpr,  # begin and end of each target's columns; () is one target of all columns
    RANK: tl.constexpr,
    DROPS_INPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Groups of GROUP tile rows go over the columns together, so that both operands stay in the L2.
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    group_size = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * tiles_n)
    first_row = (group * GROUP + place % group_size) * BLOCK_M
    first_column = place // group_size * BLOCK_N
    # Rows are counted from the tile's first, whose address alone takes 64 bits.
    start = first_row.to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    rows_left = M - first_row
    column = first_column + tl.arange(0, BLOCK_N)

    key = row.to(tl.uint32)
    key2 = key
    if seed_ptr is not None:
        key, key2 = _row_keys(seed_ptr, first_row + row)
    key = key[:, None]
    key2 = key2[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if low_ptr is not None:
        low_ptr += start * low_stride
        STEPS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
        if len(SLICES) == 0:
            first = 0
            last = 1
        else:
            first = first_column * 0
            last = first_column * 0
            # Not sums of comparisons: of four, LLVM makes a mask that spills.
            for i in tl.static_range(len(SLICES) // 2):
                first = tl.where(first_column >= SLICES[2 * i + 1], i + 1, first)
                last = tl.where(first_column + BLOCK_N > SLICES[2 * i], i + 1, last)
        for step in tl.range(first * STEPS, last * STEPS, num_stages=1):
            target = step // STEPS
            rank = step % STEPS * BLOCK_R + tl.arange(0, BLOCK_R)
            begin = 0
            end = N
            if len(SLICES) > 0:
                end = 0
                shift = 0  # from a column to its row of up
                for i in tl.static_range(len(SLICES) // 2):
                    begin = tl.where(target == i, SLICES[2 * i], begin)
                    end = tl.where(target == i, SLICES[2 * i + 1], end)
                    previous = SLICES[2 * i - 1] if i > 0 else 0
                    shift += tl.where(target >= i, SLICES[2 * i] - previous, 0)
                up_row = column - shift
            else:
                up_row = column
            low = tl.load(
                low_ptr + row[:, None] * low_stride + (target * RANK + rank)[None, :],
                (row < rows_left)[:, None] & (rank < RANK)[None, :],
                other=0.0,
            )
            up = tl.load(
                up_ptr + up_row[None, :] * up_n_stride + rank[:, None] * up_r_stride,
                (rank < RANK)[:, None] & ((column >= begin) & (column < end))[None, :],
                other=0.0,
            )
            acc = tl.dot(low, up, acc, input_precision="ieee")
        acc *= scale
        if seed_ptr is not None:
            acc = tl.where(_keeps(key, key2, (offset + column)[None, :], threshold), acc, 0.0)

    if x_ptr is not None:
        x_ptr += start * x_stride
        acc = _accumulate(
            acc, x_ptr, weight_ptr, key, key2, threshold, 0, width, row, column, rows_left, N,
            x_stride, weight_n_stride, weight_k_stride, DROPS_INPUT, BLOCK_K,
        )  # fmt: skip
    if x2_ptr is not None:
        x2_ptr += start * x2_stride
        weight_ptr += width * weight_k_stride
        acc = _accumulate(
            acc, x2_ptr, weight_ptr, key, key2, threshold, width, width2, row, column, rows_left, N,
            x2_stride, weight_n_stride, weight_k_stride, DROPS_INPUT, BLOCK_K,
        )  # fmt: skip
    if DROPS_INPUT:
        acc *= scale

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, column < N, other=0.0).to(tl.float32)[None, :]
    mask = (row < rows_left)[:, None] & (column < N)[None, :]
    if residual_ptr is not None:
        residual_ptr += start * residual_stride
        residual = residual_ptr + row[:, None] * residual_stride + column[None, :]
        acc += tl.load(residual, mask, other=0.0).to(tl.float32)
    out_ptr += start * N
    tl.store(out_ptr + row[:, None] * N + column[None, :], acc, mask)


@jit
def gradient_kernel(
    out_ptr,  # (groups, ...) float32: scale x^T low of this group's rows, by its strides
    sums_ptr,  # (tiles, M, RANK) float32: x up of this tile's columns
    x_ptr,  # (M, columns): dy, or the layer's input
    low_ptr,  # (M, targets * RANK)
    up_ptr,  # (adapted columns, RANK)
    seed_ptr,
    scale,
    threshold,
    M,
    width,
    offset,  # of x's first channel in the whole input, for the dropout
    group_rows,
    tiles,
    x_stride,
    low_stride,
    out_group_stride,
    out_column_stride,
    out_rank_stride,
    SLICES: tl.constexpr,  # as in linear_kernel, of x's columns
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles
    begin = tile * BLOCK_N
    end = width
    out_row = begin
    target = 0
    if len(SLICES) > 0:
        place = tile  # of the tile in its target
        tiles_before = 0
        rows_before = 0
        for i in tl.static_range(len(SLICES) // 2):
            here = tile >= tiles_before
            place = tl.where(here, tile - tiles_before, place)
            begin = tl.where(here, SLICES[2 * i] + place * BLOCK_N, begin)
            end = tl.where(here, SLICES[2 * i + 1], end)
            out_row = tl.where(here, rows_before + place * BLOCK_N, out_row)
            target = tl.where(here, i, target)
            tiles_before += (SLICES[2 * i + 1] - SLICES[2 * i] + BLOCK_N - 1) // BLOCK_N
            rows_before += SLICES[2 * i + 1] - SLICES[2 * i]

    inner = tl.arange(0, BLOCK_N)
    column = begin + inner
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    first_row = group * group_rows
    start = first_row.to(tl.int64)
    rows_left = tl.minimum(M - first_row, group_rows)
    row = tl.arange(0, BLOCK_M)
    x_ptr += start * x_stride + row[:, None] * x_stride + column[None, :]
    low_ptr += start * low_stride + row[:, None] * low_stride + (target * RANK + rank)[None, :]
    if sums_ptr is not None:
        sums_ptr += (tile.to(tl.int64) * M + start) * RANK + row[:, None] * RANK + rank[None, :]
        up = tl.load(
            up_ptr + (out_row + inner)[:, None] * RANK + rank[None, :],
            (column < end)[:, None] & (rank < RANK)[None, :],
            other=0.0,
        )
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for m in range(tl.cdiv(rows_left, BLOCK_M)):
        inside = row < rows_left - m * BLOCK_M
        x = tl.load(x_ptr, inside[:, None] & (column < end)[None, :], other=0.0)
        low = tl.load(low_ptr, inside[:, None] & (rank < RANK)[None, :], other=0.0)
        if seed_ptr is not None:
            key, key2 = _row_keys(seed_ptr, first_row + m * BLOCK_M + row)
            kept = _keeps(key[:, None], key2[:, None], (offset + column)[None, :], threshold)
            x = tl.where(kept, x, 0.0)
        acc = tl.dot(tl.trans(x), low, acc, input_precision="ieee")
        if sums_ptr is not None:
            sums = tl.dot(x, up, input_precision="ieee")
            tl.store(sums_ptr, sums, inside[:, None] & (rank < RANK)[None, :])
            sums_ptr += BLOCK_M * RANK
        x_ptr += BLOCK_M * x_stride
        low_ptr += BLOCK_M * low_stride
    out_ptr += group.to(tl.int64) * out_group_stride
    out_ptr += (out_row + inner)[:, None] * out_column_stride + rank[None, :] * out_rank_stride
    tl.store(out_ptr, acc * scale, (column < end)[:, None] & (rank < RANK)[None, :])


@jit
def sum_kernel(
    dlow_ptr,  # (M, targets * RANK)
    sums_ptr,  # (tiles, M, RANK) float32
    M,
    tiles,
    SLICES: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,  # columns that one of the sums is of
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The second stage of dlow: the sums of each target's tiles."""
    target = tl.program_id(1)
    first = target.to(tl.int64) * 0
    last = first + tiles
    if len(SLICES) > 0:
        last = first
        for i in tl.static_range(len(SLICES) // 2):
            count = (SLICES[2 * i + 1] - SLICES[2 * i] + TILE - 1) // TILE
            first += tl.where(target > i, count, 0)
            last += tl.where(target >= i, count, 0)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, BLOCK_R)
    mask = (row < M)[:, None] & (rank < RANK)[None, :]
    row = row.to(tl.int64)[:, None]
    sums_ptr += row * RANK + rank[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for tile in range(first, last):
        acc += tl.load(sums_ptr + tile * M * RANK, mask, other=0.0)
    dlow_ptr += row * (tl.num_programs(1) * RANK) + target * RANK + rank[None, :]
    tl.store(dlow_ptr, acc, mask)
