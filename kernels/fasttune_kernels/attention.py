"""Softmax attention, dispatched to a backend.

The layout is (B, L, H, E), which is how a Linear leaves its output: heads are split by a view and
merged by a view, and no backend is forced on the caller. Saved for the backward are q, k, v, the
output and the logarithm of the softmax's denominator; probabilities are recomputed.

B batch, L query tokens, S key tokens, H heads, E head width.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fasttune_kernels.attention_dispatch import Backend, backend_of
from fasttune_kernels.dispatch import custom_op
from fasttune_kernels.flash_attention import flash_attention_backward, flash_attention_forward
from fasttune_kernels.short_attention import short_attention_backward, short_attention_forward

Gradients = tuple[Tensor, Tensor, Tensor]

_SCORES_BYTES = 128 << 20
"""Of one block of scores where they are materialised: Flux at 4608 tokens would have 1.9 GiB."""

aten = torch.ops.aten


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: softmax(q k^T / sqrt(E)) v and the scores' logsumexp (B, H, L).

    q (B, L, H, E), k and v (B, S, H, E), mask (B, S) bool, True for the keys that are attended to.
    """
    scores = torch.einsum("blhe,bshe->bhls", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    return torch.einsum("bhls,bshe->blhe", scores.softmax(-1), v), scores.logsumexp(-1)


def _swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)  # (B, L, H, E) <-> (B, H, L, E), a view


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B, S) bool -> what is added to the scores, (B, 1, 1, S)."""
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, -math.inf)[:, None, None, :]


def _blocks(q: Tensor, k: Tensor) -> range:
    """Starts of blocks of queries whose scores fit _SCORES_BYTES; its step is their length."""
    row = q.shape[0] * q.shape[2] * k.shape[1] * 4
    return range(0, q.shape[1], max(_SCORES_BYTES // max(row, 1), 1))


def _math_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Block by block of queries, products and softmax in float32: where there is no fused op."""
    wide = _accumulator(q)
    bias = _bias(mask, wide)
    keys = _swap(k).to(wide).transpose(-2, -1)  # (B, H, E, S)
    values = _swap(v).to(wide)
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)
    blocks = _blocks(q, k)
    for start in blocks:
        rows = slice(start, start + blocks.step)
        scores = (_swap(q[:, rows]).to(wide) * q.shape[-1] ** -0.5) @ keys
        if bias is not None:
            scores += bias
        lse[:, :, rows] = scores.logsumexp(-1)
        p = scores.sub_(lse[:, :, rows, None]).exp_()
        out[:, rows] = _swap(p @ values)
    return out, lse


def _math_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> Gradients:
    wide, scale = _accumulator(q), q.shape[-1] ** -0.5
    bias = _bias(mask, wide)
    keys, values = _swap(k).to(wide), _swap(v).to(wide)
    dq = q.new_empty(q.shape)
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    blocks = _blocks(q, k)
    for start in blocks:
        rows = slice(start, start + blocks.step)
        queries = _swap(q[:, rows]).to(wide) * scale
        d = _swap(dout[:, rows]).to(wide)
        scores = queries @ keys.transpose(-2, -1)
        if bias is not None:
            scores += bias
        p = scores.sub_(lse[:, :, rows, None]).exp_()
        dvalues += p.transpose(-2, -1) @ d
        # d softmax: dS = P (dP - rowsum(dP P)), and rowsum(dP P) = rowsum(dO O)
        delta = (d * _swap(out[:, rows])).sum(-1, keepdim=True)
        ds = (d @ values.transpose(-2, -1)).sub_(delta).mul_(p)
        dq[:, rows] = _swap((ds @ keys) * scale)
        dkeys += ds.transpose(-2, -1) @ queries
    return dq, _swap(dkeys).to(q.dtype), _swap(dvalues).to(q.dtype)


# PyTorch's fused attention, (B, H, L, E). Each takes logsumexp back in the shape it gave it in.


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *map(_swap, (q, k, v)), attn_mask=_bias(mask, q.dtype)
    )
    return _swap(out), lse


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> Gradients:
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *map(_swap, (dout, q, k, v, out)), lse, 0.0, False, attn_mask=_bias(mask, q.dtype)
    )
    return _swap(dq), _swap(dk), _swap(dv)


def _seeds(q: Tensor) -> tuple[Tensor, Tensor]:
    """Of dropout, which there is none of: of the types that the forward gives, never read."""
    if torch.version.hip is not None:
        return q.new_empty((), dtype=torch.int64), q.new_empty((), dtype=torch.int64)
    return q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(*map(_swap, (q, k, v)))
    return _swap(out), lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> Gradients:
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        *map(_swap, (dout, q, k, v, out)),
        lse,
        None,  # cumulative lengths, of nested tensors
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        False,
        *_seeds(q),
    )
    return _swap(dq), _swap(dk), _swap(dv)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*map(_swap, (q, k, v)), None, True)
    return _swap(out), lse.view(lse.shape[:3])  # (B, H, L, 1)


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> Gradients:
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        *map(_swap, (dout, q, k, v, out)),
        lse[..., None],
        q.new_empty((), dtype=torch.int64),  # dropout's seed and offset, never read
        q.new_empty((), dtype=torch.int64),
        None,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        False,
    )
    return _swap(dq), _swap(dk), _swap(dv)


def _aligned_bias(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """(B, H, L, S), expanded. A row begins at a multiple of 16, as the kernel's loads want it."""
    if mask is None:
        return None
    B, S = mask.shape
    bias = q.new_zeros((B, -(-S // 16) * 16))[:, :S]
    bias.masked_fill_(~mask, -math.inf)
    return bias[:, None, None, :].expand(B, q.shape[2], q.shape[1], S)


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        *map(_swap, (q, k, v)), _aligned_bias(q, k, mask), True
    )
    return _swap(out), lse[:, :, : q.shape[1]]  # NVIDIA: rows up to a multiple of 32


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> Gradients:
    if torch.version.hip is None:  # infinite, as the forward has it: probabilities of 0
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        *map(_swap, (dout, q, k, v)),
        _aligned_bias(q, k, mask),
        _swap(out),
        lse,
        q.new_empty((), dtype=torch.int64),  # dropout's seed and offset, never read
        q.new_empty((), dtype=torch.int64),
        0.0,
        [True, True, True, False],
    )
    return _swap(dq), _swap(dk), _swap(dv)


def _short_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return short_attention_forward(q, k, v)


def _short_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> Gradients:
    return short_attention_backward(dout, q, k, v, out, lse)


# The table of attention_dispatch.py names these.
FORWARD: dict[Backend, Callable[..., tuple[Tensor, Tensor]]] = {
    "short": _short_forward,
    "cudnn": _cudnn_forward,
    "flash": _flash_forward,
    "efficient": _efficient_forward,
    "own_flash": flash_attention_forward,
    "cpu": _cpu_forward,
    "math": _math_forward,
}
BACKWARD: dict[Backend, Callable[..., Gradients]] = {
    "short": _short_backward,
    "cudnn": _cudnn_backward,
    "flash": _flash_backward,
    "efficient": _efficient_backward,
    "own_flash": flash_attention_backward,
    "cpu": _cpu_backward,
    "math": _math_backward,
}


@custom_op("fasttune::attention_forward")
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> (out (B, L, H, E) contiguous, lse (B, H, L) float32; float64 of float64)."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    out, lse = FORWARD[backend_of(q, k, mask)](q, k, v, mask)
    return out.contiguous(), lse.contiguous()


@custom_op("fasttune::attention_backward")
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (dq, dk, dv), contiguous, of the shapes of q, k and v. The same bits on every run from the
    CPU, from Triton and from math; flash, efficient and cuDNN add with atomics, unless
    torch.use_deterministic_algorithms."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    backward = BACKWARD[backend_of(q, k, mask)]
    dq, dk, dv = backward(dout.contiguous(), q, k, v, out.contiguous(), lse, mask)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def forward_flops(q_shape: Sequence[int], k_shape: Sequence[int]) -> int:
    """Of attention_forward, 2 a multiply-add, two products. Not registered with torch's counter:
    its import takes 0.12 s."""
    B, L, H, E = q_shape
    return 4 * B * H * L * k_shape[1] * E


def backward_flops(q_shape: Sequence[int], k_shape: Sequence[int]) -> int:
    """Of attention_backward: five products, one of which computes the scores again."""
    return forward_flops(q_shape, k_shape) // 2 * 5


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    B, L, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, L), dtype=_accumulator(q))


@attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    output: tuple[Tensor, Tensor],
) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])  # type: ignore[arg-type]


def _backward(
    ctx: torch.autograd.function.BackwardCFunction, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None]:
    return *attention_backward(dout, *ctx.saved_tensors), None


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, per head.

    q is (B, L, H, E); k and v are (B, S, H, E); mask is (B, S) bool, True for the keys that are
    attended to, and every row of it needs one True. Returns (B, L, H, E) in q's dtype, contiguous;
    scores and softmax are accumulated in float32. ValueError for other shapes and dtypes.
    """
    _check(q, k, v, mask)
    return attention_forward(q, k, v, mask)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"q (B, L, H, E), k and v (B, S, H, E) expected, not {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch, heads or head width"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(
            f"q, k and v of one floating dtype expected, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != k.shape[:2]):
        raise ValueError(
            f"a bool mask of {tuple(k.shape[:2])}, not {mask.dtype} of {tuple(mask.shape)}"
        )
