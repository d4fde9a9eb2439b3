"""Flash attention, forward and backward, for GPUs on which PyTorch has none.

Scores are computed block by block and never stored. The backward is deterministic: one kernel owns
blocks of queries and writes dq, one owns blocks of keys and writes dk and dv, each computing the
probabilities anew from the saved logsumexp; no atomics. Where there are few keys, the blocks of keys
are too few programs to fill a GPU: the queries are split into chunks, each writes its share of dk and
dv in float32, and `short_attention` adds the shares in order.

Tri Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691

B batch, L query tokens, S key tokens, H heads, E head width, C chunks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttune_kernels import flash_attention_kernels as kernels
from fasttune_kernels.dispatch import arch, num_processors
from fasttune_kernels.jit import next_power_of_2
from fasttune_kernels.launch import Launch
from fasttune_kernels.short_attention import aligned, strides, sum_chunks

RDNA = ("gfx1100", "gfx1201")
"""The targets it ships for: SDPA is plain math there, see attention_dispatch.py."""

_LOG2E = 1.4426950408889634


MAX_WIDTH = 128
"""Of a head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlashConfig:
    """Sizes of one program. Not measured: the largest tiles that compile without spills."""

    block_queries: int
    block_keys: int
    block_width: int
    num_warps: int
    num_stages: int
    is_split: bool
    """dk and dv are computed by one launch each."""

    @classmethod
    def from_heuristic(cls, *, kernel: str, width: int, arch: str) -> "FlashConfig":
        """`kernel` is "forward", "dq" or "dkdv"; `width` that of a head."""
        is_wide = width > 64
        family = "gfx11" if arch.startswith("gfx11") else "other"
        queries, keys, warps = _TILES[kernel, is_wide, family]
        return cls(
            block_queries=queries,
            block_keys=keys,
            block_width=max(next_power_of_2(width), 16),
            num_warps=warps,
            num_stages=1,  # 2 keep another block of keys in registers, of which there are none left
            is_split=kernel == "dkdv" and is_wide and family == "gfx11",
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


# (kernel, head width over 64, family) -> (queries, keys, warps). gfx11 holds the operands of its
# matrix instruction twice, in both halves of a warp: at heads of 128, k, v, q and dout take all 256
# registers, so that dk and dv spill 42 to 221 together at any tile, and none apart (240 and 143).
_TILES = {
    ("forward", False, "gfx11"): (64, 64, 4),
    ("forward", False, "other"): (64, 64, 4),
    ("forward", True, "gfx11"): (128, 32, 8),
    ("forward", True, "other"): (128, 32, 8),
    ("dq", False, "gfx11"): (64, 32, 8),
    ("dq", False, "other"): (64, 32, 8),
    ("dq", True, "gfx11"): (32, 32, 8),
    ("dq", True, "other"): (64, 32, 8),
    ("dkdv", False, "gfx11"): (16, 64, 8),
    ("dkdv", False, "other"): (32, 64, 8),
    ("dkdv", True, "gfx11"): (16, 64, 8),
    ("dkdv", True, "other"): (32, 32, 8),
}


def flash_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `attention.attention_forward`, for at least one key and heads of at most MAX_WIDTH, a multiple of
    8."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    B, L, H, E = q.shape
    config = FlashConfig.from_heuristic(kernel="forward", width=E, arch=arch(q.device))
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, H, L), dtype=torch.float32)
    kernels.flash_attention_forward[-(-L // config.block_queries), B * H](
        q,
        k,
        v,
        _mask_or(mask, q),
        out,
        lse,
        L,
        k.shape[1],
        H,
        E**-0.5 * _LOG2E,
        *strides(q, k, v),
        HAS_MASK=mask is not None,
        **config.keywords(E),
    )
    return out, lse


def flash_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention.attention_backward`; dout and out are contiguous."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    B, L, H, E = q.shape
    S, scale = k.shape[1], E**-0.5 * _LOG2E
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    config = FlashConfig.from_heuristic(kernel="dq", width=E, arch=arch(q.device))
    kernels.flash_attention_dq[-(-L // config.block_queries), B * H](
        dout,
        q,
        k,
        v,
        _mask_or(mask, q),
        out,
        lse,
        delta,
        dq,
        L,
        S,
        H,
        scale,
        *strides(q, k, v),
        HAS_MASK=mask is not None,
        **config.keywords(E),
    )
    config = FlashConfig.from_heuristic(kernel="dkdv", width=E, arch=arch(q.device))
    blocks = -(-S // config.block_keys)
    chunks, per_program = _chunks(q, blocks, config.block_queries)
    share_k, share_v = dk, dv
    if chunks > 1:
        shares = q.new_empty((2, chunks, dk.numel()), dtype=torch.float32)
        share_k, share_v = shares[0], shares[1]
    for has_dk, has_dv in ((True, False), (False, True)) if config.is_split else ((True, True),):
        kernels.flash_attention_dkdv[blocks, B * H, chunks](
            dout,
            q,
            k,
            v,
            _mask_or(mask, q),
            lse,
            delta,
            share_k,
            share_v,
            L,
            S,
            H,
            B,
            scale,
            *strides(q, k, v),
            per_program,
            HAS_DK=has_dk,
            HAS_DV=has_dv,
            HAS_MASK=mask is not None,
            **config.keywords(E),
        )
    if chunks > 1:
        sum_chunks(shares, dk, dv)
    return dq, dk, dv


def _chunks(q: Tensor, key_blocks: int, block_queries: int) -> tuple[int, int]:
    """-> chunks of queries, queries a chunk: more than one where key blocks do not fill the GPU."""
    blocks = -(-q.shape[1] // block_queries)
    programs = q.shape[0] * q.shape[2] * key_blocks
    per_chunk = -(-blocks // max(2 * num_processors(q.device) // programs, 1))
    return -(-blocks // per_chunk), per_chunk * block_queries


def _mask_or(mask: Tensor | None, absent: Tensor) -> Tensor:
    return absent if mask is None else mask.contiguous().view(torch.uint8)


_TENSORS = {
    "forward": ("q", "k", "v", "mask", "out", "lse"),
    "dq": ("dout", "q", "k", "v", "mask", "out", "lse", "delta", "dq"),
    "dkdv": ("dout", "q", "k", "v", "mask", "lse", "delta", "dk", "dv"),
}
_KERNELS = {
    "forward": kernels.flash_attention_forward,
    "dq": kernels.flash_attention_dq,
    "dkdv": kernels.flash_attention_dkdv,
}
_STRIDE_NAMES = tuple(f"{x}_stride_{d}" for x in "qkv" for d in ("blh" if x == "q" else "bsh"))
_ALIGNED_STRIDES = tuple(name for name in _STRIDE_NAMES if not name.endswith("_h"))


def _launches(kernel: str, width: int, target: str, *, masked: bool) -> list[Launch]:
    types = {"lse": "*fp32", "delta": "*fp32", "mask": "*u8" if masked else "*bf16"}
    pointers = {f"{t}_ptr": types.get(t, "*bf16") for t in _TENSORS[kernel]}
    last = ["batch_size", "queries_per_program"] if kernel == "dkdv" else []
    integers = ["num_queries", "num_keys", "num_heads", *last, *_STRIDE_NAMES]
    config = FlashConfig.from_heuristic(kernel=kernel, width=width, arch=target)
    keywords = config.keywords(width)
    constants = {name: keywords.pop(name) for name in list(keywords) if name.isupper()}
    parts: dict[str, dict[str, bool]] = {kernel: {}}
    if kernel == "dkdv":
        parts = {"dkdv": {"HAS_DK": True, "HAS_DV": True}}
    if config.is_split:
        parts = {"dk": {"HAS_DK": True, "HAS_DV": False}, "dv": {"HAS_DK": False, "HAS_DV": True}}
    return [
        Launch(
            name=f"flash_attention_{part} E={width}{' masked' if masked else ''} bf16",
            kernel=lambda: _KERNELS[kernel],
            signature={**pointers, **dict.fromkeys(integers, "i32"), "scale": "fp32"},
            constants={**constants, **wanted, "HAS_MASK": masked},
            aligned=(*pointers, "num_queries", "num_keys", *_ALIGNED_STRIDES, *last[1:]),
            targets=(target,),
            matrix=True,
            **keywords,
        )
        for part, wanted in parts.items()
    ]


LAUNCHES = tuple(
    launch
    for kernel in _KERNELS
    for width in (64, 128)
    for target in RDNA
    for masked in (False, True)
    for launch in _launches(kernel, width, target, masked=masked)
)
