"""Kernels of diffusion_loss.py.

Latents are (B, I, J) here, by stride, where I * J elements of a sample are in the order of the
gradient's memory: pixels and channels for a channels_last prediction, channels and pixels else.
"""

from fasttune_kernels.jit import jit, tl


@jit
def _load(ptr, sample, i, j, sample_stride, i_stride, j_stride, inside):
    ptr += sample.to(tl.int64) * sample_stride
    return tl.load(ptr + i * i_stride + j * j_stride, inside, 0).to(tl.float32)


@jit
def forward_kernel(
    prediction_ptr,
    clean_ptr,
    noise_ptr,
    mask_ptr,
    clean_factor_ptr,
    noise_factor_ptr,
    gradient_ptr,
    partial_ptr,
    numel,
    size_j,
    prediction_b,
    prediction_i,
    prediction_j,
    clean_b,
    clean_i,
    clean_j,
    noise_b,
    noise_i,
    noise_j,
    mask_b,
    mask_i,
    mask_j,
    huber_delta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of one sample: its sum of mask * d(e), and mask * d'(e)."""
    sample = tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    i, j = index // size_j, index % size_j
    error = _load(prediction_ptr, sample, i, j, prediction_b, prediction_i, prediction_j, inside)
    target = tl.zeros([BLOCK], tl.float32)
    if noise_ptr is not None:
        target = _load(noise_ptr, sample, i, j, noise_b, noise_i, noise_j, inside)
        if noise_factor_ptr is not None:
            target *= tl.load(noise_factor_ptr + sample).to(tl.float32)
    if clean_ptr is not None:
        clean = _load(clean_ptr, sample, i, j, clean_b, clean_i, clean_j, inside)
        if clean_factor_ptr is not None:
            clean *= tl.load(clean_factor_ptr + sample).to(tl.float32)
        target += clean
    error -= target
    if KIND == "l1":
        loss = tl.abs(error)
        slope = tl.where(error < 0, -1.0, tl.where(error > 0, 1.0, error))  # NaN stays NaN
    else:
        bounded = error
        if KIND == "huber":
            bound = tl.where(error < 0, -huber_delta, huber_delta)
            bounded = tl.where(tl.abs(error) > huber_delta, bound, error)
        loss = bounded * (2 * error - bounded)
        slope = 2 * bounded
    if mask_ptr is not None:
        factor = _load(mask_ptr, sample, i, j, mask_b, mask_i, mask_j, inside)
        loss *= factor
        slope *= factor
    if gradient_ptr is not None:
        tl.store(gradient_ptr + sample.to(tl.int64) * numel + index, slope, inside)
    # beyond the sample all loads are 0, and so is the error
    tl.store(partial_ptr + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(loss))


@jit
def sum_kernel(partial_ptr, weight_ptr, loss_ptr, num_partials, numel, BLOCK: tl.constexpr):
    """A sample's loss from its partial sums, in an order that nothing changes."""
    sample = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_partials, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + sample * num_partials + index, index < num_partials, 0.0)
    loss = tl.sum(total) / numel
    if weight_ptr is not None:
        loss *= tl.load(weight_ptr + sample).to(tl.float32)
    tl.store(loss_ptr + sample, loss)


@jit
def backward_kernel(
    dloss_ptr, gradient_ptr, weight_ptr, dprediction_ptr, numel, BLOCK: tl.constexpr
):
    """A block of one sample: gradient * dloss * weight / numel."""
    sample = tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    scale = tl.load(dloss_ptr + sample).to(tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + sample).to(tl.float32)
    offset = sample.to(tl.int64) * numel + index
    gradient = tl.load(gradient_ptr + offset, inside)
    tl.store(dprediction_ptr + offset, gradient * (scale / numel), inside)
