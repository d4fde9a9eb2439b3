"""The 2-norm of all gradients together, for clipping: each is read once, and nothing waits for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fasttune_kernels import cpu_library
from fasttune_kernels.arena import is_dense, read
from fasttune_kernels.arena_tables import ChunkConfig, tables_of
from fasttune_kernels.dispatch import custom_op, runs_cpp, runs_triton
from fasttune_kernels.jit import jit, tl
from fasttune_kernels.launch import TARGETS, Launch

_WIDTH = 4096
"""Sums that the second launch adds at a time."""


def gradient_norm_ref(grads: Sequence[Tensor]) -> Tensor:
    """float64 scalar."""
    return torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()


# -- kernels ---------------------------------------------------------------------------------------


@jit
def _norm_chunks(
    chunks_ptr, layout_ptr, pointers_ptr, grad_like, sums_ptr, tiles,
    ROWS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The sum of the squares of a chunk."""
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    numel = tl.load(layout_ptr + 3 * tensor + 1)
    grad_ptr = tl.load(pointers_ptr + tensor).to(grad_like.dtype)
    if ALIGNED:
        grad_ptr = tl.multiple_of(grad_ptr, 16)
    sums = tl.zeros((ROWS * 1024,), tl.float32)
    for at in range(first * 1024, tl.minimum((first + tiles) * 1024, numel), ROWS * 1024):
        local = at + tl.arange(0, ROWS * 1024)
        if at + ROWS * 1024 <= numel:
            g = read(grad_ptr + local, local < numel, False)
        else:
            g = read(grad_ptr + local, local < numel, True)
        sums += g * g
    tl.store(sums_ptr + tl.program_id(0), tl.sum(sums, axis=0))


@jit
def _norm_total(sums_ptr, norm_ptr, count, WIDTH: tl.constexpr):
    """The root of the sum of all chunks, in one program."""
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, count, WIDTH):
        place = start + tl.arange(0, WIDTH)
        total += tl.load(sums_ptr + place, mask=place < count, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, axis=0)))


def _launch_norm(grads: Sequence[Tensor]) -> Tensor:
    """One launch for each dtype and one for the sum."""
    device = grads[0].device
    config = ChunkConfig.of(grads[0], sum(g.numel() for g in grads))
    tables = tables_of((grads,), [0] * len(grads), config.tiles)
    sums = torch.empty(len(tables.chunks), dtype=torch.float32, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    for part in tables.ranges:
        _norm_chunks[(part.end - part.begin,)](
            *(tables.chunks[part.begin :], tables.layout, tables.pointers, grads[part.first]),
            *(sums[part.begin :], config.tiles),
            ROWS=config.rows,
            ALIGNED=tables.aligned,
            **config.options(),
        )
    _norm_total[(1,)](sums, norm, len(sums), WIDTH=_WIDTH, **config.options())
    return norm


# -- custom op -------------------------------------------------------------------------------------


@custom_op("fasttune::gradient_norm")
def _gradient_norm_op(grads: Sequence[Tensor]) -> Tensor:
    if runs_triton(grads[0]):
        return _launch_norm(grads)
    if runs_cpp(grads[0]):
        return cpu_library.gradient_norm(grads)
    norms = torch._foreach_norm(list(grads), 2.0, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(list(norms)))


@_gradient_norm_op.register_fake
def _(grads: Sequence[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


# -- public function -------------------------------------------------------------------------------


def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together: a float32 scalar on their device, the same on every run.
    Not finite if one of them is not. ValueError for none, as the norm is on their device, and for
    gradients on several."""
    if not grads or any(g.device != grads[0].device for g in grads):
        raise ValueError(f"{len(grads)} gradients; there has to be one, and all are on one device")
    return _gradient_norm_op([g if is_dense(g) else g.contiguous() for g in grads])


# -- what ships ------------------------------------------------------------------------------------

_CONFIG = ChunkConfig.from_heuristic(TARGETS[0], total=1 << 31, processors=132)
LAUNCHES = (
    Launch(
        name="gradient_norm chunks bf16",
        kernel=lambda: _norm_chunks,
        signature={
            "chunks_ptr": "*i32",
            "layout_ptr": "*i64",
            "pointers_ptr": "*i64",
            "grad_like": "*bf16",
            "sums_ptr": "*fp32",
            "tiles": "i32",
        },
        constants={"ROWS": _CONFIG.rows, "ALIGNED": True},
        aligned=("chunks_ptr", "layout_ptr", "pointers_ptr", "grad_like", "sums_ptr", "tiles"),
        num_warps=_CONFIG.num_warps,
        num_stages=1,
        enable_fp_fusion=True,
    ),
    Launch(
        name="gradient_norm total",
        kernel=lambda: _norm_total,
        signature={"sums_ptr": "*fp32", "norm_ptr": "*fp32", "count": "i32"},
        constants={"WIDTH": _WIDTH},
        aligned=("sums_ptr", "norm_ptr"),
        num_warps=_CONFIG.num_warps,
        num_stages=1,
        enable_fp_fusion=True,
    ),
)
