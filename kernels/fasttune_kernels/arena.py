"""State of many tensors in one flat tensor, and random numbers that depend on the place in it alone.

Optimizer state and averaged weights are arenas: flat tensors in which every weight has its range. A
range starts at a multiple of BLOCK elements, so that a kernel's tile and the blocks that 8-bit state
is quantized in never straddle two weights. The elements between two ranges are zeros and stay zeros.
Weights and gradients are where they always were: permanent flat gradients would cost their memory
while the activations peak.

Random bits are Philox 4x32 (https://doi.org/10.1145/2063384.2063405), a function of a seed and of the
element's index. A counter is shared by the four elements that are QUANTUM apart in a tile of BLOCK
elements: the four words that it yields are one for each of them, so that no thread or vector lane
exchanges anything. 7 rounds are what its authors found to pass every test of BigCrush.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttune_kernels.jit import jit, tl

BLOCK = 1024
"""Elements: tile of the kernels, alignment of ranges."""
QUANTUM = 256
"""Elements that share the scale of 8-bit state, as in bitsandbytes."""
PHILOX_ROUNDS = 7

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMA_DTYPES = (torch.float32, torch.bfloat16)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def arena_offsets(sizes: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Where the range of each tensor of so many elements starts, and the length of the arena."""
    lengths = (-(-size // BLOCK) * BLOCK for size in sizes)
    *offsets, total = itertools.accumulate(lengths, initial=0)
    return tuple(offsets), total


@dataclass(frozen=True, slots=True)
class Arena:
    """The layout: which elements of a flat tensor belong to which weight, in memory order."""

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    total: int

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "Arena":
        """For these weights, in this order."""
        sizes = tuple(t.numel() for t in tensors)
        return Arena(sizes, *arena_offsets(sizes))

    def zeros(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """(total,): a moment, an average or compensation. uint8 stands for 8-bit state."""
        return torch.zeros(self.total, dtype=dtype, device=device)

    def absmax(self, device: torch.device | str) -> Tensor:
        """(total / 256,) float32: the scales of 8-bit state. Zeros, which make the state zero."""
        return torch.zeros(self.total // QUANTUM, dtype=torch.float32, device=device)

    def views(self, flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """The ranges of `flat`, with the shapes and strides of the weights `like`."""
        return [
            flat.as_strided(t.shape, t.stride(), flat.storage_offset() + offset)
            for t, offset in zip(like, self.offsets, strict=True)
        ]


def flat_view(t: Tensor) -> Tensor:
    """(numel,): the elements in memory order. ValueError where they are not dense."""
    if not is_dense(t):
        raise ValueError(
            f"a tensor of shape {tuple(t.shape)} and strides {t.stride()} has gaps or overlaps;"
            " weights have to be dense"
        )
    return t.as_strided((t.numel(),), (1,))


def is_dense(t: Tensor) -> bool:
    """Whether its elements fill a range of memory: contiguous, channels_last, transposed."""
    return t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)


def random_words(seed: Tensor, begin: int, end: int, stream: int) -> Tensor:
    """(end - begin,) int64, each of 32 random bits: those of the arena's elements [begin, end),
    which are multiples of BLOCK. `seed` is (1,) int64.

    Element i has word (i >> 8) & 3 of Philox with counter (i >> 10 << 8 | i & 255, stream, 0), which
    are 64, 32 and 32 bits, and key `seed`.
    """
    counter = torch.arange(begin // 4, end // 4, dtype=torch.int64, device=seed.device)
    words = _philox(counter, stream, seed)
    return torch.stack([w.view(-1, QUANTUM) for w in words], dim=1).view(-1)


def _philox(counter: Tensor, stream: int, seed: Tensor) -> tuple[Tensor, ...]:
    """In int64, as PyTorch has few operations on uint32: of a product that wraps, bits 32 to 63 are
    right after the mask."""
    c0, c1 = counter & _LOW, counter >> 32
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(PHILOX_ROUNDS):
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product2 >> 32) & _LOW) ^ c1 ^ k0
        c2 = ((product0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = product2 & _LOW, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bf16, up with the probability of the part that is cut off, so that the mean is x.
    The low 16 of `bits`, int, are uniform. What is not finite stays what it is."""
    raw = x.view(torch.int32)
    rounded = ((raw + (bits & 0xFFFF).to(torch.int32)) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a tensor: the range [begin, end) of its memory, at `offset` in the arena."""

    tensor: int
    begin: int
    end: int
    offset: int


def batches(
    sizes: Sequence[int], kinds: Sequence[object], limit: int
) -> Iterator[tuple[list[Piece], int, int]]:
    """Pieces that follow each other in the arena, all of one kind, with the range that they span:
    at most `limit` elements, a multiple of BLOCK."""
    batch: list[Piece] = []
    begin = end = 0
    kind: object = None
    for index, offset in enumerate(arena_offsets(sizes)[0]):
        for start in range(0, sizes[index], limit):
            stop = min(start + limit, sizes[index])
            length = -(-(stop - start) // BLOCK) * BLOCK
            if batch and (end + length - begin > limit or kinds[index] != kind):
                yield batch, begin, end
                batch = []
            if not batch:
                begin, kind = offset + start, kinds[index]
            batch.append(Piece(index, start, stop, offset + start))
            end = offset + start + length
    if batch:
        yield batch, begin, end


def limit_of(device: torch.device) -> int:
    """Elements of which the PyTorch path has float32 temporaries, about seven: 7 MiB on the CPU, which
    stay in its cache, and 448 MiB elsewhere."""
    return 1 << 18 if device.type == "cpu" else 1 << 24


def gather(tensors: Sequence[Tensor], pieces: list[Piece], begin: int, end: int) -> Tensor:
    """(tiles, BLOCK) float32, zero between the ranges."""
    flat = torch.zeros(end - begin, dtype=torch.float32, device=tensors[pieces[0].tensor].device)
    torch._foreach_copy_(*_pairs(flat, tensors, pieces, begin))
    return flat.view(-1, BLOCK)


def scatter(
    tensors: Sequence[Tensor], pieces: list[Piece], begin: int, new: Tensor, keep: Tensor | None
) -> None:
    ranges, views = _pairs(new.view(-1), tensors, pieces, begin)
    if keep is not None:
        ranges = [torch.where(keep, r.to(t.dtype), t) for r, t in zip(ranges, views, strict=True)]
    torch._foreach_copy_(views, ranges)


def _pairs(
    flat: Tensor, tensors: Sequence[Tensor], pieces: list[Piece], begin: int
) -> tuple[list[Tensor], list[Tensor]]:
    """(ranges of `flat`, which starts at `begin` in the arena; the same elements of the tensors)."""
    ranges = [flat[p.offset - begin : p.offset - begin + p.end - p.begin] for p in pieces]
    return ranges, [flat_view(tensors[p.tensor])[p.begin : p.end] for p in pieces]


# -- checks -----------------------------------------------------------------------------------------


def check_weights(weights: Sequence[Tensor], device: torch.device) -> None:
    """ValueError for weights that no step can update."""
    for index, w in enumerate(weights):
        if w.dtype not in WEIGHT_DTYPES or w.device != device or not is_dense(w):
            raise ValueError(
                f"weight {index} is {w.dtype} on {w.device} with strides {w.stride()}; weights are"
                f" dense float32, bf16 or fp16 tensors on the device of their state, {device}"
            )


def check_values(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """ValueError for another shape, dtype or device, and for elements that do not follow each other."""
    if x.shape != shape or x.dtype != dtype or x.device != device or not x.is_contiguous():
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; expected contiguous {dtype} {shape}"
            f" on {device}"
        )


def check_ema(ema: Tensor, total: int) -> None:
    """ValueError for an average that is no arena of so many float32 or bf16 elements."""
    if ema.dtype not in EMA_DTYPES:
        raise ValueError(f"ema is {ema.dtype}; allowed are float32 and bf16")
    check_values("ema", ema, (total,), ema.dtype, ema.device)


# -- the same inside of Triton kernels ---------------------------------------------------------------


@jit
def read(ptr, mask, MASKED: tl.constexpr):
    """float32. A mask of what is not known to be even keeps a load from being of 16 bytes, so that
    what is inside as a whole is read without one."""
    if MASKED:
        return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    return tl.load(ptr).to(tl.float32)


@jit
def write(ptr, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(ptr, value.to(ptr.dtype.element_ty))


@jit
def round_bits(x, bits):
    """`round_stochastic`, in float32 that a cast to bf16 does not change."""
    raw = x.to(tl.uint32, bitcast=True)
    finite = (raw & 0x7F800000) != 0x7F800000
    rounded = ((raw + (bits & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(finite, rounded, x)


@jit
def half_bits(x):
    """The bits by which `round_bits` rounds to the nearest bf16, and to even between two. A plain cast
    does so on a GPU; Triton's interpreter loses the carry out of the mantissa."""
    return 0x7FFF + ((x.to(tl.uint32, bitcast=True) >> 16) & 1)


@jit
def words_of(seed, counter, STREAM: tl.constexpr):
    """Four blocks of uint32: `random_words` of the four quarters of tiles. `counter` is int64, a
    quarter of the arena's index of a tile plus the place in a quarter."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + STREAM, zero, 7)  # PHILOX_ROUNDS


@jit
def quarter(words, q):
    """The words of quarter `q`. Selected and not indexed, so that the loop over quarters is no longer than
    its body: unrolled, the step with 8-bit state would not fit into the instruction cache."""
    return tl.where(
        q < 2, tl.where(q == 0, words[0], words[1]), tl.where(q == 2, words[2], words[3])
    )
