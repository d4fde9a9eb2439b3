"""The flash kernels: Triton's interpreter against the definition in float64."""

import pytest
import torch
from torch import Tensor

from fasttune_kernels import flash_attention
from fasttune_kernels.attention import attention_ref
from fasttune_kernels.flash_attention import (
    LAUNCHES,
    FlashConfig,
    flash_attention_backward,
    flash_attention_forward,
)

# As in test_short_attention.py: sums in float32, and fp16's rounding of p, ds and the result.
TOL = {torch.float32: 2**-18, torch.float16: 2**-9}


def case(B: int, L: int, S: int, H: int, E: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, dout; q, k and v are slices of wider projections, as a model has them."""
    g = torch.Generator().manual_seed(L)
    q = torch.randn(B, L, 3, H, E, generator=g).to(dtype)[:, :, 2]
    k, v = torch.randn(B, S, 3, H, E, generator=g).to(dtype)[:, :, :2].unbind(2)
    return [q, k, v, torch.randn(B, L, H, E, generator=g).to(dtype)]


def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor | None) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    out, lse = flash_attention_forward(q, k, v, mask)
    return [out, lse, *flash_attention_backward(dout, q, k, v, out, lse, mask)]


def assert_true(results: list[Tensor], inputs: list[Tensor], mask: Tensor | None) -> None:
    q, k, v, dout = inputs
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = attention_ref(*leaves, mask)
    grads = torch.autograd.grad(out, leaves, dout.double())
    names = ("out", "lse", "dq", "dk", "dv")
    for name, ours, exact in zip(names, results, (out, lse, *grads), strict=True):
        limit = TOL[q.dtype] * exact.abs().max().clamp(min=1)
        assert (ours.double() - exact).abs().max() <= limit, name
        assert ours.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 40, 77, 2, 40), (2, 3, 140, 1, 128), (1, 1, 1, 1, 8), (3, 20, 33, 1, 80)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_forward_and_gradients(
    shape: tuple[int, int, int, int, int], masked: bool, dtype: torch.dtype
) -> None:
    inputs = case(*shape, dtype)
    mask = None
    if masked:  # the last keys alone: whole blocks of keys are masked before the first that is not
        count = shape[2]
        mask = (torch.arange(count) >= 3 * count // 4).expand(shape[0], count)
    assert_true(run(*inputs, mask), inputs, mask)


def test_queries_in_chunks_and_dk_and_dv_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What gfx1100 does at heads of 128, with shares of dk and dv, and of dk and dv at once."""
    inputs = case(2, 50, 20, 1, 80, torch.float32)
    monkeypatch.setattr(flash_attention, "num_processors", lambda device: 4)
    for arch in ("gfx1100", "gfx1201"):
        monkeypatch.setattr(flash_attention, "arch", lambda device, arch=arch: arch)
        config = FlashConfig.from_heuristic(kernel="dkdv", width=80, arch=arch)
        assert config.is_split == (arch == "gfx1100")
        assert flash_attention._chunks(inputs[0], 1, config.block_queries)[0] > 1
        assert_true(run(*inputs, None), inputs, None)


def test_few_chunks_where_key_blocks_fill_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "num_processors", lambda device: 96)
    q = torch.empty(1, 4096, 10, 64, device="meta")
    assert flash_attention._chunks(q, 64, 32) == (1, 4096)
    chunks, queries = flash_attention._chunks(q, 2, 32)
    assert chunks == 9 and 9 * queries >= 4096 > 8 * queries


def test_the_same_bits_on_every_run() -> None:
    inputs = case(1, 40, 77, 1, 16, torch.float16)
    assert all(map(torch.equal, run(*inputs, None), run(*inputs, None)))


def test_launches_are_of_the_configs() -> None:
    for launch in LAUNCHES:
        kernel = launch.name.split()[0].removeprefix("flash_attention_")
        config = FlashConfig.from_heuristic(
            kernel="dkdv" if kernel in ("dk", "dv") else kernel,
            width=launch.constants["WIDTH"],
            arch=launch.targets[0],
        )
        assert launch.constants["BLOCK_KEYS"] == config.block_keys
        assert launch.num_warps == config.num_warps
    assert {t for launch in LAUNCHES for t in launch.targets} == set(flash_attention.RDNA)
