"""Attention to few keys, forward and backward, without a mask: cross-attention to a prompt's tokens.

At up to 128 keys (SDXL has 77) all of K and V stay in a program while it walks over its queries, so
each of q, out, dout and dq is moved once, and softmax needs no rescaling. A flash kernel spends its
time elsewhere: it has one or two blocks of keys to walk over, and its backward either adds to dq
with atomics or reads the queries twice.

The backward splits the queries into chunks, as many as fill the GPU. Each writes its share of dk and
dv in float32, and a second kernel adds the shares in order: the same bits on every run.

B batch, L query tokens, S key tokens, H heads, E head width, C chunks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune_kernels.dispatch import arch, num_processors
from fasttune_kernels.jit import jit, next_power_of_2, tl
from fasttune_kernels.launch import NVIDIA, Launch

WARPGROUP = ("sm_90", "sm_100")
WARP = tuple(target for target in NVIDIA if target not in WARPGROUP)
CDNA = ("gfx942", "gfx950")
MAX_KEYS = 128
MAX_WIDTH = 64
"""Of a head: at 128, dk and dv leave no registers on sm_80 to sm_120 and no tensor memory on sm_100."""

_LOG2E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortConfig:
    """Sizes of one program. Not measured: by registers and shared memory, from offline compiles."""

    block_queries: int
    block_keys: int
    block_width: int
    num_warps: int
    num_stages: int

    @classmethod
    def from_heuristic(
        cls, *, keys: int, width: int, arch: str, is_backward: bool
    ) -> "ShortConfig":
        """`width` of a head; arch as in `dispatch.arch`."""
        block_keys = max(next_power_of_2(keys), 16)  # the smallest matrix instruction
        block_width = max(next_power_of_2(width), 16)
        queries, warps = _TILES[is_backward, _family(arch)]
        return cls(
            block_queries=queries,
            block_keys=block_keys,
            block_width=block_width,
            num_warps=warps,
            num_stages=1,  # a block of queries is used once: nothing to overlap but its loads
        )

    def keywords(self, width: int) -> dict[str, Any]:
        """Constants and options of a launch."""
        return {
            "BLOCK_QUERIES": self.block_queries,
            "BLOCK_KEYS": self.block_keys,
            "BLOCK_WIDTH": self.block_width,
            "WIDTH": width,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


def _family(arch: str) -> str:
    if arch.startswith("gfx"):
        return "cdna"
    return "warpgroup" if arch.startswith(("sm_9", "sm_10")) else "warp"


# (is backward, who issues the matrix instruction) -> (queries, warps).
_TILES = {
    (False, "warp"): (64, 4),
    (False, "warpgroup"): (64, 4),
    (False, "cdna"): (64, 4),
    # dk and dv alone take 64 of the 255 registers of a thread. With 64 queries sm_80 to sm_120
    # spill 176 to 584 bytes, and with 32 sm_90 and sm_100 lose wgmma and tcgen05 in dq.
    (True, "warp"): (32, 8),
    (True, "warpgroup"): (64, 8),
    (True, "cdna"): (32, 4),
}


@jit
def load_rows(ptr, rows, num_rows, stride, BLOCK_WIDTH: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, BLOCK_WIDTH), zero outside."""
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@jit
def _short_attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    num_queries,
    num_keys,
    num_heads,
    scale,  # of the scores, in base 2
    q_stride_b,
    q_stride_l,
    q_stride_h,  # of 8 numbers: loads of 16 bytes
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    queries_per_program,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    chunk = tl.program_id(0)
    head = tl.program_id(1) % num_heads
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    row = tl.arange(0, BLOCK_QUERIES)
    columns = tl.arange(0, BLOCK_WIDTH)
    keys = tl.arange(0, BLOCK_KEYS)
    q_ptr += batch * q_stride_b + head * (q_stride_h * 8)
    k_ptr += batch * k_stride_b + head * (k_stride_h * 8)
    v_ptr += batch * v_stride_b + head * (v_stride_h * 8)
    out_ptr += (batch * num_queries * num_heads + head) * WIDTH
    lse_ptr += (batch * num_heads + head) * num_queries
    k = load_rows(k_ptr, keys, num_keys, k_stride_s, BLOCK_WIDTH, WIDTH)
    v = load_rows(v_ptr, keys, num_keys, v_stride_s, BLOCK_WIDTH, WIDTH)
    k_t = tl.trans(k)
    bias = tl.where(keys < num_keys, 0.0, float("-inf"))  # a select per score costs more registers

    first = chunk * queries_per_program
    for start in range(first, min(first + queries_per_program, num_queries), BLOCK_QUERIES):
        rows = start + row
        q = load_rows(q_ptr, rows.to(tl.int64), num_queries, q_stride_l, BLOCK_WIDTH, WIDTH)
        scores = tl.dot(q, k_t, input_precision="ieee") * scale + bias[None, :]
        top = tl.max(scores, 1)
        p = tl.exp2(scores - top[:, None])
        total = tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
        inside = (rows < num_queries)[:, None] & (columns < WIDTH)[None, :]
        offsets = rows.to(tl.int64)[:, None] * (num_heads * WIDTH) + columns[None, :]
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)
        lse = (top + tl.log2(total)) * 0.6931471805599453  # ln 2
        tl.store(lse_ptr + rows, lse, mask=rows < num_queries)


@jit
def _short_attention_backward(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    dq_ptr,
    partial_ptr,  # (2, C, B, S, H, E): of dk and dv
    num_queries,
    num_keys,
    num_heads,
    batch_size,
    scale,  # of the scores, in base 2
    q_stride_b,
    q_stride_l,
    q_stride_h,  # of 8 numbers: loads of 16 bytes
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    queries_per_program,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    chunk = tl.program_id(0)
    head = tl.program_id(1) % num_heads
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    row = tl.arange(0, BLOCK_QUERIES)
    columns = tl.arange(0, BLOCK_WIDTH)
    keys = tl.arange(0, BLOCK_KEYS)
    q_ptr += batch * q_stride_b + head * (q_stride_h * 8)
    k_ptr += batch * k_stride_b + head * (k_stride_h * 8)
    v_ptr += batch * v_stride_b + head * (v_stride_h * 8)
    token = num_heads * WIDTH
    own = (batch * num_queries * num_heads + head) * WIDTH
    lse_ptr += (batch * num_heads + head) * num_queries
    k = load_rows(k_ptr, keys, num_keys, k_stride_s, BLOCK_WIDTH, WIDTH)
    v = load_rows(v_ptr, keys, num_keys, v_stride_s, BLOCK_WIDTH, WIDTH)
    bias = tl.where(keys < num_keys, 0.0, float("-inf"))
    dk = tl.zeros((BLOCK_KEYS, BLOCK_WIDTH), tl.float32)
    dv = tl.zeros((BLOCK_KEYS, BLOCK_WIDTH), tl.float32)

    first = chunk * queries_per_program
    for start in range(first, min(first + queries_per_program, num_queries), BLOCK_QUERIES):
        rows = start + row
        wide = rows.to(tl.int64)
        q = load_rows(q_ptr, wide, num_queries, q_stride_l, BLOCK_WIDTH, WIDTH)
        dout = load_rows(dout_ptr + own, wide, num_queries, token, BLOCK_WIDTH, WIDTH)
        out = load_rows(out_ptr + own, wide, num_queries, token, BLOCK_WIDTH, WIDTH)
        lse = tl.load(lse_ptr + rows, mask=rows < num_queries, other=float("inf"))
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        # Transposed, (keys, queries), so that the products with p and ds take them as they are.
        # No key outside gets a p: exp2(0 - lse) may overflow, and its product with 0 is not 0.
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale + bias[:, None]
        p = tl.exp2(scores - (lse * 1.4426950408889634)[None, :])  # log2 e
        dv += tl.dot(p.to(dout.dtype), dout, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk += tl.dot(ds, q, input_precision="ieee")
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee") * (scale * 0.6931471805599453)  # ln 2
        inside = (rows < num_queries)[:, None] & (columns < WIDTH)[None, :]
        offsets = own + wide[:, None] * token + columns[None, :]
        tl.store(dq_ptr + offsets, dq.to(dq_ptr.dtype.element_ty), mask=inside)

    size = (batch * 0 + batch_size) * num_keys * token  # int64, also where the size is a constant 1
    share = (chunk * batch_size + batch) * num_keys * token + head * WIDTH
    inside = (keys < num_keys)[:, None] & (columns < WIDTH)[None, :]
    offsets = share + keys[:, None] * token + columns[None, :]
    tl.store(partial_ptr + offsets, dk * (scale * 0.6931471805599453), mask=inside)
    tl.store(partial_ptr + tl.num_programs(0) * size + offsets, dv, mask=inside)


@jit
def _short_attention_sum(partial_ptr, dk_ptr, dv_ptr, size, num_chunks, BLOCK: tl.constexpr):
    """Sums (2, C, size) over C, in order."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    partial_ptr += tl.program_id(1).to(tl.int64) * num_chunks * size
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(num_chunks):
        total += tl.load(partial_ptr + offsets, mask=inside, other=0.0)
        partial_ptr += size
    if tl.program_id(1) == 0:
        tl.store(dk_ptr + offsets, total.to(dk_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(dv_ptr + offsets, total.to(dv_ptr.dtype.element_ty), mask=inside)


def short_attention_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `attention.attention_forward`, for 1 to MAX_KEYS keys and heads of at most MAX_WIDTH, a
    multiple of 8."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    B, L, H, E = q.shape
    config, chunks, per_program = _plan(q, k, is_backward=False)
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, H, L), dtype=torch.float32)
    _short_attention_forward[chunks, B * H](
        q,
        k,
        v,
        out,
        lse,
        L,
        k.shape[1],
        H,
        E**-0.5 * _LOG2E,
        *strides(q, k, v),
        per_program,
        **config.keywords(E),
    )
    return out, lse


def short_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention.attention_backward`; dout and out are contiguous."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    B, L, H, E = q.shape
    config, chunks, per_program = _plan(q, k, is_backward=True)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    partial = q.new_empty((2, chunks, dk.numel()), dtype=torch.float32)
    _short_attention_backward[chunks, B * H](
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        partial,
        L,
        k.shape[1],
        H,
        B,
        E**-0.5 * _LOG2E,
        *strides(q, k, v),
        per_program,
        **config.keywords(E),
    )
    sum_chunks(partial, dk, dv)
    return dq, dk, dv


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where loads of 8 numbers do not fit its strides. E is a multiple of 8."""
    fits = x.stride(3) == 1 and all(stride % 8 == 0 for stride in x.stride()[:3])
    return x if fits else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Of batches and tokens, and that of heads in units of 8 numbers: the compiler sees from the
    product that they are aligned. Heads of 40 spill without."""
    return [n for x in tensors for n in (x.stride(0), x.stride(1), x.stride(2) // 8)]


def sum_chunks(partial: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes the sums of (2, C, S) float32 over C to dk and dv, contiguous and of S elements."""
    _short_attention_sum[-(-dk.numel() // _SUM_BLOCK), 2](
        partial, dk, dv, dk.numel(), partial.shape[1], BLOCK=_SUM_BLOCK, **_SUM_OPTIONS
    )


def _plan(q: Tensor, k: Tensor, *, is_backward: bool) -> tuple[ShortConfig, int, int]:
    """-> config, chunks of queries, queries a chunk: one wave of programs."""
    config = ShortConfig.from_heuristic(
        keys=k.shape[1], width=q.shape[3], arch=arch(q.device), is_backward=is_backward
    )
    blocks = -(-q.shape[1] // config.block_queries)
    # More programs hide latency in the forward; in the backward each costs a share of dk and dv
    # (SDXL at 4096 tokens: 0.4 MB of 21 MB moved), so that it gets one for each processor.
    wanted = num_processors(q.device) * (1 if is_backward else 4)
    per_chunk = -(-blocks // max(wanted // (q.shape[0] * q.shape[2]), 1))
    return config, -(-blocks // per_chunk), per_chunk * config.block_queries


_SUM_BLOCK = 1024
_SUM_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}

_STRIDES = {
    f"{x}_stride_{d}": "i32" for x, ds in (("q", "blh"), ("k", "bsh"), ("v", "bsh")) for d in ds
}
_ALIGNED_STRIDES = tuple(name for name in _STRIDES if not name.endswith("_h"))
_SIZES = {"num_queries": "i32", "num_keys": "i32", "num_heads": "i32"}


def _launch(
    *, width: int, is_backward: bool, targets: tuple[str, ...], one_sample: bool = False
) -> Launch:
    """`one_sample`: the size of a batch of one is a constant."""
    config = ShortConfig.from_heuristic(
        keys=77, width=width, arch=targets[0], is_backward=is_backward
    )
    pointers: tuple[str, ...] = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr")
    if is_backward:
        pointers = ("dout_ptr", *pointers, "dq_ptr", "partial_ptr")
    types = {p: "*fp32" if p in ("lse_ptr", "partial_ptr") else "*bf16" for p in pointers}
    sizes = {**_SIZES, "batch_size": "i32"} if is_backward and not one_sample else _SIZES
    keywords = config.keywords(width)
    blocks = {name: keywords.pop(name) for name in list(keywords) if name.isupper()}
    if one_sample:
        blocks["batch_size"] = 1
    direction = f"backward{' B=1' if one_sample else ''}" if is_backward else "forward"
    return Launch(
        name=f"short_attention_{direction} S=77 E={width} bf16",
        kernel=lambda: _short_attention_backward if is_backward else _short_attention_forward,
        signature={**types, **sizes, "scale": "fp32", **_STRIDES, "queries_per_program": "i32"},
        constants=blocks,
        aligned=(*pointers, "num_queries", *_ALIGNED_STRIDES, "queries_per_program"),
        targets=targets,
        matrix=True,
        **keywords,
    )


LAUNCHES = (
    *(
        _launch(width=width, is_backward=is_backward, targets=tuple(targets))
        for width in (40, 64)
        for is_backward in (False, True)
        for targets in (WARP, WARPGROUP, CDNA)
    ),
    *(
        _launch(width=width, is_backward=True, targets=tuple(targets), one_sample=True)
        for width in (40, 64)
        for targets in (WARP, WARPGROUP, CDNA)
    ),
    Launch(
        name="short_attention_sum bf16",
        kernel=lambda: _short_attention_sum,
        signature={"partial_ptr": "*fp32", "dk_ptr": "*bf16", "dv_ptr": "*bf16"}
        | {"size": "i32", "num_chunks": "i32"},
        constants={"BLOCK": _SUM_BLOCK},
        aligned=("partial_ptr", "dk_ptr", "dv_ptr", "size"),
        **_SUM_OPTIONS,
    ),
)
