"""Launch configs and Triton kernels of qk_norm_rope, and what ships of them.

A program has some heads of one token at a time, tiles (heads, E) in the layout that the loads have:
neighbouring pairs are in one thread, and turning them moves nothing between threads. Whether its tokens
are text or image is decided once a program, by address.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fasttune_kernels.jit import jit, next_power_of_2, tl
from fasttune_kernels.launch import NVIDIA, Launch


@dataclass(frozen=True, kw_only=True, slots=True)
class QkNormRopeConfig:
    """How the kernels launch. Not measured; the reasoning is in `from_heuristic`."""

    num_heads: int
    head_width: int
    tile_heads: int
    """Of one token, in a program."""
    tokens: int
    """That a program of the backward goes through when the weights have gradients."""
    num_warps: int

    @classmethod
    def from_heuristic(
        cls, num_heads: int, head_width: int, itemsize: int, arch: str
    ) -> "QkNormRopeConfig":
        """For H = `num_heads` and E = `head_width`. Each thread loads 16 bytes of q, of k and of v, and
        a tile has 128 threads at most: Flux's 24 heads of 128 in bfloat16 are three tiles of 8, and no
        thread is idle. 8 tokens a program make 1728 programs of Flux's 4608 tokens, more than an H200
        holds at once, while the sums of weight gradients that they write, 1 KiB each, are 0.8 % of
        the 8 x 27 MiB that a backward moves.
        """
        threads_of_head = max(next_power_of_2(head_width) * itemsize // 16, 1)
        tile_heads = min(next_power_of_2(num_heads), max(128 // threads_of_head, 1))
        wave = 64 if arch.startswith("gfx9") else 32
        return cls(
            num_heads=num_heads,
            head_width=head_width,
            tile_heads=tile_heads,
            tokens=8,
            num_warps=min(max(tile_heads * threads_of_head // wave, 1), 4),
        )

    @property
    def tiles(self) -> int:
        """Of one token."""
        return -(-self.num_heads // self.tile_heads)

    def constants(self) -> dict[str, int]:
        return {
            "HEADS": self.num_heads,
            "WIDTH": self.head_width,
            "TILE_HEADS": self.tile_heads,
            "TILE_WIDTH": next_power_of_2(self.head_width),
        }

    def options(self) -> dict[str, int | bool]:
        """The compiler's. No loop has loads that could run ahead of a product: one stage."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


SUM_TILE = {"ROWS": 512, "COLUMNS": 8}
SUM_OPTIONS: dict[str, int | bool] = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
"""The second stage reads 32 bytes of 512 rows at once, 16 values a thread: its time is the latency of
4 such loads for Flux's 1728 rows. Not measured."""


@jit
def _rotate(x, cos, sin, TILE: tl.constexpr):
    a, b = tl.split(tl.reshape(x, (TILE[0], TILE[1] // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), TILE)


@jit
def _rstd(x, eps, WIDTH: tl.constexpr):
    return tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / WIDTH + eps)


@jit
def _load(text_ptr, ptr, is_text, start, offset, mask):
    """From one of two tensors. To choose a pointer first would fail on AMD in triton 3.6."""
    if text_ptr is None:
        x = tl.load(ptr + start + offset, mask, other=0.0)
    elif is_text:
        x = tl.load(text_ptr + start + offset, mask, other=0.0)
    else:
        x = tl.load(ptr + start + offset, mask, other=0.0)
    return x


@jit
def _store(text_ptr, ptr, is_text, start, offset, x, mask):
    if text_ptr is None:
        tl.store(ptr + start + offset, x, mask)
    elif is_text:
        tl.store(text_ptr + start + offset, x, mask)
    else:
        tl.store(ptr + start + offset, x, mask)


@jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    text_qkv_ptr,
    text_q_weight_ptr,
    text_k_weight_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    num_text,
    num_tokens,
    sample_stride,
    token_stride,
    slot_stride,
    head_stride,
    text_sample_stride,
    text_token_stride,
    text_slot_stride,
    text_head_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
):
    tiles: tl.constexpr = (HEADS + TILE_HEADS - 1) // TILE_HEADS
    token = (tl.program_id(0) // tiles).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    is_text = token < num_text
    text = sample * text_sample_stride + token * text_token_stride
    image = sample * sample_stride + (token - num_text) * token_stride
    at = tl.where(is_text, text, image)
    slot_stride = tl.where(is_text, text_slot_stride, slot_stride)
    head_stride = tl.where(is_text, text_head_stride, head_stride)

    start = (sample * num_tokens + token) * (HEADS * WIDTH)
    tile: tl.constexpr = (TILE_HEADS, TILE_WIDTH)
    head = tl.program_id(0) % tiles * TILE_HEADS + tl.arange(0, TILE_HEADS)[:, None]
    column = tl.arange(0, TILE_WIDTH)[None, :]
    mask = (head < HEADS) & (column < WIDTH)
    x = head * head_stride + column
    out = head * WIDTH + column
    # Rows without a stride: every thread loads what its own values need, in the layout they have.
    weight = head * 0 + column
    pair = head * 0 + tl.arange(0, TILE_WIDTH // 2)[None, :]
    turns = pair < WIDTH // 2
    # All loads come before a store: compilers move none across, and each waits for memory alone then.
    q = _load(text_qkv_ptr, qkv_ptr, is_text, at, x, mask)
    k = _load(text_qkv_ptr, qkv_ptr, is_text, at + slot_stride, x, mask)
    if v_ptr is not None:
        v = _load(text_qkv_ptr, qkv_ptr, is_text, at + 2 * slot_stride, x, mask)
    q_weight = _load(text_q_weight_ptr, q_weight_ptr, is_text, 0, weight, mask).to(tl.float32)
    k_weight = _load(text_k_weight_ptr, k_weight_ptr, is_text, 0, weight, mask).to(tl.float32)
    cos = tl.load(cos_ptr + token * (WIDTH // 2) + pair, turns, other=0.0)
    sin = tl.load(sin_ptr + token * (WIDTH // 2) + pair, turns, other=0.0)
    q = q.to(tl.float32)
    q *= _rstd(q, eps, WIDTH) * q_weight
    tl.store(q_ptr + start + out, _rotate(q, cos, sin, tile), mask)
    k = k.to(tl.float32)
    k *= _rstd(k, eps, WIDTH) * k_weight
    tl.store(k_ptr + start + out, _rotate(k, cos, sin, tile), mask)
    if v_ptr is not None:
        tl.store(v_ptr + start + out, v, mask)


@jit
def _gradient(dy, x, weight, cos, sin, eps, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """dx, and the weight's gradient before it is summed."""
    x = x.to(tl.float32)
    dz = _rotate(dy.to(tl.float32), cos, -sin, TILE)
    rstd = _rstd(x, eps, WIDTH)
    x_hat = x * rstd
    dweight = dz * x_hat
    mean = tl.sum(dweight * weight, 1, keep_dims=True) / WIDTH
    return (dz * weight - x_hat * mean) * rstd, dweight


@jit
def backward_kernel(
    dqkv_ptr,
    dtext_qkv_ptr,
    sums_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dq_sample_stride,
    dq_token_stride,
    dq_head_stride,
    dk_sample_stride,
    dk_token_stride,
    dk_head_stride,
    dv_sample_stride,
    dv_token_stride,
    dv_head_stride,
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    text_qkv_ptr,
    text_q_weight_ptr,
    text_k_weight_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    num_text,
    num_tokens,
    sample_stride,
    token_stride,
    slot_stride,
    head_stride,
    text_sample_stride,
    text_token_stride,
    text_slot_stride,
    text_head_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tiles: tl.constexpr = (HEADS + TILE_HEADS - 1) // TILE_HEADS
    block = (tl.program_id(0) // tiles).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    # A program's tokens are all text or all image.
    text_blocks = tl.cdiv(num_text, TOKENS)
    is_text = block < text_blocks
    first = tl.where(is_text, block * TOKENS, num_text + (block - text_blocks) * TOKENS)
    end = tl.minimum(first + TOKENS, tl.where(is_text, num_text, num_tokens))
    # Of the token that would be the buffer's first in the outputs' numbers.
    image = sample * sample_stride - num_text * token_stride
    sample_at = tl.where(is_text, sample * text_sample_stride, image)
    dx_row = tl.where(is_text, sample * num_text, sample * (num_tokens - num_text) - num_text)
    token_stride = tl.where(is_text, text_token_stride, token_stride)
    slot_stride = tl.where(is_text, text_slot_stride, slot_stride)
    head_stride = tl.where(is_text, text_head_stride, head_stride)

    tile: tl.constexpr = (TILE_HEADS, TILE_WIDTH)
    head = tl.program_id(0) % tiles * TILE_HEADS + tl.arange(0, TILE_HEADS)[:, None]
    column = tl.arange(0, TILE_WIDTH)[None, :]
    mask = (head < HEADS) & (column < WIDTH)
    x = head * head_stride + column
    dx = head * WIDTH + column
    weight = head * 0 + column
    pair = head * 0 + tl.arange(0, TILE_WIDTH // 2)[None, :]
    turns = pair < WIDTH // 2
    q_weight = _load(text_q_weight_ptr, q_weight_ptr, is_text, 0, weight, mask).to(tl.float32)
    k_weight = _load(text_k_weight_ptr, k_weight_ptr, is_text, 0, weight, mask).to(tl.float32)
    dq_ptr += sample * dq_sample_stride
    dk_ptr += sample * dk_sample_stride
    if sums_ptr is not None:
        dq_weight = tl.zeros(tile, tl.float32)
        dk_weight = tl.zeros(tile, tl.float32)
    for token in range(first, end):
        cos = tl.load(cos_ptr + token * (WIDTH // 2) + pair, turns, other=0.0)
        sin = tl.load(sin_ptr + token * (WIDTH // 2) + pair, turns, other=0.0)
        at = sample_at + token * token_stride
        dq = dq_ptr + token * dq_token_stride + head * dq_head_stride + column
        dk = dk_ptr + token * dk_token_stride + head * dk_head_stride + column
        dq = tl.load(dq, mask, other=0.0)
        q = _load(text_qkv_ptr, qkv_ptr, is_text, at, x, mask)
        dk = tl.load(dk, mask, other=0.0)
        k = _load(text_qkv_ptr, qkv_ptr, is_text, at + slot_stride, x, mask)
        dv = tl.zeros(tile, tl.float32)
        if dv_ptr is not None:
            dv = dv_ptr + sample * dv_sample_stride + token * dv_token_stride
            dv = tl.load(dv + head * dv_head_stride + column, mask)
        dq, dq_products = _gradient(dq, q, q_weight, cos, sin, eps, WIDTH, tile)
        dk, dk_products = _gradient(dk, k, k_weight, cos, sin, eps, WIDTH, tile)
        to = (dx_row + token) * (3 * HEADS * WIDTH)
        _store(dtext_qkv_ptr, dqkv_ptr, is_text, to, dx, dq, mask)
        _store(dtext_qkv_ptr, dqkv_ptr, is_text, to + HEADS * WIDTH, dx, dk, mask)
        _store(dtext_qkv_ptr, dqkv_ptr, is_text, to + 2 * HEADS * WIDTH, dx, dv, mask)
        if sums_ptr is not None:
            dq_weight += dq_products
            dk_weight += dk_products
    if sums_ptr is not None:
        row = (block * tl.num_programs(1) + sample) * tiles + tl.program_id(0) % tiles
        column = tl.arange(0, TILE_WIDTH)
        sums_ptr += row * (2 * WIDTH) + column
        tl.store(sums_ptr, tl.sum(dq_weight, 0), column < WIDTH)
        tl.store(sums_ptr + WIDTH, tl.sum(dk_weight, 0), column < WIDTH)


@jit
def sum_kernel(
    dq_weight_ptr,
    dk_weight_ptr,
    dtext_q_weight_ptr,
    dtext_k_weight_ptr,
    sums_ptr,
    num_text_rows,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    output = tl.program_id(1)  # 0 and 1 are the image's
    first = tl.where(output < 2, num_text_rows, 0)
    end = tl.where(output < 2, num_rows, num_text_rows)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = sums_ptr + output % 2 * WIDTH + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(first, end, ROWS):
        rows = row + tl.arange(0, ROWS)[:, None]
        mask = (rows < end) & (column < WIDTH)[None, :]
        total += tl.load(start + rows * (2 * WIDTH), mask, other=0.0)
    total = tl.sum(total, 0)
    mask = column < WIDTH
    tl.store(dq_weight_ptr + column, total, mask & (output == 0))
    tl.store(dk_weight_ptr + column, total, mask & (output == 1))
    if dtext_q_weight_ptr is not None:
        tl.store(dtext_q_weight_ptr + column, total, mask & (output == 2))
        tl.store(dtext_k_weight_ptr + column, total, mask & (output == 3))


TEXT = ("text_qkv_ptr", "text_q_weight_ptr", "text_k_weight_ptr")
BF16 = ("qkv_ptr", "q_weight_ptr", "k_weight_ptr", *TEXT)
FP32 = ("cos_ptr", "sin_ptr")
STRIDES = tuple(
    f"{x}{y}_stride" for x in ("", "text_") for y in ("sample", "token", "slot", "head")
)
DY_STRIDES = tuple(f"d{x}_{y}_stride" for x in "qkv" for y in ("sample", "token", "head"))
WEIGHTS = tuple(f"d{x}_weight_ptr" for x in ("q", "k", "text_q", "text_k"))


def _launches(num_heads: int, head_width: int, targets: tuple[str, ...]) -> Iterator[Launch]:
    """Of one buffer, and of two; without and with gradients of the weights."""
    config = QkNormRopeConfig.from_heuristic(num_heads, head_width, itemsize=2, arch=targets[0])

    def launch(
        name: str,
        kernel: Callable[[], Any],
        bf16: tuple[str, ...],
        fp32: tuple[str, ...],
        strides: tuple[str, ...],
        absent: tuple[str, ...],
        constants: dict[str, int],
    ) -> Launch:
        pointers = dict.fromkeys(bf16, "*bf16") | dict.fromkeys(fp32, "*fp32")
        arrays = {x: kind for x, kind in pointers.items() if x not in absent}
        arrays |= dict.fromkeys(strides, "i32")
        return Launch(
            name=f"qk_norm_rope_{name} H={num_heads} E={head_width} bf16",
            kernel=kernel,
            signature=arrays | {"eps": "fp32", "num_text": "i32", "num_tokens": "i32"},
            constants=config.constants() | constants | dict.fromkeys(absent),
            aligned=tuple(arrays),
            **config.options(),  # type: ignore[arg-type]
            targets=targets,
        )

    for text in (False, True):
        buffers = " text" if text else ""
        yield launch(
            f"forward{buffers}",
            lambda: forward_kernel,
            ("q_ptr", "k_ptr", "v_ptr", *BF16),
            FP32,
            STRIDES,
            () if text else ("v_ptr", *TEXT),
            {},
        )
        for weights in (False, True):
            yield launch(
                f"backward{buffers}{' weights' if weights else ''}",
                lambda: backward_kernel,
                ("dqkv_ptr", "dtext_qkv_ptr", "dq_ptr", "dk_ptr", "dv_ptr", *BF16),
                ("sums_ptr", *FP32),
                (*DY_STRIDES, *STRIDES),
                (() if text else ("dtext_qkv_ptr", *TEXT)) + (() if weights else ("sums_ptr",)),
                {"TOKENS": config.tokens if weights else 1},
            )


LAUNCHES: tuple[Launch, ...] = (
    *_launches(24, 128, (*NVIDIA, "gfx1100", "gfx1201")),
    *_launches(24, 128, ("gfx942", "gfx950")),
    Launch(
        name="qk_norm_rope_sum text E=128",
        kernel=lambda: sum_kernel,
        signature={
            **dict.fromkeys((*WEIGHTS, "sums_ptr"), "*fp32"),
            "num_text_rows": "i32",
            "num_rows": "i32",
        },
        constants={"WIDTH": 128, **SUM_TILE},
        aligned=(*WEIGHTS, "sums_ptr"),
        **SUM_OPTIONS,  # type: ignore[arg-type]
    ),
)
