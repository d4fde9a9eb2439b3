"""AdamW for a list of tensors in one pass, with clipping, 16-bit rounding and the average of the weights.

A step as PyTorch makes it reads the gradients for their norm, reads and writes them for the clip, then
reads and writes weights and moments, then reads the weights again for the average: 38 bytes a weight for
bf16 weights with float32 state. One pass reads and writes everything once: 28, and 18 with 8-bit moments
and a bf16 average, beside the 2 that the norm needs. Whatever the number of tensors, the step is one launch
for each pair of dtypes of weights and gradients, and the norm one for each dtype of gradients and one more.

Sources: AdamW, https://arxiv.org/abs/1711.05101; 8-bit state, https://arxiv.org/abs/2110.02861; stochastic
rounding and compensation of bf16 weights, https://arxiv.org/abs/2010.06192.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fasttune_kernels import cpu_library, dispatch, optimizer_step_kernels
from fasttune_kernels.arena import (
    BLOCK,
    QUANTUM,
    arena_offsets,
    batches,
    check_ema,
    check_values,
    check_weights,
    gather,
    limit_of,
    random_words,
    round_stochastic,
    scatter,
)
from fasttune_kernels.blockwise import dequantize_blockwise, quantize_blockwise
from fasttune_kernels.optimizer_step_cuda import is_default, launch_cuda, takes

ROUNDINGS = ("nearest", "stochastic", "kahan")
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)

# -- reference -------------------------------------------------------------------------------------


def optimizer_step_ref(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    ema: Tensor | None,
    *,
    lr: float,
    factor: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    ema_decay: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The new (weight, m, v, ema) of one tensor at update number `step` (from 1), in the dtype given:
    what is rounded and quantized afterwards."""
    g = grad * factor
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    weight = (1 - lr * weight_decay) * weight - lr * m_hat / (v_hat.sqrt() + eps)
    return weight, m, v, None if ema is None else ema + (1 - ema_decay) * (weight - ema)


# -- custom ops ------------------------------------------------------------------------------------


@dispatch.custom_op(
    "fasttune::optimizer_step_",
    mutates_args=("weights", "m", "v", "m_absmax", "v_absmax", "ema", "compensation"),
)
def _optimizer_step_op(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Tensor,
    v: Tensor,
    m_absmax: Tensor | None,
    v_absmax: Tensor | None,
    ema: Tensor | None,
    compensation: Tensor | None,
    groups: Sequence[int],
    hyper: Tensor,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    rounding: str,
    seed: Tensor,
) -> None:
    step: Callable[..., None]
    if dispatch.runs_triton(m):
        step = optimizer_step_kernels.launch_step
        average = None if ema is None else ema.dtype
        if is_default(m.device) and takes(weights, grads, m.dtype, average, rounding):
            step = launch_cuda
    elif dispatch.runs_cpp(m):
        step = cpu_library.optimizer_step_
    else:
        step = _step_torch
    step(
        *(weights, grads, m, v, m_absmax, v_absmax, ema, compensation),
        *(groups, hyper, scalars, beta1, beta2, eps, rounding, seed),
    )


_optimizer_step_op.register_fake(lambda *arguments: None)


# -- PyTorch implementation ------------------------------------------------------------------------


def _step_torch(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Tensor,
    v: Tensor,
    m_absmax: Tensor | None,
    v_absmax: Tensor | None,
    ema: Tensor | None,
    compensation: Tensor | None,
    groups: Sequence[int],
    hyper: Tensor,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    rounding: str,
    seed: Tensor,
) -> None:
    """Works on ranges of the arenas, into which weights and gradients are gathered: a few dozen
    operations on a range, however many tensors are in it."""
    keep: Tensor | None = None  # elsewhere, where nobody waits for it, what was there is written
    if not _is_readable(scalars):
        keep = scalars[2] != 0
    elif not scalars[2]:
        return
    lr, factor, _, correction1, correction2, ema_rest = scalars.unbind()
    sizes, dtypes = [w.numel() for w in weights], [w.dtype for w in weights]
    for pieces, begin, end in batches(sizes, dtypes, limit_of(m.device)):
        span = slice(begin, end)
        tiles = torch.tensor([-(-(p.end - p.begin) // BLOCK) for p in pieces])
        rows = torch.tensor([groups[p.tensor] for p in pieces]).repeat_interleave(tiles)
        factors = hyper[rows.to(hyper.device)]
        rate = factors[:, :1] * lr  # (tiles, 1), as all else is (tiles, BLOCK)
        rest = 1 - factors[:, 1:] * rate

        g = gather(grads, pieces, begin, end).mul_(factor)
        new_m = _load(m, m_absmax, span, True).mul(beta1).add_(g, alpha=1 - beta1)
        new_v = _load(v, v_absmax, span, False).mul(beta2).addcmul_(g, g, value=1 - beta2)
        update = torch.sqrt(new_v, out=g).div_(correction2.sqrt()).add_(eps)
        torch.div(new_m, update, out=update).mul_(rate / correction1)

        bits = _bits(seed, begin, end, 1) if m.dtype == torch.bfloat16 else None
        _store(m, m_absmax, span, new_m, True, keep, None if bits is None else bits >> 16)
        _store(v, v_absmax, span, new_v, False, keep, bits)
        del new_m, new_v

        w = gather(weights, pieces, begin, end)
        if compensation is not None:
            w += compensation[span].view_as(w)
        w.mul_(rest).sub_(update)
        dtype = dtypes[pieces[0].tensor]
        bits = _bits(seed, begin, end, 0)
        if rounding == "stochastic" and dtype == torch.bfloat16:
            rounded = round_stochastic(w, bits).float()
        else:
            rounded = w.to(dtype).float()
        if compensation is not None:
            _write(compensation[span], (w - rounded).view(-1), keep)
        scatter(weights, pieces, begin, rounded, keep)
        if ema is not None:
            before = _load(ema, None, span, True)
            _store(ema, None, span, before.lerp(rounded, ema_rest), True, keep, bits >> 16)


def _is_readable(x: Tensor) -> bool:
    """Without waiting for a device."""
    return dispatch.device_type(x) == "cpu"


def _bits(seed: Tensor, begin: int, end: int, stream: int) -> Tensor:
    return random_words(seed, begin, end, stream).view(-1, BLOCK)


def _load(state: Tensor, absmax: Tensor | None, span: slice, signed: bool) -> Tensor:
    """(tiles, BLOCK) float32."""
    values = state[span]
    if absmax is not None:
        scales = absmax[span.start // QUANTUM : span.stop // QUANTUM]
        values = dequantize_blockwise(values, scales, signed)
    return values.float().view(-1, BLOCK)


def _store(
    state: Tensor,
    absmax: Tensor | None,
    span: slice,
    new: Tensor,
    signed: bool,
    keep: Tensor | None,
    bits: Tensor | None,
) -> None:
    """Quantizes or rounds (tiles, BLOCK) float32."""
    if absmax is not None:
        codes, scales = quantize_blockwise(new.view(-1), signed)
        _write(state[span], codes, keep)
        _write(absmax[span.start // QUANTUM : span.stop // QUANTUM], scales, keep)
        return
    if bits is not None and state.dtype == torch.bfloat16:
        new = round_stochastic(new, bits)
    _write(state[span], new.view(-1), keep)


def _write(target: Tensor, new: Tensor, keep: Tensor | None) -> None:
    target.copy_(new if keep is None else torch.where(keep, new.to(target.dtype), target))


# -- public function -------------------------------------------------------------------------------


def optimizer_step_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Tensor,
    v: Tensor,
    m_absmax: Tensor | None,
    v_absmax: Tensor | None,
    ema: Tensor | None,
    compensation: Tensor | None,
    groups: Sequence[int],
    hyper: Tensor,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    rounding: str,
    seed: Tensor,
) -> None:
    """One AdamW update of `weights` in place, and of their average with the weights as rounded.

    `weights`: dense float32, bf16 or fp16 tensors; `grads`: of the same shapes, and of the weight's
    dtype or float32. State is in arenas with the layout `Arena.of(weights)`: `m` and `v`, both float32,
    both bf16 (rounded stochastically: to the nearest, a second moment with beta2 = 0.999 stops
    moving) or both uint8 with `m_absmax` and `v_absmax` (see `Arena.absmax`); `ema`, float32 or
    bf16 (stochastic); `compensation`, bf16, with "kahan". `groups`: for each weight its row of `hyper`,
    (G, 2) float32: a factor to the learning rate, and the weight decay. `scalars`, (6,) float32:
    learning rate, factor of the gradients (clip and 1 / loss scale), 0 to leave everything as it is
    and else 1, 1 - beta1^t, 1 - beta2^t, 1 - decay of the average.

    `rounding` of 16-bit weights: "nearest"; "stochastic", bf16 alone, whose random bits depend on
    `seed`, (1,) int64, and on the place in the arena alone, so that `seed` has to differ from step to
    step; "kahan", which keeps what was cut off for the next step. Hyper, scalars and seed are on the
    device and nothing waits for it. ValueError for what does not fit.
    """
    check_weights(weights, m.device)
    _check_grads(weights, grads)
    _check_state(weights, m, v, m_absmax, v_absmax, ema, compensation, rounding)
    if len(groups) != len(weights):
        raise ValueError(f"{len(groups)} groups for {len(weights)} weights; one for each")
    if groups and not 0 <= min(groups) <= max(groups) < len(hyper):
        raise ValueError(f"groups {min(groups)} to {max(groups)}, but hyper has {len(hyper)} rows")
    check_values("hyper", hyper, (len(hyper), 2), torch.float32, m.device)
    check_values("scalars", scalars, (6,), torch.float32, m.device)
    check_values("seed", seed, (1,), torch.int64, m.device)
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and eps > 0):
        raise ValueError(f"beta1 {beta1}, beta2 {beta2}, eps {eps}; 0 <= beta < 1 and eps > 0")
    if weights:
        _optimizer_step_op(
            *(list(weights), laid_out_as(weights, grads), m, v, m_absmax, v_absmax, ema),
            *(compensation, list(groups), hyper, scalars, beta1, beta2, eps, rounding, seed),
        )


def laid_out_as(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients with the strides of their weights: copies only of those whose elements are in
    another order, which strides of dimensions of size 1 do not tell."""
    return [
        g if g.stride() == w.stride() else _strided_as(w, g)
        for w, g in zip(weights, grads, strict=True)
    ]


def _strided_as(w: Tensor, g: Tensor) -> Tensor:
    order = [(a, b) for a, b, size in zip(w.stride(), g.stride(), w.shape, strict=True) if size > 1]
    if all(a == b for a, b in order):
        return g.as_strided(w.shape, w.stride())
    return torch.empty_like(w, dtype=g.dtype).copy_(g)


def _check_grads(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    if len(grads) != len(weights):
        raise ValueError(f"{len(grads)} gradients for {len(weights)} weights; one for each")
    for index, (w, g) in enumerate(zip(weights, grads, strict=True)):
        if g.shape != w.shape or g.device != w.device or g.dtype not in (w.dtype, torch.float32):
            raise ValueError(
                f"gradient {index} is {g.dtype} {tuple(g.shape)} on {g.device}; its weight is {w.dtype}"
                f" {tuple(w.shape)} on {w.device}, and a gradient has its dtype or float32"
            )


def _check_state(
    weights: Sequence[Tensor],
    m: Tensor,
    v: Tensor,
    m_absmax: Tensor | None,
    v_absmax: Tensor | None,
    ema: Tensor | None,
    compensation: Tensor | None,
    rounding: str,
) -> None:
    _, total = arena_offsets([w.numel() for w in weights])
    if m.dtype not in STATE_DTYPES:
        raise ValueError(f"m is {m.dtype}; allowed are float32, bf16 and uint8")
    check_values("m", m, (total,), m.dtype, m.device)
    check_values("v", v, (total,), m.dtype, m.device)
    for name, absmax in (("m_absmax", m_absmax), ("v_absmax", v_absmax)):
        if (absmax is not None) != (m.dtype == torch.uint8):
            raise ValueError(f"{name} belongs to 8-bit state; m is {m.dtype}")
        if absmax is not None:
            check_values(name, absmax, (total // QUANTUM,), torch.float32, m.device)
    if ema is not None:
        check_ema(ema, total)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding {rounding!r}; allowed are {', '.join(ROUNDINGS)}")
    if (compensation is not None) != (rounding == "kahan"):
        raise ValueError(f'compensation belongs to rounding = "kahan"; this is {rounding!r}')
    if compensation is not None:
        check_values("compensation", compensation, (total,), torch.bfloat16, m.device)
    if rounding == "stochastic" and any(w.dtype == torch.float16 for w in weights):
        raise ValueError(
            'fp16 weights are rounded to the "nearest" or with "kahan", not "stochastic"'
        )
