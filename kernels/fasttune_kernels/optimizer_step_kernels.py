"""The Triton kernel of the optimizer step.

A program has a chunk of one tensor, and walks through it in ROWS tiles of 4 x 256 elements at a time. A
row of 256 is a quantized block, and the four quarters of a tile take one of the four words of a Philox
counter each. The loop over the quarters is none that unrolls: see `quarter`.
"""

from collections.abc import Sequence

from torch import Tensor

from fasttune_kernels.arena import half_bits, quarter, read, round_bits, words_of, write
from fasttune_kernels.arena_tables import ChunkConfig, tables_of
from fasttune_kernels.blockwise import load_state, store_state
from fasttune_kernels.ema_step import average
from fasttune_kernels.jit import jit, tl
from fasttune_kernels.launch import TARGETS, Launch

# -- kernels ---------------------------------------------------------------------------------------


@jit
def _update(
    weight_ptr, grad_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, ema_ptr, compensation_ptr,
    scalars_ptr, seed_ptr, tile, begin, numel, rate, kept,
    beta1, rest1, beta2, rest2, eps,
    ROUNDING: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """ROWS tiles of a tensor whose range starts at `begin`."""
    factor = tl.load(scalars_ptr + 1)
    rate /= tl.load(scalars_ptr + 3)
    correction = 1.0 / tl.sqrt(tl.load(scalars_ptr + 4))
    ema_rest = tl.load(scalars_ptr + 5)
    tiles = (tile + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, 256)
    present = tiles * 1024 < numel
    in_arena = present[:, None] & (columns >= 0)[None, :]

    seed = tl.load(seed_ptr)
    counter = (begin // 4 + tiles * 256)[:, None] + columns[None, :]
    words = words_of(seed, counter, 0)
    state_words = words
    if m_ptr.dtype.element_ty == tl.bfloat16:
        state_words = words_of(seed, counter, 1)

    for q in range(4):
        local = (tiles * 1024 + q * 256)[:, None] + columns[None, :]
        at = begin + local
        block = begin // 256 + tiles * 4 + q
        inside = local < numel
        word = quarter(words, q)
        g = read(grad_ptr + local, inside, MASKED) * factor
        w = read(weight_ptr + local, inside, MASKED)
        m = load_state(m_ptr, m_absmax_ptr, at, block, in_arena, present, MASKED, True)
        v = load_state(v_ptr, v_absmax_ptr, at, block, in_arena, present, MASKED, False)
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * (g * g)
        if compensation_ptr is not None:
            w += read(compensation_ptr + at, in_arena, MASKED)
        w = w * kept - rate * m / (tl.sqrt(v) * correction + eps)

        bits = quarter(state_words, q)
        store_state(m_ptr, m_absmax_ptr, at, block, m, bits >> 16, in_arena, present, MASKED, True)
        store_state(v_ptr, v_absmax_ptr, at, block, v, bits, in_arena, present, MASKED, False)
        rounded = w
        if weight_ptr.dtype.element_ty == tl.bfloat16:
            rounded = round_bits(w, word if ROUNDING == "stochastic" else half_bits(w))
        rounded = rounded.to(weight_ptr.dtype.element_ty).to(tl.float32)
        write(weight_ptr + local, rounded, inside, MASKED)
        if compensation_ptr is not None:
            cut = w - rounded
            write(compensation_ptr + at, round_bits(cut, half_bits(cut)), in_arena, MASKED)
        if ema_ptr is not None:
            average(ema_ptr + at, rounded, ema_rest, word, in_arena, MASKED)


@jit
def _step(
    chunks_ptr, layout_ptr, pointers_ptr, num_tensors, weight_like, grad_like,
    m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, ema_ptr, compensation_ptr,
    hyper_ptr, scalars_ptr, seed_ptr, tiles, beta1, rest1, beta2, rest2, eps,
    ROUNDING: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A chunk. `weight_like` and `grad_like` tell the types of what the addresses point to."""
    if tl.load(scalars_ptr + 2) == 0.0:
        return
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1)
    begin = tl.multiple_of(tl.load(layout_ptr + 3 * tensor), 1024)
    numel = tl.load(layout_ptr + 3 * tensor + 1)
    group = tl.load(layout_ptr + 3 * tensor + 2)
    weight_ptr = tl.load(pointers_ptr + tensor).to(weight_like.dtype)
    grad_ptr = tl.load(pointers_ptr + num_tensors + tensor).to(grad_like.dtype)
    if ALIGNED:
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
    rate = tl.load(scalars_ptr) * tl.load(hyper_ptr + 2 * group)
    kept = 1.0 - rate * tl.load(hyper_ptr + 2 * group + 1)
    whole = (numel // 1024).to(tl.int32)
    last = tl.minimum(first + tiles, tl.cdiv(numel, 1024).to(tl.int32))
    for tile in range(first, last, ROWS):
        if tile + ROWS <= whole:
            _update(
                weight_ptr, grad_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, ema_ptr,
                compensation_ptr, scalars_ptr, seed_ptr, tile, begin, numel, rate, kept,
                beta1, rest1, beta2, rest2, eps, ROUNDING, ROWS, False,
            )  # fmt: skip
        else:
            _update(
                weight_ptr, grad_ptr, m_ptr, v_ptr, m_absmax_ptr, v_absmax_ptr, ema_ptr,
                compensation_ptr, scalars_ptr, seed_ptr, tile, begin, numel, rate, kept,
                beta1, rest1, beta2, rest2, eps, ROUNDING, ROWS, True,
            )  # fmt: skip


# -- launches --------------------------------------------------------------------------------------


def launch_step(
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
    """One launch for each pair of dtypes, as `optimizer_step_`."""
    config = ChunkConfig.of(m, m.numel())
    tables = tables_of((weights, grads), groups, config.tiles)
    for part in tables.ranges:
        _step[(part.end - part.begin,)](
            *(tables.chunks[part.begin :], tables.layout, tables.pointers, len(weights)),
            *(weights[part.first], grads[part.first], m, v, m_absmax, v_absmax, ema, compensation),
            *(hyper, scalars, seed, config.tiles, beta1, 1 - beta1, beta2, 1 - beta2, eps),
            ROUNDING=rounding,
            ROWS=config.rows,
            ALIGNED=tables.aligned,
            **config.options(),
        )


# -- what ships ------------------------------------------------------------------------------------


def _launch(
    name: str, weight: str, state: str, ema: str | None, rounding: str, compensated: bool = False
) -> Launch:
    config = ChunkConfig.from_heuristic(TARGETS[0], total=1 << 31, processors=132)
    arenas = {"m_ptr": f"*{state}", "v_ptr": f"*{state}"}
    optional = {
        "m_absmax_ptr": "*fp32" if state == "u8" else None,
        "v_absmax_ptr": "*fp32" if state == "u8" else None,
        "ema_ptr": None if ema is None else f"*{ema}",
        "compensation_ptr": "*bf16" if compensated else None,
    }
    arenas |= {key: kind for key, kind in optional.items() if kind is not None}
    tables = {"chunks_ptr": "*i32", "layout_ptr": "*i64", "pointers_ptr": "*i64"}
    tables |= {"weight_like": f"*{weight}", "grad_like": f"*{weight}"}
    device_scalars = {"hyper_ptr": "*fp32", "scalars_ptr": "*fp32", "seed_ptr": "*i64"}
    scalars = dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps"), "fp32")
    return Launch(
        name=f"optimizer_step {name}",
        kernel=lambda: _step,
        signature=tables
        | arenas
        | device_scalars
        | scalars
        | {"num_tensors": "i32", "tiles": "i32"},
        constants={key: None for key, kind in optional.items() if kind is None}
        | {"ROUNDING": rounding, "ROWS": config.rows, "ALIGNED": True},
        aligned=(*tables, *arenas, *device_scalars, "tiles"),
        over_2_gib=tuple(arenas),
        num_warps=config.num_warps,
        num_stages=1,
        enable_fp_fusion=True,
    )


LAUNCHES = (
    _launch("fp32 state fp32 ema fp32", "fp32", "fp32", "fp32", "nearest"),
    _launch("bf16 stochastic state fp32 ema fp32", "bf16", "fp32", "fp32", "stochastic"),
    _launch("bf16 stochastic state u8 ema bf16", "bf16", "u8", "bf16", "stochastic"),
    _launch("bf16 kahan state bf16", "bf16", "bf16", None, "kahan", compensated=True),
)
