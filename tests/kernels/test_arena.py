"""Arenas: where tensors are in them, random bits by place, and 8-bit blocks beside bitsandbytes'."""

import pytest
import torch
from torch import Tensor

from fasttune_kernels import arena
from fasttune_kernels.arena import (
    BLOCK,
    Arena,
    arena_offsets,
    batches,
    gather,
    random_words,
    round_stochastic,
    scatter,
)
from fasttune_kernels.blockwise import (
    _dequantize,
    _quantize,
    dequantize_blockwise,
    dynamic_map,
    quantize_blockwise,
)
from fasttune_kernels.jit import jit, tl

CPU = torch.device("cpu")


def test_each_tensor_starts_a_tile() -> None:
    assert arena_offsets([3, 1024, 0, 1025]) == ((0, 1024, 2048, 2048), 4096)
    assert arena_offsets([]) == ((), 0)
    weights = [torch.randn(3), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    layout = Arena.of(weights)
    flat = layout.zeros(torch.bfloat16, "cpu")
    assert flat.shape == (2048,) and flat.dtype == torch.bfloat16
    assert layout.absmax("cpu").shape == (8,)
    for view, w in zip(layout.views(flat, weights), weights, strict=True):
        view.copy_(w)
        assert view.stride() == w.stride()
    # Memory order, so that kernels need no strides.
    assert torch.equal(flat[1024 : 1024 + 120], weights[1].permute(0, 2, 3, 1).flatten().bfloat16())


def test_batches_cover_every_element_once() -> None:
    sizes = [5, 3000, 0, 1024, 7, 7, 2048]
    kinds = ["a", "a", "b", "b", "b", "a", "a"]
    tensors = [torch.randn(size) for size in sizes]
    copies = [torch.zeros(size) for size in sizes]
    found: list[tuple[int, int]] = []
    for pieces, begin, end in batches(sizes, kinds, 2 * BLOCK):
        assert len({kinds[p.tensor] for p in pieces}) == 1
        assert begin % BLOCK == end % BLOCK == 0 and end - begin <= 2 * BLOCK
        scatter(copies, pieces, begin, gather(tensors, pieces, begin, end), None)
        found.append((begin, end))
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # Random123's known answers for philox4x32 of 7 rounds, as far as our counters reach.
        (0, 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ],
)
def test_philox_known_answers(counter: int, key: int, words: tuple[int, ...]) -> None:
    found = arena._philox(torch.tensor([counter]), 0, torch.tensor([key]))
    assert tuple(int(w) for w in found) == words


def test_philox_beside_plain_integers() -> None:
    low = 0xFFFFFFFF

    def philox(c: list[int], k: list[int]) -> list[int]:
        for _ in range(7):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
            k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
        return c

    seed, begin = -12345678901234567, 3 << 40
    words = random_words(torch.tensor([seed]), begin, begin + 2 * BLOCK, stream=1)
    for element in (0, 1, 255, 256, 600, 1023, 1024, 2047):
        counter = (begin + element >> 10 << 8) | element & 255
        right = philox([counter & low, counter >> 32, 1, 0], [seed & low, seed >> 32 & low])
        assert words[element] == right[element >> 8 & 3]


def test_random_words_are_uniform_and_apart() -> None:
    words = random_words(torch.tensor([3]), 0, 64 * BLOCK, stream=0)
    assert len(words.unique()) > 0.999 * len(words)
    for shift in (0, 16):
        bits = ((words >> shift) & 0xFFFF).double() / 65536
        # Deviation of a mean of 65536: 0.29 / 256 = 0.0011.
        assert bits.mean().item() == pytest.approx(0.5, abs=0.005)
    assert not torch.equal(words, random_words(torch.tensor([3]), 0, 64 * BLOCK, stream=1))
    part = random_words(torch.tensor([3]), 5 * BLOCK, 9 * BLOCK, stream=0)
    assert torch.equal(part, words[5 * BLOCK : 9 * BLOCK])


def test_round_stochastic() -> None:
    exact = torch.tensor([1.0, -2.5, 0.0, torch.inf, -torch.inf])
    for bits in (0, 0xFFFF):
        rounded = round_stochastic(exact, torch.full((5,), bits))
        assert torch.equal(rounded.float(), exact)
    assert round_stochastic(torch.tensor([torch.nan]), torch.tensor([0xFFFF])).isnan()
    third = torch.full((1 << 16,), -(1 + 2**-7 / 3))
    rounded = round_stochastic(third, torch.arange(1 << 16) + (5 << 16))
    assert set(rounded.tolist()) == {-1.0, -(1 + 2**-7)}
    torch.testing.assert_close(rounded.double().mean(), third[0].double(), rtol=1e-6, atol=0)


# -- 8 bits ------------------------------------------------------------------------------------------


@jit
def _codes(x_ptr, code_ptr, value_ptr, SIGNED: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    code = _quantize(tl.load(x_ptr + at), SIGNED)
    tl.store(code_ptr + at, code)
    tl.store(value_ptr + at, _dequantize(code, SIGNED))


def inputs(signed: bool) -> Tensor:
    """What is near the middles and the values themselves, and what is spread over all decades."""
    values = dynamic_map(signed, CPU)
    middles = (values[1:] + values[:-1]) / 2
    near = [values, middles * (1 + 2e-6), middles * (1 - 2e-6), torch.tensor([0.0, 1.0, 1e-30])]
    spread = 10 ** torch.linspace(-9, 0, 4096 - sum(map(len, near)))
    spread[::2] *= -1 if signed else 1
    return torch.cat([*near, spread])


@pytest.mark.parametrize("signed", [True, False])
def test_kernels_find_the_nearest_value(signed: bool) -> None:
    x, values = inputs(signed), dynamic_map(signed, CPU)
    code, value = torch.zeros(len(x), dtype=torch.uint8), torch.zeros(len(x))
    _codes[(1,)](x, code, value, SIGNED=signed, SIZE=len(x))
    torch.testing.assert_close(value, values[code.int()], rtol=3e-6, atol=0)
    best = (x[:, None] - values).abs().amin(1)
    assert ((x - values[code.int()]).abs() <= best + 1e-6 * x.abs()).all()


@pytest.mark.parametrize("signed", [True, False])
def test_all_values_are_used_and_symmetric(signed: bool) -> None:
    values = dynamic_map(signed, CPU)
    assert len(values.unique()) == 256 and values.diff().gt(0).all()
    codes, absmax = quantize_blockwise(values * 3, signed)
    assert torch.equal(codes, torch.arange(256, dtype=torch.uint8)) and absmax.tolist() == [3.0]
    torch.testing.assert_close(dequantize_blockwise(codes, absmax, signed), values * 3)
    zeros = torch.zeros(512)
    assert torch.equal(dequantize_blockwise(*quantize_blockwise(zeros, signed), signed), zeros)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("signed", [True, False])
def test_blocks_are_those_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs_map = functional.create_dynamic_map(signed)
    assert torch.equal(dynamic_map(signed, CPU), theirs_map)
    x = torch.randn(8 * 256, generator=torch.Generator().manual_seed(0)) ** 3 * 5
    x = x if signed else x.abs()
    theirs, state = functional.quantize_blockwise(x, code=theirs_map, blocksize=256)
    codes, absmax = quantize_blockwise(x, signed)
    assert torch.equal(absmax, state.absmax)
    # Their CPU kernel looks small values up in a coarse table, so that ours are at least as near.
    large = x.view(8, 256).abs() > 0.1 * absmax[:, None]
    assert large.sum() > 100 and (codes != theirs)[large.view(-1)].sum() <= 2
    error, their_error = (
        (dequantize_blockwise(c, absmax, signed) - x).abs() for c in (codes, theirs)
    )
    assert (error <= their_error * (1 + 1e-5) + 1e-9).all()
