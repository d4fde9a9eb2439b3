"""The work on rows of tokens around the products of Flux and of SDXL's transformers.

B batch, N tokens, D width.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import libraries
from benchmarks.gpu.libraries import Inputs
from benchmarks.gpu.operation import (
    FLUX_TOKENS,
    STREAMS,
    Draw,
    Operation,
    Sizes,
    backward_of,
    bound,
)
from fasttune_kernels import (
    gated_residual,
    gated_residual_norm_modulate,
    geglu,
    gelu_tanh,
    norm_modulate,
)
from fasttune_kernels.quantize_rows import dequantize_rows, quantize_rows

_EPS = 1e-6
_FLUX = (1, FLUX_TOKENS, 3072)
_SDXL = ((1, 4096, 640), (1, 1024, 1280))
_ODD = ((1, 7, 33), (3, 65, 3072))


def _modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=_EPS)
    return normed * (1 + scale[:, None]) + shift[:, None]


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps=_EPS)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps=_EPS)


def _modulation_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    batch, tokens, width = sizes
    return {
        "x": draw(batch, tokens, width),
        "scale": draw(batch, width),
        "shift": draw(batch, width),
    }


def _weighted_inputs(with_bias: bool, sizes: Sizes, draw: Draw) -> Inputs:
    width = sizes[-1]
    found = {"x": draw(*sizes), "weight": 1 + draw(width, scale=0.1)}
    return found | ({"bias": draw(width, scale=0.1)} if with_bias else {})


def _gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def _gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    out = _gated_residual(x, y, gate)
    return out, _modulated_norm(out, scale, shift)


def _residual_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    batch, tokens, width = sizes
    x, y = draw(batch, tokens, width), draw(batch, tokens, width)
    return {"x": x, "y": y, "gate": draw(batch, width)}


def _residual_norm_inputs(sizes: Sizes, draw: Draw) -> Inputs:
    batch, _, width = sizes
    vectors = {"scale": draw(batch, width), "shift": draw(batch, width)}
    return _residual_inputs(sizes, draw) | vectors


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _geglu(projected: Tensor) -> Tensor:
    y, gate = projected.chunk(2, dim=-1)
    return y * F.gelu(gate)


def _one(name: str, sizes: Sizes, draw: Draw) -> Inputs:
    return {name: draw(*sizes)}


# --- rows in int8


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """In float64 before the rounding, so that half a code is what rounding may cost."""
    scale = x.abs().amax(-1).to(torch.promote_types(x.dtype, torch.float32)) / 127
    codes = x.to(scale.dtype) / scale[..., None]
    return (codes if x.dtype == torch.float64 else codes.round().to(torch.int8)), scale


def _dequantize(codes: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    return (codes.to(scales.dtype) * scales[..., None]).to(like.dtype)


def _our_dequantize(codes: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    return dequantize_rows(codes, scales, like.dtype)


def _codes(sizes: Sizes, draw: Draw) -> Inputs:
    wide = torch.promote_types(draw.dtype, torch.float32)
    codes, scales = _quantize(draw(*sizes, dtype=wide))
    return {"codes": codes.round().to(torch.int8), "scales": scales, "like": draw(0)}


TOKEN_OPERATIONS: tuple[Operation, ...] = (
    Operation(
        name="norm modulate",
        make=_modulation_inputs,
        plain=_modulated_norm,
        ours=bound(norm_modulate),
        trained=("x", "scale", "shift"),
        sizes=(_FLUX,),
        odd=_ODD,
        moved=backward_of("x", "scale"),
        targets=STREAMS,
    ),
    Operation(
        name="gated residual norm",
        make=_residual_norm_inputs,
        plain=_gated_residual_norm,
        ours=bound(gated_residual_norm_modulate),
        trained=("x", "y", "gate", "scale", "shift"),
        sizes=(_FLUX,),
        odd=_ODD,
        moved=backward_of("output 0", "y", "gate", "scale"),
        targets=STREAMS,
    ),
    Operation(
        name="gated residual",
        make=_residual_inputs,
        plain=_gated_residual,
        ours=bound(gated_residual),
        trained=("x", "y", "gate"),
        sizes=(_FLUX,),
        odd=_ODD,
        moved=backward_of("y", "gate", writes=("y", "gate")),
        targets=STREAMS,
    ),
    Operation(
        name="gelu tanh",
        make=partial(_one, "x"),
        plain=_gelu,
        ours=bound(gelu_tanh),
        trained=("x",),
        sizes=((1, FLUX_TOKENS, 12288),),
        odd=((1, 7, 33), (2, 31, 1000)),
        targets=STREAMS,
    ),
    Operation(
        name="geglu",
        make=partial(_one, "projected"),
        plain=_geglu,
        ours=bound(geglu),
        libraries=libraries.GEGLU,
        trained=("projected",),
        sizes=((1, 4096, 5120), (1, 1024, 10240)),
        odd=((1, 7, 66), (2, 31, 1000)),
        targets=STREAMS,
    ),
    Operation(
        name="layer norm",
        make=partial(_weighted_inputs, True),
        plain=_layer_norm,
        ours=bound(norm_modulate),
        trained=("x",),
        checked=("weight", "bias"),
        sizes=_SDXL,
        odd=_ODD,
        moved=backward_of("x", "weight"),
        targets=STREAMS,
    ),
    Operation(
        name="rms norm",
        make=partial(_weighted_inputs, False),
        plain=_rms_norm,
        ours=bound(partial(norm_modulate, rms=True)),
        trained=("x",),
        checked=("weight",),
        odd=_ODD,
    ),
    Operation(
        name="quantize rows",
        make=partial(_one, "x"),
        plain=_quantize,
        ours=bound(quantize_rows),
        trained=(),
        sizes=(_FLUX, (1, FLUX_TOKENS, 12288)),
        odd=_ODD,
        targets=STREAMS[:1],
    ),
    Operation(
        name="dequantize rows",
        make=_codes,
        plain=_dequantize,
        ours=bound(_our_dequantize),
        trained=(),
        contiguous=("codes", "scales"),
        sizes=(_FLUX, (1, FLUX_TOKENS, 12288)),
        odd=_ODD,
        targets=STREAMS[:1],
    ),
)
