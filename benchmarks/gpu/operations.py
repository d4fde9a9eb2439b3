"""The operations that kernels are to replace: their definition, the models' own code for them, the
libraries that have them, and the shapes they have in real models.

`plain` is the definition, in PyTorch; it is what eager and torch.compile are timed on, and in float64 it
is the truth that everything is compared with. `ours` runs what the models run, through their own code, and so
a kernel of ours as soon as the models call one; `has_kernel` says whether they do, since without one
`ours` is eager PyTorch by another way and is compared but not timed.

B batch, N tokens, D width, H heads, E head width, C channels.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu import libraries
from benchmarks.gpu.libraries import Bind, Inputs, give
from fasttune import flow_matching, losses
from fasttune.adapters.lora import apply_lora
from fasttune.models import flux, unet
from fasttune.models.layers import GroupNorm, Linear, RMSNorm
from fasttune.models.rope import rope_table, rotate
from fasttune_kernels import attention

Sizes = tuple[int, ...]
FLUX_AXES = (16, 56, 56)
LORA_RANK = 16


@dataclass(frozen=True, slots=True)
class Draw:
    """Fresh random tensors."""

    generator: torch.Generator
    dtype: torch.dtype

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        g = self.generator
        values = torch.randn(shape, generator=g, device=g.device)
        return (values * scale).to(dtype or self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One operation, and everything that computes it."""

    name: str
    make: Callable[[Sizes, Draw], Inputs]
    """Inputs by name."""
    plain: Callable[..., Any]
    """Inputs by name -> a tensor, or several. In float64 for float64 inputs."""
    ours: Bind
    sizes: tuple[Sizes, ...]
    """In real models at batch 1; the first number is the batch. The first is the most important."""
    odd: tuple[Sizes, ...]
    """Where mistakes show: no multiples of anything, and small enough for float64."""
    trained: tuple[str, ...]
    """Inputs that get a gradient."""
    has_kernel: bool = False
    libraries: Mapping[str, Bind] = field(default_factory=dict)
    """The best of their kind, by name; libraries that are not there are left out by trying."""
    eager: Callable[..., Any] | None = None
    """What eager PyTorch is timed on, where that is not `plain`."""
    flops: Callable[[Sizes], int] = lambda sizes: 0
    """Of a forward, where matrix products count."""
    backward_flops: float = 2.0
    """As a multiple of the forward's."""


def bound(function: Callable[..., Any]) -> Bind:
    """Of a function of the inputs that needs no preparation."""
    return lambda **inputs: partial(function, **inputs)


# --- Flux: the pointwise work around its products


def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]


def _model_modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Callable[[], Tensor]:
    norm = flux.AdaptiveNorm(x.shape[-1], 2)
    norm.linear = nn.Identity()  # type: ignore[assignment]  # its output is given
    return lambda: norm(x, torch.cat([shift, scale], dim=-1))[0]


def _modulation_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    batch, tokens, width = sizes
    return {
        "x": draw(batch, tokens, width),
        "shift": draw(batch, width),
        "scale": draw(batch, width),
    }


def _gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def _residual_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    batch, tokens, width = sizes
    x, y = draw(batch, tokens, width), draw(batch, tokens, width)
    return {"x": x, "y": y, "gate": draw(batch, width)}


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _model_gelu(x: Tensor) -> Callable[[], Tensor]:
    module = flux.GeluProjection(1, 1)
    module.proj = nn.Identity()  # type: ignore[assignment]
    return lambda: module(x)


def _only_x(sizes: Sizes, draw: Draw) -> Inputs:
    return {"x": draw(*sizes)}


# --- Flux: attention and what comes before it


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


# --- SDXL


def _geglu(x: Tensor) -> Tensor:
    y, gate = x.chunk(2, dim=-1)
    return y * F.gelu(gate)


def _model_geglu(x: Tensor) -> Callable[[], Tensor]:
    module = unet.GegluProjection(1, 1)
    module.proj = nn.Identity()  # type: ignore[assignment]
    return lambda: module(x)


GROUPS = 32


def _group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-5))


def _model_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    norm = GroupNorm(GROUPS, x.shape[1], eps=1e-5)
    give(norm, weight=weight, bias=bias)
    return lambda: F.silu(norm(x))


def _group_norm_inputs(layout: torch.memory_format, sizes: Sizes, draw: Draw) -> Inputs:
    channels = sizes[1]
    return {
        "x": draw(*sizes).contiguous(memory_format=layout),
        "weight": 1 + draw(channels, scale=0.1),
        "bias": draw(channels, scale=0.1),
    }


# --- both


def _lora_linear(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    low = F.linear(x, A.to(x.dtype))
    return F.linear(x, weight, bias) + F.linear(low, B.to(x.dtype))


def _model_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor
) -> Callable[[], Tensor]:
    with torch.device("meta"):
        model = nn.ModuleList([Linear(weight.shape[1], weight.shape[0])])
    apply_lora(model, targets=["0"], rank=len(A), alpha=len(A))
    give(model[0], weight=weight, bias=bias, lora_A=A, lora_B=B)
    return lambda: model[0](x)


def _lora_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    """(B, N, in, out). The adapter is in float32, as it is trained."""
    batch, tokens, ins, outs = sizes
    rank, wide = min(LORA_RANK, ins, outs), torch.promote_types(draw.dtype, torch.float32)
    return {
        "x": draw(batch, tokens, ins),
        "weight": draw(outs, ins, scale=ins**-0.5),
        "bias": draw(outs, scale=0.1),
        "A": draw(rank, ins, scale=ins**-0.5, dtype=wide),
        "B": draw(outs, rank, scale=rank**-0.5, dtype=wide),
    }


def _lora_flops(sizes: Sizes) -> int:
    batch, tokens, ins, outs = sizes
    return 2 * batch * tokens * (ins * outs + LORA_RANK * (ins + outs))


def _flow_loss(prediction: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    wide = prediction if prediction.dtype == torch.float64 else prediction.float()
    return (wide - (noise - clean)).square().mean()


def _model_flow_loss(prediction: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    target = flow_matching.velocity(clean, noise)
    return losses.distance(prediction, target, loss="mse", huber_delta=0.1).mean()


def _loss_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    wide = torch.promote_types(draw.dtype, torch.float32)
    clean, noise = draw(*sizes, dtype=wide), draw(*sizes, dtype=wide)
    return {"prediction": draw(*sizes), "clean": clean, "noise": noise}


_FLUX_TOKENS = 4096 + 512  # 1024 x 1024 pixels and T5's positions
_GROUP_NORM_SIZES = ((1, 320, 128, 128), (1, 640, 64, 64), (1, 1280, 32, 32), (1, 1920, 32, 32))
_GROUP_NORM_ODD = ((1, 32, 3, 5), (3, 96, 7, 6))

OPERATIONS: tuple[Operation, ...] = (
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
            (1, _FLUX_TOKENS, _FLUX_TOKENS, 24, 128),
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
        sizes=((1, _FLUX_TOKENS, 24, 128),),
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
        sizes=((1, _FLUX_TOKENS, 24, 128),),
        odd=((1, 77, 3, 128), (2, 21, 2, 64)),
    ),
    Operation(
        name="modulated norm",
        make=_modulation_inputs,
        plain=_modulated_norm,
        ours=_model_modulated_norm,
        trained=("x", "shift", "scale"),
        sizes=((1, _FLUX_TOKENS, 3072),),
        odd=((1, 7, 33), (3, 65, 3072)),
    ),
    Operation(
        name="gated residual",
        make=_residual_inputs,
        plain=_gated_residual,
        ours=bound(_gated_residual),  # the blocks write it out
        trained=("x", "y", "gate"),
        sizes=((1, _FLUX_TOKENS, 3072),),
        odd=((1, 7, 33), (3, 65, 3072)),
    ),
    Operation(
        name="gelu tanh",
        make=_only_x,
        plain=_gelu,
        ours=_model_gelu,
        trained=("x",),
        sizes=((1, _FLUX_TOKENS, 12288),),
        odd=((1, 7, 33), (2, 31, 1000)),
    ),
    Operation(
        name="geglu",
        make=_only_x,
        plain=_geglu,
        ours=_model_geglu,
        libraries=libraries.GEGLU,
        trained=("x",),
        sizes=((1, 4096, 5120), (1, 1024, 10240)),
        odd=((1, 7, 66), (2, 31, 1000)),
    ),
    Operation(
        name="group norm silu",
        make=partial(_group_norm_inputs, torch.contiguous_format),
        plain=_group_norm_silu,
        ours=_model_group_norm_silu,
        libraries=libraries.GROUP_NORM,
        trained=("x", "weight", "bias"),
        sizes=_GROUP_NORM_SIZES,
        odd=_GROUP_NORM_ODD,
    ),
    Operation(
        name="group norm silu channels last",
        make=partial(_group_norm_inputs, torch.channels_last),
        plain=_group_norm_silu,
        ours=_model_group_norm_silu,
        libraries=libraries.GROUP_NORM_CHANNELS_LAST,
        trained=("x", "weight", "bias"),
        sizes=_GROUP_NORM_SIZES,
        odd=_GROUP_NORM_ODD,
    ),
    Operation(
        name="lora linear",
        make=_lora_inputs,
        plain=_lora_linear,
        ours=_model_lora_linear,
        libraries=libraries.LORA_LINEAR,
        trained=("x", "A", "B"),
        sizes=(
            (1, _FLUX_TOKENS, 3072, 3072),
            (1, _FLUX_TOKENS, 3072, 12288),
            (1, 1024, 1280, 1280),
        ),
        odd=((1, 7, 33, 65), (3, 21, 64, 40)),
        flops=_lora_flops,
        backward_flops=1.0,  # the base is frozen: one product back, and those of the adapter
    ),
    Operation(
        name="flow loss",
        make=_loss_inputs,
        plain=_flow_loss,
        ours=bound(_model_flow_loss),
        trained=("prediction",),
        sizes=((1, 16, 128, 128),),
        odd=((1, 3, 5, 7), (3, 16, 9, 11)),
    ),
)
