"""RMSNorm per head and rotary position embedding of queries and keys, from where the projection left
them, into where attention reads them.

    q, k, v = qkv.unbind(2)                       q_hat = q / sqrt(mean(q^2) + eps) * weight
    pair i of q turned by its token's angle i     (a, b) -> (a cos - b sin, a sin + b cos)

Text tokens, which have a projection and weights of their own, come from a second buffer and go in
front of the image's: nothing is concatenated. The backward computes the statistics again and writes
into the projection's gradient, so that the raw qkv is all that is kept; composed of single operations,
the normalised q and k are kept too.

B batch, N image tokens, T text tokens, H heads, E head width.

Source: https://arxiv.org/abs/2104.09864 (rotary), https://arxiv.org/abs/1910.07467 (RMSNorm)
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fasttune_kernels.dispatch import arch, custom_op, runs_triton
from fasttune_kernels.qk_norm_rope_kernels import (
    SUM_OPTIONS,
    SUM_TILE,
    QkNormRopeConfig,
    backward_kernel,
    forward_kernel,
    sum_kernel,
)
from fasttune_kernels.qk_norm_rope_torch import norm_rotate, norm_rotate_backward

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]
"""qkv, q_weight, k_weight, those of the text, cos, sin."""


def qk_norm_rope_ref(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    text_qkv: Tensor | None = None,
    text_q_weight: Tensor | None = None,
    text_k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, T + N, H, E) in float32, or float64 if that is given."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        x = x if x.dtype is torch.float64 else x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def turned(x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
        return pairs.flatten(-2)

    cos, sin = cos[:, None], sin[:, None]
    q, k, v = qkv.unbind(2)
    q, k = normed(q, q_weight), normed(k, k_weight)
    if text_qkv is not None and text_q_weight is not None and text_k_weight is not None:
        text_q, text_k, text_v = text_qkv.unbind(2)
        q = torch.cat([normed(text_q, text_q_weight), q], dim=1)
        k = torch.cat([normed(text_k, text_k_weight), k], dim=1)
        v = torch.cat([text_v, v], dim=1)
    return turned(q), turned(k), v.to(q.dtype)


@custom_op("fasttune::qk_norm_rope_forward")
def qk_norm_rope_forward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    text_qkv: Tensor | None,
    text_q_weight: Tensor | None,
    text_k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each (B, T + N, H, E) and contiguous, text tokens first. Without text v is empty (0):
    the caller has it, qkv[:, :, 2]."""
    q, k, v = outputs = _empty_outputs(qkv, text_qkv)
    text = text_qkv, text_q_weight, text_k_weight
    inputs = qkv, q_weight, k_weight, *text, cos, sin
    if runs_triton(qkv) and qkv.dtype is not torch.float64:
        _launch_forward(outputs, inputs, eps)
        return outputs
    for x, (q_weight, k_weight), tokens in _sources(inputs):
        rotation = torch.complex(cos[tokens], sin[tokens])[:, None]
        norm_rotate(x[:, :, 0], q_weight, rotation, eps, q[:, tokens])
        norm_rotate(x[:, :, 1], k_weight, rotation, eps, k[:, tokens])
        if text_qkv is not None:
            v[:, tokens].copy_(x[:, :, 2])
    return outputs


@custom_op("fasttune::qk_norm_rope_backward")
def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    text_qkv: Tensor | None,
    text_q_weight: Tensor | None,
    text_k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    wants_weights: bool,
) -> Gradients:
    """dq, dk, dv (B, T + N, H, E), any strides; None stands for a dv of zeros. Returns dqkv and
    dtext_qkv, contiguous, and the gradients of q_weight, k_weight, text_q_weight and text_k_weight,
    (E,) float32. What is not wanted, or is text without text, is empty (0)."""
    gradients = _empty_gradients(qkv, text_qkv, wants_weights)
    dqkv, dtext_qkv, *dweights = gradients
    text = text_qkv, text_q_weight, text_k_weight
    inputs = qkv, q_weight, k_weight, *text, cos, sin
    if runs_triton(qkv) and qkv.dtype is not torch.float64:
        _launch_backward(gradients, dq, dk, dv, inputs, eps)
        return gradients
    for x, (q_weight, k_weight), tokens in _sources(inputs):
        dx, sums = (dtext_qkv, dweights[2:]) if x is text_qkv else (dqkv, dweights[:2])
        turn_back = torch.complex(cos[tokens], -sin[tokens])[:, None]
        for slot, (dy, weight) in enumerate(((dq, q_weight), (dk, k_weight))):
            norm_rotate_backward(
                dy[:, tokens], x[:, :, slot], weight, turn_back, eps, dx[:, :, slot], sums[slot]
            )
        dx[:, :, 2].copy_(dx.new_zeros(()) if dv is None else dv[:, tokens])
    return gradients


def _launch_forward(outputs: tuple[Tensor, Tensor, Tensor], inputs: Inputs, eps: float) -> None:
    q, k, v = outputs
    if not q.numel():
        return
    config = _config(q)
    forward_kernel[config.tiles * q.shape[1], len(q)](
        q,
        k,
        v if v.numel() else None,
        *_arguments(inputs, eps),
        **config.constants(),
        **config.options(),
    )


def _launch_backward(
    gradients: Gradients, dq: Tensor, dk: Tensor, dv: Tensor | None, inputs: Inputs, eps: float
) -> None:
    dqkv, dtext_qkv, *dweights = gradients
    has_text, has_weights = inputs[3] is not None, dweights[0].numel() > 0
    config = _config(dqkv)
    tokens = config.tokens if has_weights else 1
    text_blocks = -(-dtext_qkv.shape[1] // tokens) if has_text else 0
    blocks = text_blocks + -(-dqkv.shape[1] // tokens)
    rows = len(dqkv) * config.tiles  # of sums, in a block of tokens
    sums = None
    if has_weights:
        sums = dqkv.new_empty(blocks * rows, 2, config.head_width, dtype=torch.float32)
    if dqkv.numel() + dtext_qkv.numel():
        dy = _dense(dq), _dense(dk), None if dv is None else _dense(dv)
        backward_kernel[config.tiles * blocks, len(dqkv)](
            dqkv,
            dtext_qkv if has_text else None,
            sums,
            *dy,
            *(stride for x in dy for stride in _strides(x, 3)),
            *_arguments(inputs, eps),
            TOKENS=tokens,
            **config.constants(),
            **config.options(),
        )
    if sums is not None:
        sum_kernel[-(-config.head_width // SUM_TILE["COLUMNS"]), 4 if has_text else 2](
            *dweights[:2],
            *(dweights[2:] if has_text else (None, None)),
            sums,
            text_blocks * rows,
            blocks * rows,
            WIDTH=config.head_width,
            **SUM_TILE,
            **SUM_OPTIONS,
        )


def _config(x: Tensor) -> QkNormRopeConfig:
    num_heads, head_width = x.shape[-2:]
    return QkNormRopeConfig.from_heuristic(num_heads, head_width, x.element_size(), arch(x.device))


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if x is None else x.stride()[:dims]


def _arguments(inputs: Inputs, eps: float) -> tuple[Tensor | float | None, ...]:
    """What both kernels read, from qkv_ptr to text_head_stride."""
    rows = [x if x is None else _dense(x) for x in inputs[:6]]
    num_tokens, num_text = len(inputs[6]), 0 if rows[3] is None else rows[3].shape[1]
    tables = (table.contiguous() for table in inputs[6:])
    strides = _strides(rows[0], 4) + _strides(rows[3], 4)
    return (*rows, *tables, eps, num_text, num_tokens, *strides)


def _sources(inputs: Inputs) -> list[tuple[Tensor, tuple[Tensor, Tensor], slice]]:
    """Each buffer with its weights and the tokens that it has of the outputs."""
    qkv, q_weight, k_weight, text_qkv, text_q_weight, text_k_weight, *_ = inputs
    if text_qkv is None or text_q_weight is None or text_k_weight is None:
        return [(qkv, (q_weight, k_weight), slice(None))]
    num_text = text_qkv.shape[1]
    text = text_qkv, (text_q_weight, text_k_weight), slice(0, num_text)
    return [text, (qkv, (q_weight, k_weight), slice(num_text, None))]


def _empty_outputs(qkv: Tensor, text_qkv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, _, *head = qkv.shape
    if text_qkv is not None:
        num_tokens += text_qkv.shape[1]
    q, k = (qkv.new_empty((batch, num_tokens, *head)) for _ in range(2))
    return q, k, qkv.new_empty(0) if text_qkv is None else torch.empty_like(q)


def _empty_gradients(qkv: Tensor, text_qkv: Tensor | None, wants_weights: bool) -> Gradients:
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    width = qkv.shape[-1] if wants_weights else 0
    text_width = 0 if text_qkv is None else width
    return (
        qkv.new_empty(qkv.shape),
        qkv.new_empty(0 if text_qkv is None else text_qkv.shape),
        qkv.new_empty(width, dtype=dtype),
        qkv.new_empty(width, dtype=dtype),
        qkv.new_empty(text_width, dtype=dtype),
        qkv.new_empty(text_width, dtype=dtype),
    )


@qk_norm_rope_forward.register_fake
def _(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, text_qkv: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(qkv, text_qkv)


@qk_norm_rope_backward.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    text_qkv: Tensor | None,
    *rest: object,
) -> Gradients:
    return _empty_gradients(qkv, text_qkv, wants_weights=rest[-1] is True)


def _save(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.set_materialize_grads(False)
    ctx.eps = inputs[-1]  # type: ignore[attr-defined]


def _differentiate(
    ctx: FunctionCtx, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of the op, whose v is empty without text."""
    has_text = ctx.saved_tensors[3] is not None  # type: ignore[attr-defined]
    return _gradients(ctx, dq, dk, dv if has_text else None)


def _gradients(
    ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of all arguments of the op; an output without a gradient has None."""
    tensors, wants = ctx.saved_tensors, ctx.needs_input_grad
    qkv, cos = tensors[0], tensors[6]
    if dq is None or dk is None:  # zeros that all tokens and heads share
        zeros = qkv.new_zeros(qkv.shape[-1]).expand(len(qkv), len(cos), *qkv.shape[3:])
        dq, dk = zeros if dq is None else dq, zeros if dk is None else dk
    wants_weights = any(wants[i] for i in (1, 2, 4, 5))
    dqkv, dtext_qkv, *dweights = qk_norm_rope_backward(dq, dk, dv, *tensors, ctx.eps, wants_weights)
    gradients = (dqkv, *dweights[:2], dtext_qkv, *dweights[2:])
    return (
        *(
            gradient.to(x.dtype) if wanted else None
            for gradient, x, wanted in zip(gradients, tensors, wants, strict=False)
        ),
        *(None, None, None),
    )


class _OneBuffer(torch.autograd.Function):
    """The op without text, with v as a view of qkv. Were the view made outside, autograd would put dv
    into zeros of qkv's size and add those to the op's gradient, which moves 14 times the bytes of q
    more. Here the backward writes dqkv once."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, _ = qk_norm_rope_forward(*arguments)
        return q, k, arguments[0][:, :, 2]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, *gradients)


qk_norm_rope_forward.register_autograd(_differentiate, setup_context=_save)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    text_qkv: Tensor | None = None,
    text_q_weight: Tensor | None = None,
    text_k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values for attention over text and image tokens together.

    qkv is (B, N, 3, H, E), E even; q_weight and k_weight are (E,), in qkv's dtype or float32. Text tokens
    come with all three of text_qkv (B, T, 3, H, E), text_q_weight and text_k_weight. cos and sin are
    (T + N, E / 2) float32, text tokens first, and get no gradient. Returns q, k, v (B, T + N, H, E) in
    qkv's dtype: float16, bfloat16, float32 or float64, computed in float32 at least. Without text, v is
    a view of qkv. ValueError for other shapes and dtypes.
    """
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    text = (text_qkv, text_q_weight, text_k_weight)
    if text_qkv is not None and text_q_weight is not None and text_k_weight is not None:
        weights |= {"text_q_weight": text_q_weight, "text_k_weight": text_k_weight}
    elif any(x is not None for x in text):
        raise ValueError("qk_norm_rope: text_qkv, text_q_weight, text_k_weight: give all or none")
    _check(qkv, text_qkv, weights, {"cos": cos, "sin": sin})
    arguments = qkv, q_weight, k_weight, *text, cos, sin, eps
    if text_qkv is None:
        found: tuple[Tensor, Tensor, Tensor] = _OneBuffer.apply(*arguments)
        return found
    q, k, v = qk_norm_rope_forward(*arguments)
    return q, k, v


def _check(
    qkv: Tensor, text_qkv: Tensor | None, weights: dict[str, Tensor], tables: dict[str, Tensor]
) -> None:
    if not qkv.is_floating_point() or qkv.dtype.itemsize == 1:
        raise _refusal("qkv", qkv, "float16, bfloat16 or float32")
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] == 0 or qkv.shape[4] % 2:
        raise _refusal("qkv", qkv, "(B, N, 3, H, E) with an even E")
    batch, num_tokens, _, heads, width = qkv.shape
    if text_qkv is not None:
        num_text = text_qkv.shape[1] if text_qkv.dim() == 5 else 0
        if text_qkv.shape != (batch, num_text, 3, heads, width) or text_qkv.dtype is not qkv.dtype:
            raise _refusal("text_qkv", text_qkv, f"({batch}, T, 3, {heads}, {width}) {qkv.dtype}")
        num_tokens += num_text
    dtype = weights["q_weight"].dtype
    for name, weight in weights.items():
        allowed = weight.dtype is dtype and dtype in (qkv.dtype, torch.float32)
        if weight.shape != (width,) or not allowed:
            raise _refusal(name, weight, f"({width},), all in {qkv.dtype} or all in float32")
    for name, table in tables.items():
        if table.shape != (num_tokens, width // 2) or table.dtype is not torch.float32:
            raise _refusal(name, table, f"({num_tokens}, {width // 2}) torch.float32")


def _refusal(name: str, x: Tensor, allowed: str) -> ValueError:
    return ValueError(f"qk_norm_rope: {name} is {tuple(x.shape)} {x.dtype}; give {allowed}")
