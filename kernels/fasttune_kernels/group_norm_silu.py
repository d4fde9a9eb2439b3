"""GroupNorm and SiLU of a U-Net's ResNet block, in one op: what precedes each of its convolutions.

    u = cat([x, skip]) or x + add        u_hat = (u - mean) rstd, of each sample and group of channels
    z = u_hat weight + bias              y = z sigmoid(z), or z

`skip` joins x's channels where it is, and `add` is the time embedding, a value per channel: neither
the joint tensor nor the sum is written. Kept for the backward are the arguments and the statistics,
mean and rstd in float32; u_hat, z and its sigmoid are computed again.

Tensors are channels_last on a GPU: a pixel's channels lie beside each other, as its convolutions want
them. Contiguous (NCHW) tensors are taken as well, and are transposed for the kernels.

B batch, C channels of x, S of skip, G groups. Sources: https://arxiv.org/abs/1803.08494 (GroupNorm),
Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm" (statistics of parts).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fasttune_kernels.dispatch import custom_op, device_type, runs_triton
from fasttune_kernels.group_norm_silu_launch import launch_backward, launch_forward

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def group_norm_silu_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    silu: bool = True,
    add: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """The definition, in float32, or float64 if x is."""
    dtype = _accumulated(x)
    x = x.to(dtype) if skip is None else torch.cat([x, skip], dim=1).to(dtype)
    x = x if add is None else x + add.to(dtype)[:, :, None, None]
    mean, rstd = _statistics(x, groups, eps)
    z = (x - _of_channels(mean, x)) * _of_channels(rstd, x)
    z = z * weight.to(dtype)[:, None, None] + bias.to(dtype)[:, None, None]
    return F.silu(z) if silu else z


def _statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x.unflatten(1, (groups, -1)), dim=(2, 3, 4), correction=0)
    return mean, (var + eps).rsqrt()


def _of_channels(statistic: Tensor, x: Tensor) -> Tensor:
    """(B, G) -> (B, C, 1, 1): a group's value at each of its channels."""
    per_group = x.shape[1] // statistic.shape[1]
    return statistic.repeat_interleave(per_group, dim=1)[:, :, None, None]


def _accumulated(x: Tensor) -> torch.dtype:
    """Of statistics and of the gradients of vectors."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """Of the outputs: channels_last if the channels of a pixel of x lie beside each other, and
    contiguous otherwise; contiguous where x is both (a single channel or pixel)."""
    is_nhwc = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if is_nhwc else torch.contiguous_format


def _joint(x: Tensor, skip: Tensor | None, add: Tensor | None) -> Tensor:
    """What is normalised, in x's dtype and memory format."""
    kind = memory_format(x)
    if skip is not None:
        x = torch.cat([x, skip], dim=1)
    if add is not None:
        x = x + add.to(x.dtype)[:, :, None, None]
    return x.contiguous(memory_format=kind)


def _aten_fits(x: Tensor) -> bool:
    """Whether aten's group norm takes both memory formats, float32 weights beside x of another dtype,
    and keeps float32 statistics then: not on a GPU, and not every torch has its backward on MPS. Its
    channels_last variance is E[x^2] - E[x]^2: at a mean of 10 standard deviations rstd is off by 2e-4
    (of 16384 x 10 normal numbers, float32), where the contiguous one's is off by 1e-7."""
    return device_type(x) == "cpu"


def _launches(x: Tensor) -> bool:
    return runs_triton(x) and x.dtype is not torch.float64


def _image(flat: Tensor, x: Tensor) -> Tensor:
    """(B, HW, C), dense, as (B, C, H, W) in the memory format of x."""
    image = flat.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    return image.contiguous(memory_format=memory_format(x))


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """As aten's group norm takes them: B, C, HW, G."""
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3], groups


@custom_op("fasttune::group_norm_silu_forward")
def group_norm_silu_forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, H, W), skip (B, S, H, W), weight and bias (C + S,), add (B, C), only without skip.

    Returns y (B, C + S, H, W), dense in `memory_format(x)`, and the statistics mean and rstd (B, G).
    """
    if _launches(x) and x.numel() > 0:
        flat, mean, rstd = launch_forward(x, skip, weight, bias, add, groups, eps, silu)
        return _image(flat, x), mean, rstd
    y, mean, rstd = _allocate_forward(x, skip, groups)
    if y.numel() == 0:
        return y, mean.zero_(), rstd.zero_()
    joint, dtype = _joint(x, skip, add), _accumulated(x)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if _aten_fits(x):
        y, mean, rstd = torch.native_group_norm(joint, weight, bias, *_sizes(joint, groups), eps)
        return (F.silu(y, inplace=True) if silu else y), mean, rstd
    wide = joint.to(dtype)
    mean, rstd = _statistics(wide, groups, eps)
    z = _affine(wide, mean, rstd, weight, bias)
    return y.copy_(F.silu(z, inplace=True) if silu else z), mean, rstd


def _affine(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scale = _of_channels(rstd, x) * weight[:, None, None]
    return (x - _of_channels(mean, x)).mul_(scale).add_(bias[:, None, None])


def _allocate_forward(x: Tensor, skip: Tensor | None, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean, rstd: as returned, real or fake."""
    batch, channels, height, width = x.shape
    channels += 0 if skip is None else skip.shape[1]
    y = torch.empty(
        (batch, channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format(x),
    )
    statistic = x.new_empty((batch, groups), dtype=_accumulated(x))
    return y, statistic, torch.empty_like(statistic)


@custom_op("fasttune::group_norm_silu_backward")
def group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    residual: Tensor | None,
    groups: int,
    silu: bool,
    wants_weight: bool,
    wants_add: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dskip, dadd (B, C), dweight, dbias (C + S,)); the vectors' are in float32.

    dy and residual are (B, C + S, H, W). The residual, the gradient of x and skip by another path, is
    added to dx and dskip and not to dadd. dx and dskip are dense in `memory_format(x)`. What is not
    wanted, and dskip without skip, has no elements.
    """
    if dy.numel() == 0:
        made = _allocate_backward(x, skip, weight, wants_weight, wants_add)
        return tuple(gradient.zero_() for gradient in made)  # type: ignore[return-value]
    if _launches(x):
        dx, dskip, *vectors = launch_backward(
            dy,
            x,
            skip,
            weight,
            bias,
            add,
            mean,
            rstd,
            residual,
            silu,
            wants_weight,
            wants_add,
        )
        dskip = dskip if skip is None else _image(dskip, x)
        return _image(dx, x), dskip, *vectors  # type: ignore[return-value]
    joint, dtype = _joint(x, skip, add), _accumulated(x)
    dy = dy.contiguous(memory_format=memory_format(joint))
    weight, bias = weight.to(dtype), bias.to(dtype)
    djoint, dweight, dbias = _differentiate_with_aten(
        dy, joint, weight, bias, mean, rstd, silu, wants_weight
    )
    dadd = djoint.sum(dim=(2, 3), dtype=dtype) if wants_add else x.new_empty(0, dtype=dtype)
    if residual is not None:
        djoint += residual
    if not wants_weight:
        dweight, dbias = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    if skip is None:
        return djoint, x.new_empty(0), dadd, dweight, dbias
    dx, dskip = djoint.split([x.shape[1], skip.shape[1]], dim=1)
    kind = memory_format(x)
    return dx.clone(memory_format=kind), dskip.clone(memory_format=kind), dadd, dweight, dbias


def _differentiate_with_aten(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias of what is normalised."""
    if silu:
        z = _affine(x.to(weight.dtype), mean, rstd, weight, bias)
        dy = torch.ops.aten.silu_backward(dy.to(z.dtype), z)
    if _aten_fits(x):
        sizes, wants = _sizes(x, mean.shape[1]), [True, wants_weight, wants_weight]
        aten = torch.ops.aten.native_group_norm_backward
        return aten(dy.to(x.dtype), x, mean, rstd, weight, *sizes, wants)
    dz = dy.to(weight.dtype)
    u_hat = (x - _of_channels(mean, x)).mul_(_of_channels(rstd, x))
    dbias, dweight = dz.sum(dim=(2, 3)), (dz * u_hat).sum(dim=(2, 3))  # of each sample
    groups, count = mean.shape[1], x[0].numel() // mean.shape[1]
    dmean, slope = (
        (sums * weight).unflatten(1, (groups, -1)).sum(dim=2) / count for sums in (dbias, dweight)
    )
    dx = dz * weight[:, None, None] - _of_channels(dmean, x) - u_hat.mul_(_of_channels(slope, x))
    return dx.mul_(_of_channels(rstd, x)).to(x.dtype), dweight.sum(dim=0), dbias.sum(dim=0)


def _allocate_backward(
    x: Tensor, skip: Tensor | None, weight: Tensor, wants_weight: bool, wants_add: bool
) -> Gradients:
    """dx, dskip, dadd, dweight, dbias: as returned, real or fake."""
    kind, dtype = memory_format(x), _accumulated(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=kind)
    if skip is None:
        dskip = x.new_empty(0)
    else:
        dskip = torch.empty(skip.shape, dtype=x.dtype, device=x.device, memory_format=kind)
    dadd = x.new_empty(x.shape[:2] if wants_add else 0, dtype=dtype)
    dweight = x.new_empty(weight.shape if wants_weight else 0, dtype=dtype)
    return dx, dskip, dadd, dweight, torch.empty_like(dweight)


@group_norm_silu_forward.register_fake
def _(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    groups: int,
    *_,
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_forward(x, skip, groups)


@group_norm_silu_backward.register_fake
def _(dy: Tensor, x: Tensor, skip: Tensor | None, weight: Tensor, *others) -> Gradients:
    *_, wants_weight, wants_add = others
    return _allocate_backward(x, skip, weight, wants_weight, wants_add)


def _save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, skip, weight, bias, add, groups, _, silu = inputs
    ctx.save_for_backward(x, skip, weight, bias, add, *output[1:])
    ctx.groups, ctx.silu = groups, silu  # type: ignore[attr-defined]


def _differentiate(ctx, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, skip, weight, bias, add, mean, rstd = ctx.saved_tensors
    needs_x, needs_skip, needs_weight, needs_bias, needs_add, *_none = ctx.needs_input_grad
    dx, dskip, dadd, dweight, dbias = group_norm_silu_backward(
        dy,
        x,
        skip,
        weight,
        bias,
        add,
        mean,
        rstd,
        None,
        ctx.groups,
        ctx.silu,
        needs_weight or needs_bias,
        needs_add,
    )
    return (
        dx if needs_x else None,
        dskip if needs_skip else None,
        dweight.to(weight.dtype) if needs_weight else None,
        dbias.to(bias.dtype) if needs_bias else None,
        dadd.to(add.dtype) if needs_add else None,
        None,
        None,
        None,
    )


group_norm_silu_forward.register_autograd(_differentiate, setup_context=_save)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    silu: bool = True,
    add: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """SiLU of the GroupNorm of x + add, or of x and skip side by side, or the GroupNorm alone.

    x (B, C, H, W), weight and bias (C,), add (B, C) -> (B, C, H, W). With skip (B, S, H, W), instead
    of add: weight and bias (C + S,) -> (B, C + S, H, W), as of torch.cat([x, skip], dim=1), and
    groups may hold channels of both. x is float16, bfloat16, float32 or float64, skip alike; weight,
    bias and add are of that dtype or float32. The result has x's dtype and is channels_last where x
    is, contiguous otherwise. ValueError for other shapes and dtypes.
    """
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise ValueError(
            f"group_norm_silu: x is {tuple(x.shape)} {x.dtype}; give (B, C, H, W) in float16, "
            "bfloat16, float32 or float64"
        )
    channels = x.shape[1]
    if skip is not None:
        if add is not None:
            raise ValueError("group_norm_silu: give add or skip, not both")
        if (skip.dim(), skip.dtype) != (4, x.dtype) or skip[:, :1].shape != x[:, :1].shape:
            raise ValueError(
                f"group_norm_silu: skip is {tuple(skip.shape)} {skip.dtype} beside x of "
                f"{tuple(x.shape)} {x.dtype}; only the number of channels may differ"
            )
        channels += skip.shape[1]
    if groups < 1 or channels % groups or channels == 0:
        raise ValueError(f"group_norm_silu: {channels} channels do not make {groups} groups")
    for name, vector, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("add", add, (x.shape[0], channels)),
    ):
        if vector is None:
            continue
        if vector.shape != shape or vector.dtype not in (x.dtype, torch.float32):
            raise ValueError(
                f"group_norm_silu: {name} is {tuple(vector.shape)} {vector.dtype}; give {shape} in "
                f"{x.dtype} or torch.float32"
            )
    return group_norm_silu_forward(x, skip, weight, bias, add, groups, eps, silu)[0]
