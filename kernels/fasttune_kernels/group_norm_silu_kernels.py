"""Kernels of `group_norm_silu`: two passes, so that one sample fills the GPU.

A sample has 32 groups, too few programs by far, so a program has BC channels of a chunk of pixels:

1. `_statistics`: mean and M2 (the sum of squared deviations) of the part of each group that it sees.
2. `_normalise`: combines its groups' parts, whose order is fixed, and writes y of its chunk.

The backward is of the same form: `_sums` of dz and dz u_hat, `_differentiate` for dx, and `_finish` for
the vectors' gradients, which adds up what `_sums` left per channel. There are no atomics.

**Lanes.** Groups have 10, 20, 30, 40, 60 or 80 channels. Tiles of whole groups would leave lanes idle
(80 of 128: 37 %) and start where no 16-byte load can. So a block is 64 channels, of which every width
of SDXL is a multiple, and groups lie across blocks: the per-pixel work is per channel alone, and groups
appear at the end, where one vector of 64 sums is added up by group against a mask of SLOTS x 64. That
is once a program, 512 additions for groups of 10, so it needs no tensor core; in float32 it stays.
A group has parts in up to SPAN blocks. x and skip have blocks of their own: no program reads both.

**Statistics** are Welford's, an element a lane, so the loop over pixels has no reduction in it, and
lanes, channels and parts are combined by deviations from their common mean (Chan et al., 1979). A mean
far from zero costs no digits, as it does in E[x^2] - E[x]^2. `add` moves a channel's mean, not its M2.
"""

from fasttune_kernels.jit import jit, tl


@jit
def _block_of(channel, channels, BLOCK_CHANNELS: tl.constexpr):
    """The block that a joint channel is in: x's blocks, then skip's."""
    beyond = tl.cdiv(channels, BLOCK_CHANNELS) + (channel - channels) // BLOCK_CHANNELS
    return tl.where(channel < channels, channel // BLOCK_CHANNELS, beyond)


@jit
def _range_of(block, channels, skip_channels, BLOCK_CHANNELS: tl.constexpr):
    """The joint channels of a block: the first, and the one after the last."""
    beyond = (block - tl.cdiv(channels, BLOCK_CHANNELS)) * BLOCK_CHANNELS
    first = tl.where(beyond < 0, block * BLOCK_CHANNELS, channels + beyond)
    end = tl.where(beyond < 0, channels, channels + skip_channels)
    return first, tl.minimum(first + BLOCK_CHANNELS, end)


@jit
def _load(ptr, skip_ptr, pixel, row, first, channel, channels, skip_channels, mask):
    """Joint channels of the rows of `pixel`, from the tensor that they are in. To choose a pointer
    first would fail on AMD in triton 3.6."""
    if skip_ptr is None:
        x = tl.load(ptr + pixel * channels + row[:, None] * channels + channel[None, :], mask, 0.0)
    elif first < channels:
        x = tl.load(ptr + pixel * channels + row[:, None] * channels + channel[None, :], mask, 0.0)
    else:
        skip_ptr += pixel * skip_channels - channels
        x = tl.load(skip_ptr + row[:, None] * skip_channels + channel[None, :], mask, 0.0)
    return x


@jit
def _store(ptr, skip_ptr, pixel, row, first, channel, channels, skip_channels, x, mask):
    """As `_load`."""
    if skip_ptr is None:
        tl.store(ptr + pixel * channels + row[:, None] * channels + channel[None, :], x, mask)
    elif first < channels:
        tl.store(ptr + pixel * channels + row[:, None] * channels + channel[None, :], x, mask)
    else:
        skip_ptr += pixel * skip_channels - channels
        tl.store(skip_ptr + row[:, None] * skip_channels + channel[None, :], x, mask)


@jit
def _members(first, end, per_group, BLOCK_CHANNELS: tl.constexpr, SLOTS: tl.constexpr):
    """The groups in a block, (SLOTS,), and which of its channels are theirs, (SLOTS, BLOCK_CHANNELS)."""
    channel = first + tl.arange(0, BLOCK_CHANNELS)
    group = first // per_group + tl.arange(0, SLOTS)
    mine = (channel // per_group)[None, :] == group[:, None]
    return group, mine & (channel < end)[None, :]


@jit
def _by_group(values, members):
    """Sums of (BLOCK_CHANNELS,) by group, (SLOTS,)."""
    return tl.sum(tl.where(members, values[None, :], 0.0), axis=1)


@jit
def _by_channel(values, members):
    """Each channel's of (SLOTS,), one a group: (BLOCK_CHANNELS,)."""
    return tl.sum(tl.where(members, values[:, None], 0.0), axis=0)


@jit
def _store_parts(
    parts_ptr, a, b, group, members, block, groups, per_group, channels, SPAN, BLOCK_CHANNELS
):
    """a and b (SLOTS,) of the block's groups into parts (B, chunks, SPAN, 2, G)."""
    place = block - _block_of(group * per_group, channels, BLOCK_CHANNELS)
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    part_ptr = parts_ptr + row * (SPAN * 2) * groups + place * 2 * groups + group
    here = tl.sum(members.to(tl.int32), axis=1) > 0
    tl.store(part_ptr, a, here)
    tl.store(part_ptr + groups, b, here)


@jit
def _load_parts(
    parts_ptr,
    group,
    chunks,
    groups,
    per_group,
    channels,
    BLOCK_CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """All parts of the block's groups: a and b, (MAX_CHUNKS * SPAN, SLOTS), 0 where there is none;
    the chunk and the block of each."""
    row = tl.arange(0, MAX_CHUNKS * SPAN)
    chunk, place = row // SPAN, row % SPAN
    block = _block_of(group * per_group, channels, BLOCK_CHANNELS)[None, :] + place[:, None]
    last = _block_of((group + 1) * per_group - 1, channels, BLOCK_CHANNELS)
    mask = (chunk < chunks)[:, None] & (block <= last[None, :]) & (group < groups)[None, :]
    start = tl.program_id(2).to(tl.int64) * chunks * (SPAN * 2) * groups
    part_ptr = parts_ptr + start + (row * 2 * groups)[:, None] + group[None, :]
    return tl.load(part_ptr, mask, 0.0), tl.load(part_ptr + groups, mask, 0.0), chunk, block


@jit
def _statistics(
    x_ptr,
    skip_ptr,
    add_ptr,
    parts_ptr,
    pixels,
    channels,
    skip_channels,
    groups,
    chunk_pixels,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    SPAN: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Program (block, chunk, sample): mean and M2 of its part of each group."""
    block, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first, end = _range_of(block, channels, skip_channels, BLOCK_CHANNELS)
    channel = first + tl.arange(0, BLOCK_CHANNELS)
    pixel = tl.arange(0, BLOCK_PIXELS)
    begin = tl.program_id(1) * chunk_pixels
    count = tl.minimum(chunk_pixels, pixels - begin)
    begin += sample * pixels
    mean = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    m2 = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, count, BLOCK_PIXELS):
        mask = (start + pixel < count)[:, None] & (channel < end)[None, :]
        row = start + pixel
        x = _load(x_ptr, skip_ptr, begin, row, first, channel, channels, skip_channels, mask)
        x = x.to(tl.float32)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / (start // BLOCK_PIXELS + 1))
        m2 += delta * (x - mean)
    seen = tl.maximum((count - pixel + BLOCK_PIXELS - 1) // BLOCK_PIXELS, 0).to(tl.float32)[:, None]
    channel_mean = tl.sum(seen * mean, axis=0) / count
    deviation = mean - channel_mean[None, :]
    channel_m2 = tl.sum(m2 + seen * deviation * deviation, axis=0)
    if add_ptr is not None:
        add = tl.load(add_ptr + sample * channels + channel, channel < end, 0.0)
        channel_mean += add.to(tl.float32)

    per_group = (channels + skip_channels) // groups
    group, members = _members(first, end, per_group, BLOCK_CHANNELS, SLOTS)
    width = tl.maximum(tl.sum(members.to(tl.float32), axis=1), 1.0)
    group_mean = _by_group(channel_mean, members) / width
    off = channel_mean - _by_channel(group_mean, members)
    group_m2 = _by_group(channel_m2 + count * off * off, members)
    _store_parts(
        parts_ptr,
        group_mean,
        group_m2,
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
def _normalise(
    x_ptr,
    skip_ptr,
    add_ptr,
    weight_ptr,
    bias_ptr,
    parts_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    pixels,
    channels,
    skip_channels,
    groups,
    chunk_pixels,
    eps,
    SILU: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    SPAN: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Program (block, chunk, sample): its groups' statistics from all parts, and y of its chunk."""
    block, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first, end = _range_of(block, channels, skip_channels, BLOCK_CHANNELS)
    per_group = (channels + skip_channels) // groups
    group, members = _members(first, end, per_group, BLOCK_CHANNELS, SLOTS)
    means, m2s, chunk, part_block = _load_parts(
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
    part_first, part_end = _range_of(part_block, channels, skip_channels, BLOCK_CHANNELS)
    part_first = tl.maximum(part_first, (group * per_group)[None, :])
    part_end = tl.minimum(part_end, ((group + 1) * per_group)[None, :])
    part_pixels = tl.minimum(chunk_pixels, pixels - chunk * chunk_pixels)
    size = tl.maximum(part_end - part_first, 0) * tl.maximum(part_pixels, 0)[:, None]
    size = size.to(tl.float32)
    total = 1.0 * per_group * pixels
    mean = tl.sum(size * means, axis=0) / total
    deviation = means - mean[None, :]
    rstd = tl.rsqrt(tl.sum(m2s + size * deviation * deviation, axis=0) / total + eps)
    if tl.program_id(1) == 0:  # the block of a group's first channel writes it
        starts = (group * per_group >= first) & (group * per_group < end)
        tl.store(mean_ptr + sample * groups + group, mean, starts)
        tl.store(rstd_ptr + sample * groups + group, rstd, starts)

    channel = first + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < end
    weight = tl.load(weight_ptr + channel, inside, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, inside, 0.0).to(tl.float32)
    shift, scale = _by_channel(mean, members), _by_channel(rstd, members) * weight
    if add_ptr is not None:
        add = tl.load(add_ptr + sample * channels + channel, inside, 0.0)
        shift -= add.to(tl.float32)
    begin = tl.program_id(1) * chunk_pixels
    count = tl.minimum(chunk_pixels, pixels - begin)
    begin += sample * pixels
    joint = channels + skip_channels
    y_ptr += begin * joint
    pixel = tl.arange(0, BLOCK_PIXELS)
    for start in range(0, count, BLOCK_PIXELS):
        mask = (start + pixel < count)[:, None] & inside[None, :]
        row = start + pixel
        x = _load(x_ptr, skip_ptr, begin, row, first, channel, channels, skip_channels, mask)
        y = (x.to(tl.float32) - shift[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            y *= tl.sigmoid(y)
        tl.store(y_ptr + (start + pixel)[:, None] * joint + channel[None, :], y, mask)
