"""Clipping against torch's and against float64."""

import pytest
import torch
from torch import nn

from fasttune.optim.clip import clip_by_global_norm_
from fasttune.seeds import generator_for


def with_gradients(dtype: torch.dtype = torch.float32, factor: float = 1.0) -> list[nn.Parameter]:
    g = generator_for(0)
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((40, 30), (7,), ())]
    for p in params:
        p.grad = (factor * torch.randn(p.shape, generator=g)).to(dtype)
    return [*params, nn.Parameter(torch.zeros(2))]  # one without a gradient


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_equals_torch(max_norm: float) -> None:
    ours, theirs = with_gradients(), with_gradients()
    norm = clip_by_global_norm_(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
    assert norm.dtype == torch.float32 and norm.dim() == 0


def test_bf16_norm_is_taken_in_float32() -> None:
    params = with_gradients(torch.bfloat16)
    truth = torch.cat([p.grad.double().flatten() for p in params[:-1]]).norm()
    torch.testing.assert_close(
        clip_by_global_norm_(params, None).double(), truth, rtol=1e-6, atol=0
    )


def test_without_limit_gradients_stay() -> None:
    params, same = with_gradients(), with_gradients()
    clip_by_global_norm_(params, None)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(params[:-1], same[:-1], strict=True))


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_loss_scale_is_divided_out(max_norm: float | None) -> None:
    scaled, plain = with_gradients(factor=1024.0), with_gradients()
    norm = clip_by_global_norm_(scaled, max_norm, loss_scale=torch.tensor(1024.0))
    expected = clip_by_global_norm_(plain, max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for a, b in zip(scaled[:-1], plain[:-1], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_gradient_shows_in_the_norm(bad: float) -> None:
    params = with_gradients()
    params[1].grad[3] = bad
    assert not clip_by_global_norm_(params, 1.0).isfinite()


def test_no_gradients() -> None:
    assert clip_by_global_norm_([nn.Parameter(torch.zeros(2))], 1.0) == 0
