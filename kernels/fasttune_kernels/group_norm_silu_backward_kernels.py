"""Backward kernels of `group_norm_silu`; `group_norm_silu_kernels` has the method, and the forward.

With dz = dy silu'(z), and sums over a group of D channels and P pixels,

    dx = rstd (weight dz - A - u_hat B)     A = sum(weight dz) / (D P)     B = sum(weight dz u_hat) / (D P)

so `_sums` needs sum(dz) and sum(dz u_hat) of each channel: by group they make A and B, over the batch
they are dbias and dweight. dadd, the sum of dx over pixels, follows from them and sum(u_hat) of each
channel, without another look at dx.
"""

from fasttune_kernels.group_norm_silu_kernels import (
    _by_channel,
    _by_group,
    _load,
    _load_parts,
    _members,
    _range_of,
    _store,
    _store_parts,
)
from fasttune_kernels.jit import jit, tl


@jit
def _silu_backward(dy, z):
    gate = tl.sigmoid(z)
    return dy * gate * (1.0 + z * (1.0 - gate))


@jit
def _of_group(statistic_ptr, channel, inside, groups, per_group):
    """A statistic (B, G) of this sample at channels."""
    row = tl.program_id(2).to(tl.int64) * groups
    return tl.load(statistic_ptr + row + channel // per_group, inside, 0.0)


@jit
def _sums(
    dy_ptr,
    x_ptr,
    skip_ptr,
    add_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    parts_ptr,
    channel_sums_ptr,
    pixels,
    channels,
    skip_channels,
    groups,
    chunk_pixels,
    SILU: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    SPAN: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Program (block, chunk, sample): sums of weight dz and weight dz u_hat of its part of each group,
    and where they are wanted dz, dz u_hat and, for dadd, u_hat of each channel, (B, chunks, 3, C)."""
    block, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first, end = _range_of(block, channels, skip_channels, BLOCK_CHANNELS)
    joint = channels + skip_channels
    per_group = joint // groups
    channel = first + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < end
    weight = tl.load(weight_ptr + channel, inside, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, inside, 0.0).to(tl.float32)
    shift = _of_group(mean_ptr, channel, inside, groups, per_group)
    rstd = _of_group(rstd_ptr, channel, inside, groups, per_group)
    scale = weight * rstd
    if add_ptr is not None:
        shift -= tl.load(add_ptr + sample * channels + channel, inside, 0.0).to(tl.float32)
    begin = tl.program_id(1) * chunk_pixels
    count = tl.minimum(chunk_pixels, pixels - begin)
    begin += sample * pixels
    dy_ptr += begin * joint
    pixel = tl.arange(0, BLOCK_PIXELS)
    dz_sum = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    product_sum = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    off_sum = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, count, BLOCK_PIXELS):
        row, mask = start + pixel, (start + pixel < count)[:, None] & inside[None, :]
        x = _load(x_ptr, skip_ptr, begin, row, first, channel, channels, skip_channels, mask)
        dz = tl.load(dy_ptr + row[:, None] * joint + channel[None, :], mask, 0.0)
        off, dz = x.to(tl.float32) - shift[None, :], dz.to(tl.float32)
        if SILU:
            dz = _silu_backward(dz, off * scale[None, :] + bias[None, :])
        dz_sum += dz
        product_sum += dz * off
        if add_ptr is not None:
            off_sum += tl.where(mask, off, 0.0)
    dz_sums, product_sums = tl.sum(dz_sum, axis=0), tl.sum(product_sum, axis=0) * rstd
    if channel_sums_ptr is not None:
        sums_ptr = channel_sums_ptr + channel
        sums_ptr += (sample * tl.num_programs(1) + tl.program_id(1)) * 3 * joint
        tl.store(sums_ptr, dz_sums, inside)
        tl.store(sums_ptr + joint, product_sums, inside)
        if add_ptr is not None:
            tl.store(sums_ptr + 2 * joint, tl.sum(off_sum, axis=0) * rstd, inside)

    group, members = _members(first, end, per_group, BLOCK_CHANNELS, SLOTS)
    _store_parts(
        parts_ptr,
        _by_group(weight * dz_sums, members),
        _by_group(weight * product_sums, members),
        group,
        members,
        block,
        groups,
        per_group,
        channels,
        SPAN,
        BLOCK_CHANNELS,
    )


@jit
def _differentiate(
    dy_ptr,
    x_ptr,
    skip_ptr,
    add_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    residual_ptr,
    parts_ptr,
    terms_ptr,
    dx_ptr,
    dskip_ptr,
    pixels,
    channels,
    skip_channels,
    groups,
    chunk_pixels,
    SILU: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    SPAN: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Program (block, chunk, sample): A and B of its groups from all parts, and dx of its chunk, with
    the residual. Terms (B, 2, G) are A and B, for `_finish`."""
    block, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first, end = _range_of(block, channels, skip_channels, BLOCK_CHANNELS)
    joint = channels + skip_channels
    per_group = joint // groups
    group, members = _members(first, end, per_group, BLOCK_CHANNELS, SLOTS)
    dz_parts, product_parts, _chunk, _block = _load_parts(
        parts_ptr,
        group,
        tl.num_programs(1),
        groups,
        per_group,
        channels,
        BLOCK_CHANNELS,
        SPAN,
        MAX_CHUNKS,
    )
    total = 1.0 * per_group * pixels
    a, b = tl.sum(dz_parts, axis=0) / total, tl.sum(product_parts, axis=0) / total
    if terms_ptr is not None:
        if tl.program_id(1) == 0:
            starts = (group * per_group >= first) & (group * per_group < end)
            tl.store(terms_ptr + sample * 2 * groups + group, a, starts)
            tl.store(terms_ptr + (sample * 2 + 1) * groups + group, b, starts)

    channel = first + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < end
    weight = tl.load(weight_ptr + channel, inside, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, inside, 0.0).to(tl.float32)
    shift = _of_group(mean_ptr, channel, inside, groups, per_group)
    rstd = _of_group(rstd_ptr, channel, inside, groups, per_group)
    scale = weight * rstd
    if add_ptr is not None:
        shift -= tl.load(add_ptr + sample * channels + channel, inside, 0.0).to(tl.float32)
    dmean, slope = _by_channel(a, members) * rstd, _by_channel(b, members) * rstd * rstd
    begin = tl.program_id(1) * chunk_pixels
    count = tl.minimum(chunk_pixels, pixels - begin)
    begin += sample * pixels
    dy_ptr += begin * joint
    if residual_ptr is not None:
        residual_ptr += begin * joint
    pixel = tl.arange(0, BLOCK_PIXELS)
    for start in range(0, count, BLOCK_PIXELS):
        row, mask = start + pixel, (start + pixel < count)[:, None] & inside[None, :]
        x = _load(x_ptr, skip_ptr, begin, row, first, channel, channels, skip_channels, mask)
        dz = tl.load(dy_ptr + row[:, None] * joint + channel[None, :], mask, 0.0)
        off, dz = x.to(tl.float32) - shift[None, :], dz.to(tl.float32)
        if SILU:
            dz = _silu_backward(dz, off * scale[None, :] + bias[None, :])
        dx = dz * scale[None, :] - dmean[None, :] - off * slope[None, :]
        if residual_ptr is not None:
            residual_at = residual_ptr + row[:, None] * joint + channel[None, :]
            dx += tl.load(residual_at, mask, 0.0).to(tl.float32)
        _store(dx_ptr, dskip_ptr, begin, row, first, channel, channels, skip_channels, dx, mask)


@jit
def _finish(
    channel_sums_ptr,
    terms_ptr,
    weight_ptr,
    rstd_ptr,
    dadd_ptr,
    dweight_ptr,
    dbias_ptr,
    batch,
    chunks,
    pixels,
    channels,
    groups,
    BLOCK_CHANNELS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Program (block): dweight and dbias (C,), dadd (B, C) of its channels."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    chunk = tl.arange(0, MAX_CHUNKS)
    inside = channel < channels
    mask = (chunk < chunks)[:, None] & inside[None, :]
    weight = tl.load(weight_ptr + channel, inside, 0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    dbias = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    for sample in range(batch):
        offset = sample * chunks * 3 * channels + (chunk * 3 * channels)[:, None]
        sums_ptr = channel_sums_ptr + offset + channel[None, :]
        dz = tl.sum(tl.load(sums_ptr, mask, 0.0), axis=0)
        dweight += tl.sum(tl.load(sums_ptr + channels, mask, 0.0), axis=0)
        dbias += dz
        if dadd_ptr is not None:
            u_hat = tl.sum(tl.load(sums_ptr + 2 * channels, mask, 0.0), axis=0)
            group = channel // (channels // groups)
            rstd = tl.load(rstd_ptr + sample * groups + group, inside, 0.0)
            a = tl.load(terms_ptr + sample * 2 * groups + group, inside, 0.0)
            b = tl.load(terms_ptr + (sample * 2 + 1) * groups + group, inside, 0.0)
            dadd = rstd * (weight * dz - a * pixels - b * u_hat)
            tl.store(dadd_ptr + sample * channels + channel, dadd, inside)
    tl.store(dweight_ptr + channel, dweight, inside)
    tl.store(dbias_ptr + channel, dbias, inside)
