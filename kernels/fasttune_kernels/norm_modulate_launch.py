"""How `norm_modulate`'s kernels are launched, and which of them ship."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fasttune_kernels.dispatch import arch, num_processors
from fasttune_kernels.launch import TARGETS, Launch
from fasttune_kernels.norm_modulate_kernels import (
    SUMS_BLOCKS,
    SUMS_OPTIONS,
    NormConfig,
    norm_backward_kernel,
    norm_forward_kernel,
    norm_sums_kernel,
)


def contiguous_rows(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else contiguous_rows(x)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Of samples and rows (B, N, D)."""
    return (0, 0) if x is None else x.stride()[:2]


def _stride(x: Tensor | None) -> int:
    """Of samples (B, D)."""
    return 0 if x is None else x.stride(0)


def launch_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """x + gate y, None without y, and normed, mean and rstd as norm_modulate_forward has them."""
    samples, tokens, width = x.shape
    config = NormConfig.from_heuristic(width, arch(x.device))
    x, y, gate, scale, shift = contiguous_rows(x), _rows(y), _rows(gate), _rows(scale), _rows(shift)
    out = None if y is None else x.new_empty(x.shape)
    normed = x.new_empty(x.shape)
    rstd = x.new_empty((samples, tokens), dtype=torch.float32)
    mean = None if rms else torch.empty_like(rstd)
    norm_forward_kernel[(-(-tokens // config.block_rows), samples)](
        x,
        y,
        gate,
        scale,
        shift,
        _rows(weight),
        _rows(bias),
        out,
        normed,
        mean,
        rstd,
        tokens,
        width,
        *_strides(x),
        *_strides(y),
        _stride(gate),
        _stride(scale),
        _stride(shift),
        eps,
        **config.blocks(),
        **config.options(),
    )
    return out, normed, rstd.new_empty(0) if mean is None else mean, rstd


def launch_backward(
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
    """As norm_modulate_backward."""
    samples, tokens, width = x.shape
    config = NormConfig.from_heuristic(width, arch(x.device))
    dy, x, residual = contiguous_rows(dy), contiguous_rows(x), _rows(residual)
    scale, weight, bias = _rows(scale), _rows(weight), _rows(bias)
    wants_sums = wants_modulation or wants_weight
    rows = config.block_rows
    if wants_sums:
        rows = config.rows_of_range(samples, tokens, num_processors(x.device))
    ranges = -(-tokens // rows)
    dx = x.new_empty(x.shape)
    sums = rstd.new_empty((samples, ranges, 2, width)) if wants_sums else None
    norm_backward_kernel[(ranges, samples)](
        dy,
        x,
        None if rms else mean,
        rstd,
        scale,
        weight,
        residual,
        dx,
        sums,
        tokens,
        rows,
        width,
        *_strides(dy),
        *_strides(x),
        *_strides(residual),
        _stride(scale),
        **config.blocks(),
        **config.options(),
    )
    vectors = (samples, width) if wants_modulation else (0,)
    dscale, dshift = rstd.new_empty(vectors), rstd.new_empty(vectors)
    dweight, dbias = (rstd.new_empty(width if wants_weight else 0) for _ in range(2))
    if wants_sums:
        norm_sums_kernel[(-(-width // SUMS_BLOCKS["BLOCK_WIDTH"]), 1 if wants_weight else samples)](
            sums,
            scale,
            weight,
            bias,
            dscale if wants_modulation else None,
            dshift if wants_modulation else None,
            dweight if wants_weight else None,
            dbias if wants_weight else None,
            samples,
            ranges,
            width,
            _stride(scale),
            **SUMS_BLOCKS,
            **SUMS_OPTIONS,
        )
    return dx, dscale, dshift, dweight, dbias


_STREAM = ("x_ptr", "y_ptr", "out_ptr", "normed_ptr", "dy_ptr", "residual_ptr", "dx_ptr")
_VECTORS = ("gate_ptr", "scale_ptr", "shift_ptr", "weight_ptr", "bias_ptr")
_SUMS = ("mean_ptr", "rstd_ptr", "sums_ptr", "dscale_ptr", "dshift_ptr", "dweight_ptr", "dbias_ptr")
_TYPES = {
    **dict.fromkeys(_STREAM + _VECTORS, "*bf16"),
    **dict.fromkeys(_SUMS, "*fp32"),
    "eps": "fp32",
}
_UNALIGNED = ("eps", "samples", "ranges", "rows_of_range")


def _launch(
    name: str,
    kernel: Callable[[], Any],
    arguments: tuple[str, ...],
    given: str,
    blocks: dict[str, int],
    options: dict[str, Any],
    targets: tuple[str, ...],
    ones: tuple[str, ...] = (),
) -> Launch:
    """A launch with the pointers of `given`, those of the others None. An absent tensor's strides
    are 0, which 16 divides."""
    pointers = [f"{pointer}_ptr" for pointer in given.split()]
    signature = {
        argument: _TYPES.get(argument, "i32")
        for argument in arguments
        if argument not in ones and (argument in pointers or not argument.endswith("_ptr"))
    }
    absent = {argument: None for argument in arguments if argument not in (*signature, *ones)}
    return Launch(
        name=f"{name} bf16",
        kernel=kernel,
        signature=signature,
        constants={**absent, **dict.fromkeys(ones, 1), **blocks},
        aligned=tuple(argument for argument in signature if argument not in _UNALIGNED),
        **options,
        targets=targets,
    )


_FORWARD = (
    *("x_ptr", "y_ptr", "gate_ptr", "scale_ptr", "shift_ptr", "weight_ptr", "bias_ptr"),
    *("out_ptr", "normed_ptr", "mean_ptr", "rstd_ptr", "tokens", "width"),
    *("x_batch_stride", "x_row_stride", "y_batch_stride", "y_row_stride"),
    *("gate_stride", "scale_stride", "shift_stride", "eps"),
)
_BACKWARD = (
    *("dy_ptr", "x_ptr", "mean_ptr", "rstd_ptr", "scale_ptr", "weight_ptr", "residual_ptr"),
    *("dx_ptr", "sums_ptr", "tokens", "rows_of_range", "width"),
    *("dy_batch_stride", "dy_row_stride", "x_batch_stride", "x_row_stride"),
    *("residual_batch_stride", "residual_row_stride", "scale_stride"),
)
_SUM = (
    *("sums_ptr", "scale_ptr", "weight_ptr", "bias_ptr", "dscale_ptr", "dshift_ptr"),
    *("dweight_ptr", "dbias_ptr", "samples", "ranges", "width", "scale_stride"),
)
_MODULATED = "x normed mean rstd scale shift"
_WEIGHTED = "x normed mean rstd weight bias"
_GRADIENT = "dy x mean rstd residual dx"

_ROWS = (
    ("norm_forward", 3072, _MODULATED),
    ("norm_forward", 320, _WEIGHTED),
    ("norm_forward gated", 3072, f"{_MODULATED} y gate out"),
    ("norm_forward added", 1280, f"{_WEIGHTED} y out"),
    ("norm_backward", 3072, f"{_GRADIENT} scale sums"),
    ("norm_backward", 320, f"{_GRADIENT} weight sums"),
    ("norm_backward frozen", 1280, f"{_GRADIENT} weight"),
)
"""Flux has 3072 channels and modulation; SDXL 640 and 1280 with weights, SD 1 also 320."""

LAUNCHES = (
    *(
        _launch(
            f"{name} D={width}",
            (lambda: norm_forward_kernel) if "forward" in name else (lambda: norm_backward_kernel),
            _FORWARD if "forward" in name else _BACKWARD,
            given,
            config.blocks(),
            config.options(),
            targets,
            # Without sums a program has the rows of one tile, and at 1280 that is one.
            ones=("rows_of_range",) if "frozen" in name else (),
        )
        for name, width, given in _ROWS
        for targets, config in NormConfig.by_target(width)
    ),
    *(
        _launch(name, lambda: norm_sums_kernel, _SUM, given, SUMS_BLOCKS, SUMS_OPTIONS, TARGETS)
        for name, given in (
            ("norm_sums modulation", "sums dscale dshift"),
            ("norm_sums weights", "sums dweight dbias"),
        )
    ),
)
