"""Attention, and what Flux does to queries and keys before it.

B batch, N tokens, T text tokens, L queries, S keys, H heads, E head width.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import libraries
from benchmarks.gpu.libraries import Inputs
from benchmarks.gpu.names import BOTH, FORWARD, OURS
from benchmarks.gpu.operation import (
    FLUX_IMAGE,
    FLUX_TEXT,
    FLUX_TOKENS,
    STREAMS,
    Draw,
    Operation,
    Sizes,
    Target,
    bound,
    bytes_of,
)
from fasttune.models.rope import rope_table
from fasttune_kernels import attention, qk_norm_rope
from fasttune_kernels.flash_attention import flash_attention_backward, flash_attention_forward

FLUX_AXES = (16, 56, 56)
_EPS = 1e-6


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]  # (N, 1, E / 2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def _normed(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    width = q_weight.shape
    return F.rms_norm(q, width, q_weight, _EPS), F.rms_norm(k, width, k_weight, _EPS), v


def _norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _normed(qkv, q_weight, k_weight)
    return _turned(q, cos, sin), _turned(k, cos, sin), v


def _text_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    text_qkv: Tensor,
    text_q_weight: Tensor,
    text_k_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    text = _normed(text_qkv, text_q_weight, text_k_weight)
    image = _normed(qkv, q_weight, k_weight)
    q, k, v = (torch.cat(both, dim=1) for both in zip(text, image, strict=True))
    return _turned(q, cos, sin), _turned(k, cos, sin), v


def _norm_rope_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    """(B, N, H, E); the table's axes split E as Flux does, or a fourth and twice three eighths."""
    batch, tokens, heads, width = sizes
    cos, sin = _table(tokens, width, draw)
    return {
        "qkv": draw(batch, tokens, 3, heads, width),
        "q_weight": 1 + draw(width, scale=0.1),
        "k_weight": 1 + draw(width, scale=0.1),
        "cos": cos,
        "sin": sin,
    }


def _text_norm_rope_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    """(B, T, N, H, E)."""
    batch, text, image, heads, width = sizes
    cos, sin = _table(text + image, width, draw)
    return {
        **_norm_rope_inputs((batch, image, heads, width), draw),
        "cos": cos,
        "sin": sin,
        "text_qkv": draw(batch, text, 3, heads, width),
        "text_q_weight": 1 + draw(width, scale=0.1),
        "text_k_weight": 1 + draw(width, scale=0.1),
    }


def _table(tokens: int, width: int, draw: Draw) -> tuple[Tensor, Tensor]:
    axes = FLUX_AXES if width == sum(FLUX_AXES) else (width // 4, width // 8 * 3, width // 8 * 3)
    side = math.isqrt(tokens)
    cos, sin = rope_table(side, side, tokens - side * side, axes=axes, device=draw.generator.device)
    return cos[:, 0], sin[:, 0]


def _norm_rope_bytes(
    inputs: Inputs, outputs: Sequence[Tensor], trained: Sequence[str]
) -> tuple[int, int]:
    """v is a view in the forward. The backward reads dq, dk, dv and q, k and writes dqkv."""
    q, k, v = outputs
    others = bytes_of([t for name, t in inputs.items() if name != "qkv"])
    return 2 * bytes_of([q, k]) + others, 3 * bytes_of([q, k]) + 2 * v.nbytes + others


def _text_norm_rope_bytes(
    inputs: Inputs, outputs: Sequence[Tensor], trained: Sequence[str]
) -> tuple[int, int]:
    """The backward needs no v."""
    forward = bytes_of([*inputs.values(), *outputs])
    return forward, forward - outputs[2].nbytes + bytes_of([inputs[name] for name in trained])


def _norm_rope_attention(**inputs: Tensor) -> Tensor:
    return _sdpa(*_norm_rope(**inputs))


def _our_norm_rope_attention(**inputs: Tensor) -> Tensor:
    return attention(*qk_norm_rope(**inputs))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """By its equation: the kernels that `_sdpa` dispatches to are among what is checked."""
    scores = torch.einsum("blhe,bshe->bhls", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return torch.einsum("bhls,bshe->blhe", scores.softmax(-1), v)


class _OwnFlash(torch.autograd.Function):
    """Our flash kernel wherever it is called: the dispatcher takes it where PyTorch has none."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, lse = flash_attention_forward(q, k, v, mask)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask = ctx.saved_tensors
        return *flash_attention_backward(dout.contiguous(), q, k, v, out, lse, mask), None


def _own_flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Callable[[], Tensor]:
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return lambda: _OwnFlash.apply(q, k, v, mask)  # type: ignore[no-untyped-call, no-any-return]


def _attention_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    """(B, L, S, H, E), L queries and S keys."""
    batch, queries, keys, heads, width = sizes
    return {
        "q": draw(batch, queries, heads, width),
        "k": draw(batch, keys, heads, width),
        "v": draw(batch, keys, heads, width),
    }


def _masked_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    """Each sample has text of its own length, in front of what is always attended to."""
    batch, _, keys, _, _ = sizes
    places = torch.arange(keys, device=draw.generator.device)
    lengths = 1 + torch.arange(batch, device=places.device)[:, None] * keys // (3 * batch)
    mask = (places < lengths) | (places >= keys // 2)
    return {**_attention_inputs(sizes, draw), "mask": mask}


def _attention_flops(sizes: Sizes) -> int:
    batch, queries, keys, heads, width = sizes
    return 4 * batch * queries * keys * heads * width


_ODD = ((1, 77, 77, 3, 64), (2, 130, 51, 2, 128), (1, 64, 192, 1, 40))
_QKV = ("q", "k", "v")
_HALF = ("bf16", "fp16")
"""What the dispatcher gives our flash kernel."""
_attention = partial(
    Operation,
    make=_attention_inputs,
    plain=_softmax_attention,
    trained=_QKV,
    flops=_attention_flops,
    backward_flops=2.5,
)

ATTENTION_OPERATIONS: tuple[Operation, ...] = (
    _attention(
        name="attention",
        may_be_vendors=True,
        eager=_sdpa,
        ours=bound(attention),
        variants={f"{OURS} flash": _own_flash},
        libraries=libraries.ATTENTION,
        sizes=(
            (1, FLUX_TOKENS, FLUX_TOKENS, 24, 128),
            (1, 4096, 4096, 10, 64),
            (1, 1024, 1024, 20, 64),
        ),
        odd=(
            (1, 150, 150, 3, 64),
            (1, 128, 256, 2, 128),
            (2, 130, 151, 2, 128),
            (1, 64, 192, 1, 40),
        ),
    ),
    _attention(
        name="cross attention",
        may_be_vendors=True,
        eager=_sdpa,
        ours=bound(attention),
        libraries=libraries.ATTENTION,
        sizes=((1, 4096, 77, 10, 64), (1, 1024, 77, 20, 64)),
        odd=((1, 77, 77, 3, 64), (2, 130, 51, 2, 128), (3, 33, 3, 2, 64), (1, 64, 128, 1, 40)),
        targets=tuple(
            Target(against="eager", at_least=1.5, direction=way) for way in (FORWARD, BOTH)
        ),
    ),
    Operation(
        name="qk norm rope attention",
        may_be_vendors=True,
        make=_norm_rope_inputs,
        plain=_norm_rope_attention,
        ours=bound(_our_norm_rope_attention),
        trained=("qkv",),
        checked=("q_weight", "k_weight"),
        sizes=((1, FLUX_TOKENS, 24, 128),),
        odd=((1, 77, 3, 128), (2, 21, 2, 64)),
        flops=lambda s: _attention_flops((s[0], s[1], s[1], s[2], s[3])),
        backward_flops=2.5,
        targets=(Target(against="compile", at_least=1.25, direction=BOTH),),
    ),
    Operation(
        name="qk norm rope",
        make=_norm_rope_inputs,
        plain=_norm_rope,
        ours=bound(qk_norm_rope),
        libraries=libraries.NORM_ROPE,
        trained=("qkv",),
        checked=("q_weight", "k_weight"),
        sizes=((1, FLUX_TOKENS, 24, 128),),
        odd=((1, 77, 3, 128), (2, 21, 2, 64)),
        moved=_norm_rope_bytes,
        targets=STREAMS,
    ),
    Operation(
        name="qk norm rope with text",
        make=_text_norm_rope_inputs,
        plain=_text_norm_rope,
        ours=bound(qk_norm_rope),
        trained=("qkv", "text_qkv"),
        checked=("q_weight", "k_weight", "text_q_weight", "text_k_weight"),
        sizes=((1, FLUX_TEXT, FLUX_IMAGE, 24, 128),),
        odd=((1, 7, 77, 3, 128), (2, 1, 21, 2, 64)),
        moved=_text_norm_rope_bytes,
        targets=STREAMS,
    ),
    _attention(
        name="masked attention",
        may_be_vendors=True,
        make=_masked_inputs,
        ours=bound(attention),
        variants={f"{OURS} flash": _own_flash},
        odd=_ODD,
    ),
    _attention(
        name="flash attention",
        ours=_own_flash,
        odd=_ODD,
        dtypes=_HALF,
        needs_triton=True,
    ),
    _attention(
        name="masked flash attention",
        make=_masked_inputs,
        ours=_own_flash,
        odd=_ODD,
        dtypes=_HALF,
        needs_triton=True,
    ),
)
