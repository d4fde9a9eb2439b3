"""The gated sum of a block's residual stream, alone and with the norm that reads it next.

    out = x + gate y          gate a vector per sample (arXiv 2212.09748), or absent
    normed = norm_modulate(out, ...)

Fused, the stream is written once and not read again: the norm sees it in registers, rounded as it is
stored, so that a backward from the stored stream sees the same numbers.

B samples, N tokens of each, D width.
"""

from typing import Any

import torch
from torch import Tensor

from fasttune_kernels.dispatch import custom_op, runs_triton
from fasttune_kernels.gated_residual_kernels import launch_gate, launch_gate_backward
from fasttune_kernels.norm_modulate import (
    backward_of_norm,
    check_norm,
    has_kernel,
    norm_modulate_forward,
    norm_modulate_ref,
    save_norm,
    wide_dtype,
)
from fasttune_kernels.norm_modulate_launch import launch_forward


def gated_residual_ref(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """The definition, arguments as in gated_residual; in float32, or in float64 for float64."""
    x, y = x.to(wide_dtype(x)), y.to(wide_dtype(x))
    return x + y if gate is None else x + gate[:, None] * y


def _has_kernel(x: Tensor) -> bool:
    return runs_triton(x) and x.dtype != torch.float64 and x.numel() > 0


def gated_residual_norm_modulate_ref(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition, arguments as in gated_residual_norm_modulate."""
    out = gated_residual_ref(x, y, gate)
    return out, norm_modulate_ref(out, scale, shift, weight, bias, eps=eps, rms=rms)


@custom_op("fasttune::gated_residual_forward")
def gated_residual_forward(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate y (B, N, D) of x, y (B, N, D) of one dtype and gate (B, D) of any float dtype."""
    if _has_kernel(x):
        return launch_gate(x, y, gate)
    out = x.new_empty(x.shape)
    if gate is None:
        return torch.add(x, y, out=out)
    return torch.addcmul(x, gate[:, None], y, out=out)


@gated_residual_forward.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("fasttune::gated_residual_norm_forward")
def gated_residual_norm_forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out and normed (B, N, D) in x's dtype, and out's statistics as norm_modulate_forward's."""
    if has_kernel(x):
        out, normed, mean, rstd = launch_forward(x, y, gate, scale, shift, weight, bias, eps, rms)
        assert out is not None
        return out, normed, mean, rstd
    out = gated_residual_forward(x, y, gate)
    return out, *norm_modulate_forward(out, scale, shift, weight, bias, eps, rms)


@gated_residual_norm_forward.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[:2], dtype=wide_dtype(x))
    mean = rstd.new_empty(0) if rms else torch.empty_like(rstd)
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, rstd


@custom_op("fasttune::gated_residual_backward")
def gated_residual_backward(
    dout: Tensor, y: Tensor | None, gate: Tensor | None, wants_gate: bool
) -> tuple[Tensor, Tensor]:
    """dy (B, N, D) in dout's dtype and float32 dgate (B, D), empty(0) unless wanted.

    y is for dgate alone. dx is dout itself, as is dy without a gate: then it is a copy here.
    """
    assert y is not None or not wants_gate, "dgate needs y"
    if gate is not None and _has_kernel(dout):
        return launch_gate_backward(dout, y, gate, wants_gate)
    dy = dout.new_empty(dout.shape)
    if gate is None:
        dy.copy_(dout)
    else:
        torch.mul(dout, gate[:, None], out=dy)
    dtype = wide_dtype(dout)
    if y is None or not wants_gate:
        return dy, dout.new_empty(0, dtype=dtype)
    dgate = dout.new_empty((dout.shape[0], dout.shape[2]), dtype=dtype)
    for b in range(len(dout)):
        torch.sum(dout[b].to(dtype) * y[b], 0, out=dgate[b])
    return dy, dgate


@gated_residual_backward.register_fake
def _(
    dout: Tensor, y: Tensor | None, gate: Tensor | None, wants_gate: bool
) -> tuple[Tensor, Tensor]:
    shape = (dout.shape[0], dout.shape[2]) if wants_gate else (0,)
    return dout.new_empty(dout.shape), dout.new_empty(shape, dtype=wide_dtype(dout))


def _save_gate(ctx: Any, y: Tensor, gate: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    ctx.gate_dtype = None if gate is None else gate.dtype
    return y if ctx.needs_input_grad[2] else None, gate


def _backward_of_gate(
    ctx: Any, dout: Tensor, y: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx, dy, dgate."""
    if gate is None:
        return dout, dout, None
    dy, dgate = gated_residual_backward(dout, y, gate, y is not None)
    return dout, dy, None if y is None else dgate.to(ctx.gate_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*_save_gate(ctx, inputs[1], inputs[2]))


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return _backward_of_gate(ctx, dout, *ctx.saved_tensors)


gated_residual_forward.register_autograd(_backward, setup_context=_setup_context)


def _setup_norm_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    _, y, gate, *vectors, _, rms = inputs
    out, _, mean, rstd = output
    norm = save_norm(ctx, 3, out, mean, rstd, tuple(vectors), rms)
    ctx.save_for_backward(*_save_gate(ctx, y, gate), *norm)


def _norm_backward(
    ctx: Any, dout: Tensor, dnormed: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    y, gate, *norm = ctx.saved_tensors
    dstream, gradients = backward_of_norm(ctx, 3, dnormed, tuple(norm), dout)
    return *_backward_of_gate(ctx, dstream, y, gate), *gradients, None, None


gated_residual_norm_forward.register_autograd(_norm_backward, setup_context=_setup_norm_context)


def _check_gate(x: Tensor, y: Tensor, gate: Tensor | None) -> None:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; it has to be float (B, N, D)")
    if y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(
            f"y is {y.dtype} {tuple(y.shape)}; it has to be as x, {x.dtype} {tuple(x.shape)}"
        )
    shape = (x.shape[0], x.shape[2])
    if gate is not None and (gate.shape != shape or not gate.is_floating_point()):
        raise ValueError(
            f"gate is {gate.dtype} {tuple(gate.shape)}; with x {tuple(x.shape)} it has to be"
            f" float {shape}"
        )


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate y; x and y are (B, N, D) of one dtype, gate is (B, D), one row a sample, or None.

    Returns (B, N, D) in x's dtype, rounded once. The backward keeps gate, and y where the gate
    has a gradient. ValueError for other shapes or dtypes.
    """
    _check_gate(x, y, gate)
    return gated_residual_forward(x, y, gate)


def gated_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """out = gated_residual(x, y, gate), and norm_modulate(out, ...), with their arguments.

    Both are (B, N, D) in x's dtype. The backward keeps out and two numbers a row, gate, and y
    where the gate has a gradient. ValueError as theirs.
    """
    _check_gate(x, y, gate)
    check_norm(x, scale, shift, weight, bias)
    out, normed, _, _ = gated_residual_norm_forward(
        x, y, gate, scale, shift, weight, bias, eps, rms
    )
    return out, normed
