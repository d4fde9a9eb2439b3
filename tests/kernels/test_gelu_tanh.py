"""gelu_tanh against its definition: PyTorch and Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from fasttune_kernels.dispatch import Backend, forced
from fasttune_kernels.gelu_tanh import (
    LAUNCHES,
    GeluTanhConfig,
    gelu_tanh,
    gelu_tanh_backward,
    gelu_tanh_forward,
    gelu_tanh_ref,
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


def eager(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def with_gradient(
    function: Callable[[Tensor], Tensor], x: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = function(x)
    out.backward(dout.to(out.dtype))
    assert x.grad is not None
    return out.detach(), x.grad


def check(x: Tensor, dout: Tensor) -> None:
    """Output and gradient are as near to the truth as eager PyTorch's, within a tolerance: one
    rounding to the dtype (at most eps / 2 of the value), and float32's sigmoid, whose error of 2^-23
    is multiplied by dout, x and the derivative of 2u, that is by at most 4 * 6 * 10 where the sigmoid
    has a slope: 3e-5."""
    ours = with_gradient(gelu_tanh, x, dout)
    assert ours[0].is_contiguous()
    plain = with_gradient(eager, x, dout)
    truth = with_gradient(gelu_tanh_ref, x.double(), dout.double())
    for own, other, true in zip(ours, plain, truth, strict=True):
        assert own.dtype is x.dtype
        tolerance = torch.finfo(own.dtype).eps * true.abs() + 3e-5
        assert torch.all((own - true).abs() <= 2 * (other - true).abs() + tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 10), (8, 1, 130), (3, 2048)])
def test_near_the_truth(backend: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = 2 * torch.randn(shape, dtype=dtype)
    with forced(backend):
        check(x, torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str) -> None:
    change = LAYOUTS[layout]
    with forced(backend):
        check(change(torch.randn(2, 3, 6)), torch.randn(2, 3, 6))
        check(torch.randn(2, 3, 6), change(torch.randn(2, 3, 6)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 2, 6)])
def test_any_number_of_dimensions(backend: Backend, shape: tuple[int, ...]) -> None:
    with forced(backend):
        check(torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6), (2, 3, 0)])
def test_empty(backend: Backend, shape: tuple[int, ...]) -> None:
    with forced(backend):
        out, gradient = with_gradient(gelu_tanh, torch.zeros(shape), torch.zeros(shape))
    assert out.shape == gradient.shape == shape


def test_the_kernel_is_accurate_where_gelu_is_small() -> None:
    x = torch.linspace(-5.5, 5.5, 2001)
    with forced("triton"):
        ours = with_gradient(gelu_tanh, x, torch.ones_like(x))
    truth = with_gradient(gelu_tanh_ref, x.double(), torch.ones_like(x, dtype=torch.float64))
    for own, true in zip(ours, truth, strict=True):
        # 2u is at most 21 there and its exponential's argument is rounded at 2^-23 of that
        assert torch.all((own - true).abs() <= 5e-6 * true.abs() + 1e-7)
    assert torch.all((ours[0] - truth[0]).abs() <= 5e-6 * truth[0].abs())


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_from_zero(backend: Backend) -> None:
    x = torch.tensor([-1e3, -40.0, -6.0, -0.0, 6.0, 40.0, 1e3])
    with forced(backend):
        out, gradient = with_gradient(gelu_tanh, x, torch.ones(7))
    assert_close(out, x.clamp(min=0), atol=1e-6, rtol=0)
    assert_close(gradient, torch.tensor([0, 0, 0, 0.5, 1, 1, 1]), atol=1e-6, rtol=0)


def test_the_definition_is_torchs() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    assert_close(gelu_tanh_ref(x), eager(x))
    assert gelu_tanh_ref(x.bfloat16()).dtype is torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: Backend) -> None:
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    with forced(backend):  # float64 takes the PyTorch implementation
        assert torch.autograd.gradcheck(gelu_tanh, (x,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ops_are_what_they_say(backend: Backend, layout: str) -> None:
    x, dout = torch.randn(2, 2, 4), LAYOUTS[layout](torch.randn(2, 2, 4))
    with forced(backend):
        changed = LAYOUTS[layout](x).detach().requires_grad_()
        torch.library.opcheck(gelu_tanh_forward, (changed,))
        torch.library.opcheck(gelu_tanh_backward, (dout, changed.detach()))


def test_x_is_all_that_is_kept() -> None:
    kept: list[Tensor] = []
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = gelu_tanh(x)
    assert [x.data_ptr() for x in kept] == [x.data_ptr()]
    before = x.detach().clone()
    out.sum().backward(retain_graph=True)
    out.sum().backward()  # out of place: the graph can be used twice
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(backend: Backend) -> None:
    x, dout = torch.randn(3, 20), torch.randn(3, 20)
    with forced(backend):
        first = with_gradient(gelu_tanh, x, dout)
        for _ in range(3):
            again = with_gradient(gelu_tanh, x, dout)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_compiles_without_a_break() -> None:
    x, dout = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    compiled = torch.compile(gelu_tanh, fullgraph=True, backend="aot_eager")
    ours = with_gradient(compiled, x, dout)
    assert_close(ours, with_gradient(gelu_tanh, x, dout), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor(1.0), r"x has no dimension"),
        (torch.zeros(2, 4, dtype=torch.int64), "torch.int64; give float16"),
        (torch.zeros(2, 4).to(torch.float8_e4m3fn), "float8"),
    ],
)
def test_what_it_refuses(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gelu_tanh(x)


def test_a_thread_loads_16_bytes() -> None:
    for target in TARGETS:
        for itemsize in (2, 4):
            config = GeluTanhConfig.from_heuristic(12288, itemsize, target)
            threads = config.num_warps * (64 if target in ("gfx942", "gfx950") else 32)
            assert config.block * itemsize == 16 * threads
            assert 12288 % config.block == 0
    assert {target for launch in LAUNCHES for target in launch.targets} == set(TARGETS)
