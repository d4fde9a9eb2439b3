"""Adafactor against transformers' implementation."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor as Theirs

from fasttune.optim import build_optimizer

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.1}


def reference(params: list[nn.Parameter], eps: float) -> Theirs:
    return Theirs(
        params,
        lr=1e-2,
        eps=(eps**2, 1e-3),
        clip_threshold=1.0,
        decay_rate=-0.8,
        weight_decay=0.1,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )


@pytest.mark.parametrize("eps", [1e-15, 1e-3])
@pytest.mark.parametrize("scale", [1e-5, 1.0])
def test_equals_transformers(
    weights: Callable, set_gradients: Callable, eps: float, scale: float
) -> None:
    ours = weights()
    theirs = weights()
    # Convolutions are factored as (out, in * kernel) matrices; transformers would factor the kernel.
    flat = [nn.Parameter(p.detach().flatten(1) if p.dim() > 2 else p.detach()) for _, p in theirs]
    a = build_optimizer("adafactor", ours, eps=eps, **OPTIONS)
    b = reference(flat, eps)
    for step in range(15):
        set_gradients(ours, step, scale)
        for (_, p), q in zip(ours, flat, strict=True):
            q.grad = p.grad.clone().view_as(q)
        a.step()
        b.step()
    for (_, p), q in zip(ours, flat, strict=True):
        torch.testing.assert_close(p.view_as(q), q, rtol=2e-6, atol=2e-6)


def test_bf16_weights_follow_transformers(weights: Callable, set_gradients: Callable) -> None:
    ours, theirs = weights(torch.bfloat16)[:2], weights(torch.bfloat16)[:2]
    a = build_optimizer("adafactor", ours, eps=1e-15, **OPTIONS)
    b = reference([p for _, p in theirs], 1e-15)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    for (_, p), (_, q) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2**-7, atol=1e-6)
        assert a.state[p]["row"].dtype == torch.float32


def test_state_of_a_matrix_is_its_sides(weights: Callable, set_gradients: Callable) -> None:
    named = weights()
    optimizer = build_optimizer("adafactor", named, eps=1e-8, **OPTIONS)
    set_gradients(named, 0)
    optimizer.step()
    shapes = {name: {k: tuple(v.shape) for k, v in optimizer.state[p].items()} for name, p in named}
    assert shapes["block.0.weight"] == {"step": (), "row": (96,), "column": (64,)}
    assert shapes["conv.weight"] == {"step": (), "row": (16,), "column": (72,)}
    assert shapes["norm.bias"] == {"step": (), "variance": (24,)}


@pytest.mark.parametrize("count", [1, 2])
def test_channels_last_weights_train_as_contiguous_ones(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(count, 6, 4, 3, 3, generator=generator)
    gradient = torch.randn(count, 6, 4, 3, 3, generator=generator)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        params = [nn.Parameter(p.clone(memory_format=layout)) for p in start]
        optimizer = build_optimizer(
            "adafactor",
            [(str(i), p) for i, p in enumerate(params)],
            lr=1e-2,
            betas=(0.9, 0.999),
            eps=1e-30,
            weight_decay=0.01,
        )
        for _ in range(3):
            for p, g in zip(params, gradient, strict=True):
                p.grad = g.clone(memory_format=layout)
            optimizer.step()
        found.append(torch.stack([p.detach() for p in params]))
    # rows are summed in the order of memory: some units in the last place
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
