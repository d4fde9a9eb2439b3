"""The average of weights alone: ema += (1 - decay) (weight - ema), for many tensors in one launch.

`optimizer_step_` does it in the pass that writes the weights; this one is for weights that something
else updated. A bf16 average is rounded stochastically: to the nearest, one with decay 0.9999 would not
move, as its updates are smaller than half a unit in the last place (1/256) unless the weight is
more than 20 times as large.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttune_kernels.arena import (
    Arena,
    batches,
    check_ema,
    check_values,
    check_weights,
    gather,
    limit_of,
    quarter,
    random_words,
    read,
    round_bits,
    round_stochastic,
    words_of,
    write,
)
from fasttune_kernels.arena_tables import ChunkConfig, tables_of
from fasttune_kernels.dispatch import custom_op, runs_triton
from fasttune_kernels.jit import jit, tl
from fasttune_kernels.launch import TARGETS, Launch


def ema_step_ref(ema: Tensor, weight: Tensor, decay: float) -> Tensor:
    """The new average, in the dtype given."""
    return ema + (1 - decay) * (weight - ema)


# -- kernel ----------------------------------------------------------------------------------------


@jit
def average(ptr, w, rest, word, mask, MASKED: tl.constexpr):
    e = read(ptr, mask, MASKED)
    e += rest * (w - e)
    if ptr.dtype.element_ty == tl.bfloat16:
        e = round_bits(e, word >> 16)
    write(ptr, e, mask, MASKED)


@jit
def _ema_step(
    chunks_ptr, layout_ptr, pointers_ptr, weight_like, ema_ptr, rest_ptr, seed_ptr, tiles,
    ROWS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A chunk of the average alone, with the random numbers of the step."""
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1)
    begin = tl.multiple_of(tl.load(layout_ptr + 3 * tensor), 1024)
    numel = tl.load(layout_ptr + 3 * tensor + 1)
    weight_ptr = tl.load(pointers_ptr + tensor).to(weight_like.dtype)
    if ALIGNED:
        weight_ptr = tl.multiple_of(weight_ptr, 16)
    rest = tl.load(rest_ptr)
    seed = tl.load(seed_ptr)
    whole = (numel // 1024).to(tl.int32)
    last = tl.minimum(first + tiles, tl.cdiv(numel, 1024).to(tl.int32))
    for tile in range(first, last, ROWS):
        if tile + ROWS <= whole:
            _ema_tiles(weight_ptr, ema_ptr, rest, seed, tile, begin, numel, ROWS, False)
        else:
            _ema_tiles(weight_ptr, ema_ptr, rest, seed, tile, begin, numel, ROWS, True)


@jit
def _ema_tiles(
    weight_ptr, ema_ptr, rest, seed, tile, begin, numel, ROWS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    tiles = (tile + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, 256)
    in_arena = (tiles * 1024 < numel)[:, None] & (columns >= 0)[None, :]
    words = words_of(seed, (begin // 4 + tiles * 256)[:, None] + columns[None, :], 0)
    for q in range(4):
        local = (tiles * 1024 + q * 256)[:, None] + columns[None, :]
        w = read(weight_ptr + local, local < numel, MASKED)
        average(ema_ptr + begin + local, w, rest, quarter(words, q), in_arena, MASKED)


def _launch_ema(weights: Sequence[Tensor], ema: Tensor, rest: Tensor, seed: Tensor) -> None:
    """One launch for each dtype."""
    config = ChunkConfig.of(ema, ema.numel())
    tables = tables_of((weights,), [0] * len(weights), config.tiles)
    for part in tables.ranges:
        _ema_step[(part.end - part.begin,)](
            *(tables.chunks[part.begin :], tables.layout, tables.pointers, weights[part.first]),
            *(ema, rest, seed, config.tiles),
            ROWS=config.rows,
            ALIGNED=tables.aligned,
            **config.options(),
        )


# -- custom op -------------------------------------------------------------------------------------


@custom_op("fasttune::ema_step_", mutates_args=("ema",))
def _ema_step_op(weights: Sequence[Tensor], ema: Tensor, rest: Tensor, seed: Tensor) -> None:
    if runs_triton(ema):
        _launch_ema(weights, ema, rest, seed)
    else:
        _ema_torch(weights, ema, rest, seed)


_ema_step_op.register_fake(lambda *arguments: None)


def _ema_torch(weights: Sequence[Tensor], ema: Tensor, rest: Tensor, seed: Tensor) -> None:
    sizes, dtypes = [w.numel() for w in weights], [w.dtype for w in weights]
    for pieces, begin, end in batches(sizes, dtypes, limit_of(ema.device)):
        part = ema[begin:end]
        average_ = part.float().lerp_(gather(weights, pieces, begin, end).view(-1), rest)
        if ema.dtype == torch.bfloat16:
            part.copy_(round_stochastic(average_, random_words(seed, begin, end, 0) >> 16))


# -- public function -------------------------------------------------------------------------------


def ema_step_(weights: Sequence[Tensor], ema: Tensor, rest: Tensor, seed: Tensor) -> None:
    """Moves the arena `ema`, float32 or bf16 with the layout `Arena.of(weights)`, towards the weights in
    place. `rest`, (1,) float32: 1 - decay. `seed`, (1,) int64, has to differ from step to step. With the
    same seed this is bitwise what `optimizer_step_` does. ValueError for what does not fit."""
    check_weights(weights, ema.device)
    check_ema(ema, Arena.of(weights).total)
    check_values("rest", rest, (1,), torch.float32, ema.device)
    check_values("seed", seed, (1,), torch.int64, ema.device)
    if weights:
        _ema_step_op(list(weights), ema, rest, seed)


# -- what ships ------------------------------------------------------------------------------------

_CONFIG = ChunkConfig.from_heuristic(TARGETS[0], total=1 << 31, processors=132)
_POINTERS = {
    "chunks_ptr": "*i32",
    "layout_ptr": "*i64",
    "pointers_ptr": "*i64",
    "weight_like": "*bf16",
    "ema_ptr": "*bf16",
    "rest_ptr": "*fp32",
    "seed_ptr": "*i64",
}
LAUNCHES = (
    Launch(
        name="ema_step bf16 ema bf16",
        kernel=lambda: _ema_step,
        signature=_POINTERS | {"tiles": "i32"},
        constants={"ROWS": _CONFIG.rows, "ALIGNED": True},
        aligned=(*_POINTERS, "tiles"),
        over_2_gib=("ema_ptr",),
        num_warps=_CONFIG.num_warps,
        num_stages=1,
        enable_fp_fusion=True,
    ),
)
