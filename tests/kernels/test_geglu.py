"""geglu against its definition: PyTorch and Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from fasttune_kernels.dispatch import Backend, forced
from fasttune_kernels.geglu import (
    LAUNCHES,
    GegluConfig,
    geglu,
    geglu_backward,
    geglu_forward,
    geglu_ref,
)
from fasttune_kernels.launch import TARGETS

BACKENDS: tuple[Backend, ...] = ("torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "slice of tokens": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "slice of columns": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "transposed tokens": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed columns": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1, :, :1].expand_as(x),
}


def eager(projected: Tensor) -> Tensor:
    y, gate = projected.chunk(2, dim=-1)
    return y * F.gelu(gate)


def with_gradient(
    function: Callable[[Tensor], Tensor], projected: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    x = projected.detach().requires_grad_()
    out = function(x)
    out.backward(dout.to(out.dtype))
    assert x.grad is not None
    return out.detach(), x.grad


def check(projected: Tensor, dout: Tensor) -> None:
    """Output and gradient are as near to the truth as eager PyTorch's, within a tolerance: one
    rounding to the dtype (at most eps / 2 of the value), and float32's cdf, whose error of 2^-23 is
    multiplied by two or three factors of at most 6, that is at most 2^-23 * 6^3 < 3e-5."""
    ours = with_gradient(geglu, projected, dout)
    assert ours[0].is_contiguous()
    plain = with_gradient(eager, projected, dout)
    truth = with_gradient(geglu_ref, projected.double(), dout.double())
    for own, other, true in zip(ours, plain, truth, strict=True):
        assert own.dtype is projected.dtype
        tolerance = torch.finfo(own.dtype).eps * true.abs() + 3e-5
        assert torch.all((own - true).abs() <= 2 * (other - true).abs() + tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 10), (8, 1, 130), (3, 2048)])
def test_near_the_truth(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    projected = 2 * torch.randn(shape, dtype=dtype)
    with forced(backend):
        check(projected, torch.randn(*shape[:-1], shape[-1] // 2, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str) -> None:
    change = LAYOUTS[layout]
    with forced(backend):
        check(change(torch.randn(2, 3, 12)), torch.randn(2, 3, 6))
        check(torch.randn(2, 3, 12), change(torch.randn(2, 3, 6)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 2, 6)])
def test_any_number_of_dimensions(backend: Backend, shape: tuple[int, ...]) -> None:
    with forced(backend):
        check(torch.randn(shape), torch.randn(*shape[:-1], 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6), (2, 3, 0)])
def test_empty(backend: Backend, shape: tuple[int, ...]) -> None:
    with forced(backend):
        out, gradient = with_gradient(
            geglu, torch.zeros(shape), torch.zeros(*shape[:-1], shape[-1] // 2)
        )
    assert out.shape == (*shape[:-1], shape[-1] // 2) and gradient.shape == shape


def test_the_kernel_is_accurate_where_gelu_is_small() -> None:
    gate = torch.linspace(-5.5, 5.5, 2001)
    with forced("triton"):
        out = geglu(torch.cat([torch.ones_like(gate), gate])).double()
    truth = 0.5 * gate.double() * torch.special.erfc(-gate.double() * 0.5**0.5)
    assert torch.all((out - truth).abs() <= 3e-5 * truth.abs())
    # cdf: 3e-8 and the rounding of p, which is FMA on GPUs alone; two products: 6e-8 each
    assert torch.all((out - truth).abs() <= 2.4e-7 * gate.abs())


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_from_zero(backend: Backend) -> None:
    gate = torch.tensor([-1e3, -40.0, -6.0, -0.0, 6.0, 40.0, 1e3])
    projected = torch.stack([torch.ones(7), gate], dim=1)
    with forced(backend):
        out, gradient = with_gradient(geglu, projected, torch.ones(7, 1))
    assert_close(out[:, 0], gate.clamp(min=0), atol=1e-6, rtol=0)
    assert_close(gradient[:, 1], torch.tensor([0, 0, 0, 0.5, 1, 1, 1]), atol=1e-6, rtol=0)


def test_the_definition_is_torchs() -> None:
    projected = torch.randn(3, 8, dtype=torch.float64)
    assert_close(geglu_ref(projected), eager(projected))
    assert geglu_ref(projected.bfloat16()).dtype is torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: Backend) -> None:
    projected = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    with forced(backend):  # float64 takes the PyTorch implementation
        assert torch.autograd.gradcheck(geglu, (projected,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ops_are_what_they_say(backend: Backend, layout: str) -> None:
    projected, dout = torch.randn(2, 2, 8), LAYOUTS[layout](torch.randn(2, 2, 4))
    with forced(backend):
        changed = LAYOUTS[layout](projected).detach().requires_grad_()
        torch.library.opcheck(geglu_forward, (changed,))
        torch.library.opcheck(geglu_backward, (dout, changed.detach()))


def test_the_projection_is_all_that_is_kept() -> None:
    kept: list[Tensor] = []
    projected = torch.randn(2, 3, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = geglu(projected)
    assert [x.data_ptr() for x in kept] == [projected.data_ptr()]
    before = projected.detach().clone()
    out.sum().backward(retain_graph=True)
    out.sum().backward()  # out of place: the graph can be used twice
    assert torch.equal(projected, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend: Backend) -> None:
    projected, dout = torch.randn(3, 40), torch.randn(3, 20)
    with forced(backend):
        first = with_gradient(geglu, projected, dout)
        for _ in range(3):
            again = with_gradient(geglu, projected, dout)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_compiles_without_a_break() -> None:
    projected, dout = torch.randn(2, 3, 8), torch.randn(2, 3, 4)
    compiled = torch.compile(geglu, fullgraph=True, backend="aot_eager")
    ours = with_gradient(compiled, projected, dout)
    assert_close(ours, with_gradient(geglu, projected, dout), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("projected", "message"),
    [
        (torch.zeros(3, 5), r"\(3, 5\); its last dimension has two halves"),
        (torch.tensor(1.0), "two halves"),
        (torch.zeros(2, 4, dtype=torch.int64), "torch.int64; give float16"),
        (torch.zeros(2, 4).to(torch.float8_e4m3fn), "float8"),
    ],
)
def test_what_it_refuses(projected: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geglu(projected)


def test_a_thread_loads_16_bytes() -> None:
    for target in TARGETS:
        for itemsize in (2, 4):
            config = GegluConfig.from_heuristic(5120, itemsize, target)
            threads = config.num_warps * (64 if target in ("gfx942", "gfx950") else 32)
            assert config.block * itemsize == 16 * threads
            assert 5120 % config.block == 0
    assert {target for launch in LAUNCHES for target in launch.targets} == set(TARGETS)
