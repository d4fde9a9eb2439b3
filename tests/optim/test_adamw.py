"""AdamW: which class serves which weights where, and NarrowAdamW against torch and float64."""

import math
from collections.abc import Callable

import pytest
import torch

from fasttune.errors import HardwareError
from fasttune.optim import build_optimizer, fused_adamw, set_lr
from fasttune.optim.adamw import NarrowAdamW, torch_adamw
from fasttune.optim.chunks import chunked_as_on
from fasttune.optim.fused_adamw import FusedAdamW
from fasttune_kernels import cpu_library

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def test_which_class_serves(weights: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def built(kind: str, dtype: torch.dtype = torch.float32, **options: object) -> type:
        with chunked_as_on(kind):
            return type(build_optimizer("adamw", weights(dtype), **{**OPTIONS, **options}))

    monkeypatch.setattr(fused_adamw, "why_no_triton", lambda device: None)
    monkeypatch.setattr(cpu_library, "available", lambda: True)
    assert built("cuda") is built("cpu") is built("cpu", torch.bfloat16) is FusedAdamW
    assert built("mps") is torch.optim.AdamW and built("mps", torch.float16) is NarrowAdamW
    assert built("cpu", eps=0.0) is torch.optim.AdamW
    with pytest.raises(HardwareError, match='state_dtype = "bf16" does not work'):
        built("mps", state_dtype="bf16")
    monkeypatch.setattr(fused_adamw, "why_no_triton", lambda device: "no C compiler")
    monkeypatch.setattr(cpu_library, "available", lambda: False)
    assert built("cuda") is built("cpu") is torch.optim.AdamW
    assert built("cuda", torch.bfloat16) is built("cpu", torch.bfloat16) is NarrowAdamW


def test_torch_has_the_fused_kernel(weights: Callable) -> None:
    optimizer = torch_adamw(weights(), **OPTIONS)
    assert optimizer.param_groups[0]["fused"] is True
    assert optimizer.param_groups[0]["param_names"][0] == "block.0.weight"


def test_groups_keep_their_own_settings(weights: Callable) -> None:
    named = weights()
    groups = [
        {"params": iter(named[:2])},
        {"params": named[2:], "weight_decay": 0.0},
    ]
    optimizer = build_optimizer("adamw", groups, **OPTIONS)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["param_names"] == ["block.0.weight", "block.1.weight"]


def test_narrow_on_float32_equals_torch(weights: Callable, set_gradients: Callable) -> None:
    ours, theirs = weights(), weights()
    a = NarrowAdamW(ours, **OPTIONS)
    b = torch.optim.AdamW([p for _, p in theirs], foreach=False, **OPTIONS)
    for step in range(20):
        for optimizer in (a, b):
            set_lr(optimizer, 1e-2 * (1 - step / 20))
        set_gradients(ours, step)
        set_gradients(theirs, step)
        a.step()
        b.step()
    for (_, p), (_, q) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)


def test_bf16_weights_are_the_rounded_float64_result(
    weights: Callable, set_gradients: Callable
) -> None:
    """After each step: state as in float64, weights the nearest bf16 to the exact update."""
    named = weights(torch.bfloat16)
    optimizer = NarrowAdamW(named, **OPTIONS)
    m = [torch.zeros(p.shape, dtype=torch.float64) for _, p in named]
    v = [torch.zeros(p.shape, dtype=torch.float64) for _, p in named]
    for step in range(1, 6):
        set_gradients(named, step)
        before = [p.detach().double() for _, p in named]
        optimizer.step()
        for i, (_, p) in enumerate(named):
            g = p.grad.double()
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            denominator = (v[i] / (1 - 0.999**step)).sqrt() + 1e-8
            exact = before[i] * (1 - 1e-3) - 1e-2 * m[i] / (1 - 0.9**step) / denominator
            # Half a unit in the last place of bf16 is at most 2^-8 of the value.
            assert ((p.double() - exact).abs() <= exact.abs() * 2**-7.99 + 1e-9).all()
            torch.testing.assert_close(
                optimizer.state[p]["exp_avg_sq"].double(), v[i], rtol=1e-5, atol=0
            )


@pytest.mark.parametrize("make", [NarrowAdamW, FusedAdamW])
def test_bf16_second_moment_moves_in_float32(weights: Callable, make: type) -> None:
    named = weights(torch.bfloat16)[:1]
    optimizer = make(named, **OPTIONS)
    for _ in range(100):
        named[0][1].grad = torch.ones_like(named[0][1])
        optimizer.step()
    v = optimizer.state[named[0][1]]["exp_avg_sq"]
    assert v.dtype == torch.float32
    torch.testing.assert_close(v, torch.full_like(v, 1 - math.pow(0.999, 100)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_set_lr_zero_stops(weights: Callable, set_gradients: Callable, dtype: torch.dtype) -> None:
    named = weights(dtype)
    optimizer = build_optimizer("adamw", named, **OPTIONS)
    set_lr(optimizer, 0.0)
    set_gradients(named, 0)
    optimizer.step()
    for (_, p), (_, q) in zip(named, weights(dtype), strict=True):
        assert torch.equal(p, q)
