"""Attention, and what Flux does to queries and keys before it.

B batch, N tokens, L queries, S keys, H heads, E head width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu import libraries
from benchmarks.gpu.libraries import Inputs, give
from benchmarks.gpu.operation import FLUX_TOKENS, Draw, Operation, Sizes, bound
from fasttune.models import flux
from fasttune.models.layers import RMSNorm
from fasttune.models.rope import rope_table, rotate
from fasttune_kernels import attention

FLUX_AXES = (16, 56, 56)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def _norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    width = q_weight.shape
    q = F.rms_norm(q.unflatten(-1, (-1, *width)), width, q_weight, 1e-6)
    k = F.rms_norm(k.unflatten(-1, (-1, *width)), width, k_weight, 1e-6)
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _model_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> Callable[[], tuple[Tensor, Tensor]]:
    norm_q, norm_k = _rms_norm(q_weight), _rms_norm(k_weight)

    def run() -> tuple[Tensor, Tensor]:
        heads = q.unflatten(-1, (-1, len(q_weight))), k.unflatten(-1, (-1, len(k_weight)))
        return rotate(norm_q(heads[0]), cos, sin), rotate(norm_k(heads[1]), cos, sin)

    return run


def _rms_norm(weight: Tensor) -> RMSNorm:
    norm = RMSNorm(len(weight), eps=1e-6)
    give(norm, weight=weight)
    return norm


def _norm_rope_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    """(B, N, H, E); the table's axes split E as Flux does, or a fourth and twice three eighths."""
    batch, tokens, heads, width = sizes
    axes = FLUX_AXES if width == sum(FLUX_AXES) else (width // 4, width // 8 * 3, width // 8 * 3)
    side = math.isqrt(tokens)
    cos, sin = rope_table(side, side, tokens - side * side, axes=axes, device=draw.generator.device)
    return {
        "q": draw(batch, tokens, heads * width),
        "k": draw(batch, tokens, heads * width),
        "q_weight": 1 + draw(width, scale=0.1),
        "k_weight": 1 + draw(width, scale=0.1),
        "cos": cos,
        "sin": sin,
    }


def _norm_rope_attention(v: Tensor, q_weight: Tensor, **others: Tensor) -> Tensor:
    q, k = _norm_rope(q_weight=q_weight, **others)
    return _sdpa(q, k, v.unflatten(-1, (-1, len(q_weight)))).flatten(2)


class _Given(nn.Module):
    """Stands where a projection was whose output is given."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = (value,)  # in a tuple, so that it is no parameter

    def forward(self, x: Tensor) -> Tensor:
        return self.value[0]


def _model_norm_rope_attention(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> Callable[[], Tensor]:
    module = flux.SingleAttention(q.shape[-1], q.shape[-1] // len(q_weight))
    module.norm_q, module.norm_k = _rms_norm(q_weight), _rms_norm(k_weight)
    for name, value in (("to_q", q), ("to_k", k), ("to_v", v)):
        setattr(module, name, _Given(value))
    return lambda: module(q, cos, sin, None)


def _norm_rope_attention_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    batch, tokens, heads, width = sizes
    return {**_norm_rope_inputs(sizes, draw), "v": draw(batch, tokens, heads * width)}


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By its equation: the kernels that `_sdpa` dispatches to are among what is checked."""
    scores = torch.einsum("blhe,bshe->bhls", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhls,bshe->blhe", scores.softmax(-1), v)


def _attention_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    """(B, L, S, H, E), L queries and S keys."""
    batch, queries, keys, heads, width = sizes
    return {
        "q": draw(batch, queries, heads, width),
        "k": draw(batch, keys, heads, width),
        "v": draw(batch, keys, heads, width),
    }


def _attention_flops(sizes: Sizes) -> int:
    batch, queries, keys, heads, width = sizes
    return 4 * batch * queries * keys * heads * width


ATTENTION_OPERATIONS: tuple[Operation, ...] = (
    Operation(
        name="attention",
        make=_attention_inputs,
        plain=_softmax_attention,
        eager=_sdpa,
        ours=bound(attention),
        has_kernel=True,
        libraries=libraries.ATTENTION,
        trained=("q", "k", "v"),
        sizes=(
            (1, FLUX_TOKENS, FLUX_TOKENS, 24, 128),
            (1, 4096, 4096, 10, 64),
            (1, 1024, 1024, 20, 64),
            (1, 4096, 77, 10, 64),
            (1, 1024, 77, 20, 64),
        ),
        odd=((1, 77, 77, 3, 64), (2, 130, 51, 2, 128), (1, 64, 192, 1, 40)),
        flops=_attention_flops,
        backward_flops=2.5,
    ),
    Operation(
        name="qk norm rope attention",
        make=_norm_rope_attention_inputs,
        plain=_norm_rope_attention,
        ours=_model_norm_rope_attention,
        trained=("q", "k", "v"),
        sizes=((1, FLUX_TOKENS, 24, 128),),
        odd=((1, 77, 3, 128), (2, 21, 2, 64)),
        flops=lambda s: _attention_flops((s[0], s[1], s[1], s[2], s[3])),
        backward_flops=2.5,
    ),
    Operation(
        name="qk norm rope",
        make=_norm_rope_inputs,
        plain=_norm_rope,
        ours=_model_norm_rope,
        libraries=libraries.NORM_ROPE,
        trained=("q", "k"),
        sizes=((1, FLUX_TOKENS, 24, 128),),
        odd=((1, 77, 3, 128), (2, 21, 2, 64)),
    ),
)
