"""Attention to few keys: Triton's interpreter against the definition in float64."""

import pytest
import torch
from torch import Tensor

from fasttune_kernels.attention import attention_ref
from fasttune_kernels.short_attention import (
    LAUNCHES,
    ShortConfig,
    short_attention_backward,
    short_attention_forward,
    sum_chunks,
)

# Sums of up to 128 products of values around 1, in float32: 2^-20 of the largest. fp16 adds two
# units in the last place of the result and of p and ds, which are rounded before their products.
TOL = {torch.float32: 2**-18, torch.float16: 2**-9}


def case(B: int, L: int, S: int, H: int, E: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, dout; q, k and v are slices of wider projections, as a model has them."""
    g = torch.Generator().manual_seed(L)
    q = torch.randn(B, L, 2, H, E, generator=g).to(dtype)[:, :, 1]
    k, v = torch.randn(B, S, 2, H, E, generator=g).to(dtype).unbind(2)
    return [q, k, v, torch.randn(B, L, H, E, generator=g).to(dtype)]


def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    out, lse = short_attention_forward(q, k, v)
    return [out, lse, *short_attention_backward(dout, q, k, v, out, lse)]


def truth(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = attention_ref(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout.double())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(1, 40, 77, 2, 40), (2, 3, 128, 1, 64), (8, 1, 1, 1, 8), (1, 150, 9, 1, 16)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_forward_and_gradients(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    inputs = case(*shape, dtype)
    names = ("out", "lse", "dq", "dk", "dv")
    for name, ours, exact in zip(names, run(*inputs), truth(*inputs), strict=True):
        limit = TOL[dtype] * exact.abs().max().clamp(min=1)
        assert (ours.double() - exact).abs().max() <= limit, name
        assert ours.is_contiguous()
        assert ours.dtype == (torch.float32 if name == "lse" else dtype)


def test_strides_of_all_kinds() -> None:
    """Heads first in memory, an expanded batch, and strides that 16-byte loads do not fit."""
    q, k, v, dout = case(2, 5, 9, 3, 16, torch.float32)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k[:1].expand(2, -1, -1, -1)
    v = torch.nn.functional.pad(v, (0, 1))[..., :16]
    assert all(
        map(
            torch.equal,
            run(q, k, v, dout),
            run(*(x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)), dout),
        )
    )
    for ours, exact in zip(run(q, k, v, dout), truth(q, k, v, dout), strict=True):
        assert (ours.double() - exact).abs().max() <= TOL[q.dtype] * exact.abs().max().clamp(min=1)


def test_very_negative_scores_leave_no_nan() -> None:
    """A key outside has the score 0, and exp(0 - lse) is infinite below a logsumexp of -88.7."""
    q, k, v, dout = case(1, 40, 77, 1, 16, torch.float32)
    q[..., 0], k[..., 0] = 1.0, -480.0  # every score about -120
    results = run(q, k, v, dout)
    assert results[1].max() < -88.7
    for index, (ours, exact) in enumerate(zip(results, truth(q, k, v, dout), strict=True)):
        # dq sums terms of 480 times a weight's rounding, whose exact sum is 0
        size = 480.0 if index == 2 else exact.abs().max().clamp(min=1)
        assert (ours.double() - exact).abs().max() <= 2**-14 * size, index


def test_the_same_bits_on_every_run() -> None:
    inputs = case(1, 70, 77, 1, 16, torch.float16)
    assert all(map(torch.equal, run(*inputs), run(*inputs)))


def test_shares_are_added_in_order() -> None:
    shares = torch.randn(2, 3, 1500, generator=torch.Generator().manual_seed(0))
    dk, dv = torch.empty(1500), torch.empty(1500)
    sum_chunks(shares, dk, dv)
    for total, share in ((dk, shares[0]), (dv, shares[1])):
        assert torch.equal(total, share[0] + share[1] + share[2])


@pytest.mark.parametrize("arch", ["sm_86", "sm_90", "gfx942"])
def test_config_covers_keys_and_width(arch: str) -> None:
    config = ShortConfig.from_heuristic(keys=77, width=40, arch=arch, is_backward=True)
    assert (config.block_keys, config.block_width) == (128, 64)
    assert config.keywords(40)["WIDTH"] == 40


def test_launches_are_of_the_configs() -> None:
    for launch in LAUNCHES:
        if "sum" in launch.name:
            continue
        config = ShortConfig.from_heuristic(
            keys=77,
            width=launch.constants["WIDTH"],
            arch=launch.targets[-1],
            is_backward="backward" in launch.name,
        )
        assert launch.constants["BLOCK_QUERIES"] == config.block_queries
        assert launch.num_warps == config.num_warps
