"""Lion against the algorithm of the paper in float64."""

from collections.abc import Callable

import pytest
import torch

from fasttune.optim import build_optimizer
from fasttune.optim.chunks import chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_paper(weights: Callable, set_gradients: Callable, dtype: torch.dtype) -> None:
    named = weights(dtype)
    lr, beta1, beta2, decay = 1e-3, 0.9, 0.99, 0.5
    optimizer = build_optimizer(
        "lion", named, lr=lr, betas=(beta1, beta2), eps=1e-8, weight_decay=decay
    )
    m = [torch.zeros(p.shape, dtype=torch.float64) for _, p in named]
    for step in range(12):
        set_gradients(named, step)
        before = [p.detach().double() for _, p in named]
        optimizer.step()
        for i, (_, p) in enumerate(named):
            g = p.grad.double()
            update = (beta1 * m[i] + (1 - beta1) * g).sign()
            exact = before[i] - lr * (update + decay * before[i])
            m[i] = beta2 * m[i] + (1 - beta2) * g
            tolerance = 1e-6 if dtype == torch.float32 else 2**-7.99
            assert ((p.double() - exact).abs() <= exact.abs() * tolerance + 1e-7).all()
            momentum = optimizer.state[p]["momentum"]
            assert momentum.dtype == torch.float32
            torch.testing.assert_close(momentum.double(), m[i], rtol=1e-4, atol=1e-8)


def test_weights_without_a_gradient_stay(weights: Callable, set_gradients: Callable) -> None:
    named = weights()
    set_gradients(named, 0)
    named[1][1].grad = None
    optimizer = build_optimizer("lion", named, lr=0.1, betas=(0.9, 0.99), eps=0.0, weight_decay=0.1)
    optimizer.step()
    original = weights()
    assert torch.equal(named[1][1], original[1][1]) and not optimizer.state[named[1][1]]
    assert not torch.equal(named[0][1], original[0][1])


def test_chunks_are_bounded_and_cover_everything(
    weights: Callable, set_gradients: Callable
) -> None:
    named = weights()
    set_gradients(named, 0)
    params = [p for _, p in named]
    parts = list(chunks(params, limit=8000))
    assert [id(p) for part in parts for p in part] == [id(p) for p in params]
    assert len(parts) == 2 and all(sum(p.numel() for p in part) <= 8000 for part in parts)
    by_shape = list(chunks(params, same_shape=True))
    assert [len(part) for part in by_shape] == [2, 1, 1, 1]
