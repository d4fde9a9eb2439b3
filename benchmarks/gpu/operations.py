"""The operations that kernels are to replace, as the models have them, and the table of all.

B batch, N tokens, D width, C channels.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu import libraries
from benchmarks.gpu.attention_operations import ATTENTION_OPERATIONS
from benchmarks.gpu.libraries import Inputs, give
from benchmarks.gpu.operation import FLUX_TOKENS, Draw, Operation, Sizes, bound
from fasttune import flow_matching, losses
from fasttune.adapters.lora import apply_lora
from fasttune.models import flux, unet
from fasttune.models.layers import GroupNorm, Linear

LORA_RANK = 16


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


_GROUP_NORM_SIZES = ((1, 320, 128, 128), (1, 640, 64, 64), (1, 1280, 32, 32), (1, 1920, 32, 32))
_GROUP_NORM_ODD = ((1, 32, 3, 5), (3, 96, 7, 6))

OPERATIONS: tuple[Operation, ...] = (
    *ATTENTION_OPERATIONS,
    Operation(
        name="modulated norm",
        make=_modulation_inputs,
        plain=_modulated_norm,
        ours=_model_modulated_norm,
        trained=("x", "shift", "scale"),
        sizes=((1, FLUX_TOKENS, 3072),),
        odd=((1, 7, 33), (3, 65, 3072)),
    ),
    Operation(
        name="gated residual",
        make=_residual_inputs,
        plain=_gated_residual,
        ours=bound(_gated_residual),  # the blocks write it out
        trained=("x", "y", "gate"),
        sizes=((1, FLUX_TOKENS, 3072),),
        odd=((1, 7, 33), (3, 65, 3072)),
    ),
    Operation(
        name="gelu tanh",
        make=_only_x,
        plain=_gelu,
        ours=_model_gelu,
        trained=("x",),
        sizes=((1, FLUX_TOKENS, 12288),),
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
            (1, FLUX_TOKENS, 3072, 3072),
            (1, FLUX_TOKENS, 3072, 12288),
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
