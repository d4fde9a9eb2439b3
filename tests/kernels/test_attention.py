"""Attention as the networks call it, against its definition in float64."""

import sys

import pytest
import torch
from torch import Tensor

from fasttune_kernels import attention as module_function
from fasttune_kernels.attention import (
    _math_backward,
    _math_forward,
    attention,
    attention_backward,
    attention_forward,
    attention_ref,
)

# Rounding of the result itself, 2 units in the last place of values around 1, which a luckier
# eager run may not show: 2 * 2^-8, 2 * 2^-11, and 2^-20 of float32 for sums of tens of products.
TOL = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}


def inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and dout of (B, L, S, H, E)."""
    B, L, S, H, E = shape
    g = torch.Generator().manual_seed(seed)
    sizes = ((B, L, H, E), (B, S, H, E), (B, S, H, E), (B, L, H, E))
    q, k, v, dout = (torch.randn(size, generator=g).to(dtype) for size in sizes)
    return q, k, v, dout


def run(
    function: object, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor | None
) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, mask)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_as_close_as_eager(
    ours: list[Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor | None
) -> None:
    def ref(*arguments: Tensor) -> Tensor:
        return attention_ref(*arguments)[0]

    truth = run(ref, q.double(), k.double(), v.double(), dout.double(), mask)
    eager = run(ref, q, k, v, dout, mask)
    for name, a, e, t in zip(("out", "dq", "dk", "dv"), ours, eager, truth, strict=True):
        assert a.dtype == q.dtype and a.shape == t.shape
        error, allowed = (a.double() - t).abs().max(), (e.double() - t).abs().max()
        limit = 2 * allowed + TOL[q.dtype] * t.abs().max().clamp(min=1)
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


SHAPES = [(1, 1, 1, 1, 8), (2, 5, 7, 3, 16), (1, 33, 17, 2, 40), (8, 3, 77, 1, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_its_definition(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, masked: bool
) -> None:
    q, k, v, dout = inputs(shape, dtype)
    mask = torch.rand(k.shape[:2]).argsort(1) < max(k.shape[1] // 2, 1) if masked else None
    assert_as_close_as_eager(run(attention, q, k, v, dout, mask), q, k, v, dout, mask)


def test_it_is_what_the_package_exports() -> None:
    assert module_function is attention


def test_opcheck() -> None:
    q, k, v, dout = inputs((2, 5, 7, 3, 16), torch.float32)
    mask = torch.ones(2, 7, dtype=torch.bool)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for m in (None, mask):
        torch.library.opcheck(attention_forward, (*leaves, m))
        out, lse = attention_forward(q.detach(), k.detach(), v.detach(), m)
        arguments = (dout, q.detach(), k.detach(), v.detach(), out, lse, m)
        torch.library.opcheck(attention_backward, arguments)


def test_math_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, dout = inputs((2, 9, 7, 3, 16), torch.float16)
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    module = sys.modules[_math_forward.__module__]  # its name in the package is the function's
    monkeypatch.setattr(module, "_SCORES_BYTES", 4 * 2 * 3 * 7 * 4)  # four queries
    out, lse = _math_forward(q, k, v, mask)
    grads = _math_backward(dout, q, k, v, out, lse, mask)
    assert_as_close_as_eager([out, *grads], q, k, v, dout, mask)
    truth = attention_ref(q.double(), k.double(), v.double(), mask)[1]
    torch.testing.assert_close(lse.double(), truth, rtol=0, atol=2**-10)
