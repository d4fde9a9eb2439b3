"""Normalisation of token rows, with weights or with per-sample modulation, in one pass.

    x_hat = (x - mean) / sqrt(var + eps)      LayerNorm; RMSNorm: x / sqrt(mean(x^2) + eps)
    y = (1 + scale) (weight x_hat + bias) + shift

That is LayerNorm (arXiv 1607.06450), RMSNorm (arXiv 1910.07467) and adaLN (arXiv 2212.09748). For one
sample both affine maps are one, y = w x_hat + c with w = (1 + scale) weight, so each kernel knows one
vector, and all gradients of vectors follow from two sums over the sample's rows: S1 = sum dy x_hat and
S0 = sum dy. Kept for the backward are the rows' statistics beside the inputs, never x_hat.

B samples, N tokens of each, D width.
"""

from typing import Any

import torch
from torch import Tensor

from fasttune_kernels.dispatch import custom_op, device_type, runs_triton
from fasttune_kernels.norm_modulate_kernels import MAX_WIDTH
from fasttune_kernels.norm_modulate_launch import launch_backward, launch_forward


def norm_modulate_ref(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    rms: bool = False,
) -> Tensor:
    """The definition, arguments as in norm_modulate; in float32, or in float64 for float64."""
    x = x.to(wide_dtype(x))
    if not rms:
        x = x - x.mean(-1, keepdim=True)
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    if scale is not None:
        y = y * (1 + scale[:, None].to(y.dtype))
    return y if shift is None else y + shift[:, None]


def wide_dtype(x: Tensor) -> torch.dtype:
    """Of statistics, sums and gradients of vectors."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def has_kernel(x: Tensor) -> bool:
    """Whether the norm of x runs in Triton."""
    return (
        runs_triton(x) and x.dtype != torch.float64 and 0 < x.numel() and x.shape[-1] <= MAX_WIDTH
    )


def _affine(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """w and c of y = w x_hat + c: (B, D), or (1, D) without modulation."""
    dtype = wide_dtype(x)
    w = torch.ones(1, x.shape[-1], dtype=dtype, device=x.device) if weight is None else weight[None]
    c = torch.zeros_like(w) if bias is None else bias[None]
    w, c = w.to(dtype), c.to(dtype)
    if scale is not None:
        factor = 1 + scale.to(dtype)
        w, c = w * factor, c * factor
    return w, c if shift is None else c + shift.to(dtype)


def _native_dtype(x: Tensor) -> torch.dtype:
    """For which aten's LayerNorm keeps float32 statistics and takes float32 weights; of the reduced
    ones the CPU's kernel alone does."""
    return x.dtype if device_type(x) == "cpu" else wide_dtype(x)


def _forward_rows(
    x: Tensor, w: Tensor, c: Tensor, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd with one w and c (D,) for all rows of x."""
    if not rms:
        y, mean, rstd = torch.native_layer_norm(x.to(_native_dtype(x)), x.shape[-1:], w, c, eps)
        return y.to(x.dtype), mean[..., 0], rstd[..., 0]
    wide = x.to(w.dtype)
    rstd = wide.square().mean(-1).add_(eps).rsqrt_()
    return (wide * rstd[..., None]).mul_(w).add_(c).to(x.dtype), rstd.new_empty(0), rstd


def _forward_torch(
    x: Tensor, w: Tensor, c: Tensor, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if len(w) == len(c) == 1:
        return _forward_rows(x, w[0], c[0], eps, rms)
    w, c = w.expand(len(x), -1), c.expand(len(x), -1)
    # A LayerNorm a sample, with weights of its own: one pass and one rounding.
    y = x.new_empty(x.shape)
    rstd = torch.empty(x.shape[:2], dtype=w.dtype, device=x.device)
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    for b in range(len(x)):
        y[b], row_mean, rstd[b] = _forward_rows(x[b], w[b], c[b], eps, rms)
        if not rms:
            mean[b] = row_mean
    return y, mean, rstd


def _backward_rows(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Tensor, rms: bool, wants_sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, S1 (D,) and S0 (D,) with one w (D,) for all rows of x."""
    if not rms:
        # aten's sums on a CPU are in dy's dtype: of 2048 rows in bfloat16, 9 % off.
        dtype = w.dtype if wants_sums else _native_dtype(x)
        dx, s1, s0 = torch.ops.aten.native_layer_norm_backward(
            dy.to(dtype),
            x.to(dtype),
            x.shape[-1:],
            mean[..., None],
            rstd[..., None],
            w,
            w,  # stands for the bias, whose values are not used
            [True, wants_sums, wants_sums],
        )
        return dx.to(x.dtype), s1, s0
    x_hat = x.to(w.dtype) * rstd[..., None]
    dy = dy.to(w.dtype)
    products = dy * x_hat
    rows = tuple(range(x.dim() - 1))
    s1, s0 = (products.sum(rows), dy.sum(rows)) if wants_sums else (None, None)
    mean_product = products.mul_(w).mean(-1, keepdim=True)
    dx = torch.mul(dy, w, out=products).sub_(x_hat.mul_(mean_product)).mul_(rstd[..., None])
    return dx.to(x.dtype), s1, s0


def _backward_torch(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Tensor,
    rms: bool,
    per_sample: bool,
    wants_sums: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, S1 and S0, the sums (B, D), or (1, D) without modulation."""
    if len(x) == 1 or not per_sample:
        dx, s1, s0 = _backward_rows(dy, x, mean, rstd, w[0], rms, wants_sums)
        return dx, None if s1 is None else s1[None], None if s0 is None else s0[None]
    w = w.expand(len(x), -1)
    dx = x.new_empty(x.shape)
    s1, s0 = (torch.empty_like(w, memory_format=torch.contiguous_format) for _ in range(2))
    for b in range(len(x)):
        row_mean = mean if rms else mean[b]
        dx[b], row_s1, row_s0 = _backward_rows(
            dy[b], x[b], row_mean, rstd[b], w[b], rms, wants_sums
        )
        if row_s1 is not None and row_s0 is not None:
            s1[b], s0[b] = row_s1, row_s0
    return dx, s1, s0


@custom_op("fasttune::norm_modulate_forward")
def norm_modulate_forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, N, D) in x's dtype, and float32 mean (B, N), empty(0) for RMSNorm, and rstd (B, N).

    x's last dimension is contiguous, as are the vectors' of (B, D) and (D,), of any float dtype.
    """
    if has_kernel(x):
        return launch_forward(x, None, None, scale, shift, weight, bias, eps, rms)[1:]
    w, c = _affine(x, scale, shift, weight, bias)
    if x.numel() == 0:
        rstd = w.new_empty(x.shape[:2])
        return x.new_empty(x.shape), w.new_empty(0 if rms else x.shape[:2]), rstd
    return _forward_torch(x, w, c, eps, rms)


@norm_modulate_forward.register_fake
def _(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[:2], dtype=wide_dtype(x))
    return x.new_empty(x.shape), rstd.new_empty(0) if rms else torch.empty_like(rstd), rstd


@custom_op("fasttune::norm_modulate_backward")
def norm_modulate_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    rms: bool,
    wants_modulation: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx (B, N, D) in x's dtype, and float32 dscale, dshift (B, D), dweight, dbias (D,).

    residual (B, N, D) is added to dx: the gradient of the stream around the norm. Gradients of
    vectors that are not wanted are empty(0).
    """
    if has_kernel(x):
        vectors = scale, weight, bias
        wanted = wants_modulation, wants_weight
        return launch_backward(dy, x, mean, rstd, *vectors, residual, rms, *wanted)
    w, _ = _affine(x, scale, None, weight, None)
    wants_sums = wants_modulation or wants_weight
    s1: Tensor | None
    s0: Tensor | None
    if x.numel() == 0:
        dx, s1, s0 = x.new_empty(x.shape), *(w.new_zeros(len(x), x.shape[-1]) for _ in range(2))
    else:
        per_sample = scale is not None or wants_modulation
        dx, s1, s0 = _backward_torch(dy, x, mean, rstd, w, rms, per_sample, wants_sums)
    if residual is not None:
        dx.add_(residual)
    dscale, dshift, dweight, dbias = (w.new_empty(0) for _ in range(4))
    if wants_weight:
        assert s1 is not None and s0 is not None
        factor = 1 if scale is None else 1 + scale.to(s1.dtype)
        dweight, dbias = (factor * s1).sum(0), (factor * s0).sum(0)
    if wants_modulation:
        assert s1 is not None and s0 is not None
        dscale = s1 if weight is None else s1 * weight
        dscale, dshift = dscale if bias is None else dscale.addcmul(s0, bias.to(s0.dtype)), s0
    return dx, dscale, dshift, dweight, dbias


@norm_modulate_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    rms: bool,
    wants_modulation: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    vectors = (x.shape[0], x.shape[2]) if wants_modulation else (0,)
    weights = (x.shape[2],) if wants_weight else (0,)
    dtype = wide_dtype(x)
    dscale, dshift = (x.new_empty(vectors, dtype=dtype) for _ in range(2))
    dweight, dbias = (x.new_empty(weights, dtype=dtype) for _ in range(2))
    return x.new_empty(x.shape), dscale, dshift, dweight, dbias


def save_norm(
    ctx: Any,
    first: int,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    rms: bool,
) -> tuple[Tensor | None, ...]:
    """What the backward of a norm keeps; `vectors` are scale, shift, weight and bias, which are
    inputs `first` and following of the op."""
    scale, shift, weight, bias = vectors
    wants_scale, wants_shift, *wants_weights = ctx.needs_input_grad[first : first + 4]
    ctx.wants_modulation = wants_scale or wants_shift
    ctx.wants_weight = any(wants_weights)
    ctx.rms = rms
    ctx.vector_dtypes = tuple(None if v is None else v.dtype for v in vectors)
    # The bias is in dscale alone.
    return x, None if rms else mean, rstd, scale, weight, bias if ctx.wants_modulation else None


def backward_of_norm(
    ctx: Any, first: int, dy: Tensor, saved: tuple[Tensor | None, ...], residual: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """dx, and the gradients of scale, shift, weight and bias in their dtypes."""
    x, mean, rstd, scale, weight, bias = saved
    assert x is not None and rstd is not None
    dx, *gradients = norm_modulate_backward(
        dy,
        x,
        rstd.new_empty(0) if mean is None else mean,
        rstd,
        scale,
        weight,
        bias,
        residual,
        ctx.rms,
        ctx.wants_modulation,
        ctx.wants_weight,
    )
    wanted = ctx.needs_input_grad[first : first + 4]
    return dx, tuple(
        gradient.to(dtype) if wants else None
        for wants, gradient, dtype in zip(wanted, gradients, ctx.vector_dtypes, strict=True)
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, *vectors, _, rms = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*save_norm(ctx, 1, x, mean, rstd, tuple(vectors), rms))


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, gradients = backward_of_norm(ctx, 1, dy, ctx.saved_tensors, None)
    return dx, *gradients, None, None


norm_modulate_forward.register_autograd(_backward, setup_context=_setup_context)


def check_norm(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """ValueError unless x is (B, N, D), scale and shift (B, D), weight and bias (D,), all float."""
    if x.dim() != 3 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it has to be float (B, N, D)")
    rows, row = (x.shape[0], x.shape[2]), (x.shape[2],)
    for name, vector, shape in (
        ("scale", scale, rows),
        ("shift", shift, rows),
        ("weight", weight, row),
        ("bias", bias, row),
    ):
        if vector is not None and (vector.shape != shape or not vector.is_floating_point()):
            raise ValueError(
                f"{name} is {vector.dtype} {tuple(vector.shape)}; with x {tuple(x.shape)} it has"
                f" to be float {shape}"
            )


def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    rms: bool = False,
) -> Tensor:
    """(1 + scale) norm(x) + shift, where norm is LayerNorm or, with rms, RMSNorm.

    x is (B, N, D); scale and shift (B, D), one row a sample, such as chunks of one projection;
    weight and bias (D,), those of the norm; each may be None, and of any float dtype. Returns
    (B, N, D) in x's dtype, rounded once. The backward keeps x and two numbers a row.
    ValueError for other shapes.
    """
    check_norm(x, scale, shift, weight, bias)
    return norm_modulate_forward(x, scale, shift, weight, bias, eps, rms)[0]
