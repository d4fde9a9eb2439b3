"""On a GPU nothing of an update waits for the device."""

from collections.abc import Callable

import pytest
import torch

from fasttune.optim import build_optimizer, set_lr
from fasttune.optim.clip import clip_by_global_norm_
from fasttune.optim.ema import Ema
from fasttune.optim.loss_scale import LossScaler


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_update_does_not_synchronise(
    weights: Callable, set_gradients: Callable, name: str, dtype: torch.dtype
) -> None:
    named = [(key, torch.nn.Parameter(p.detach().cuda())) for key, p in weights(dtype)]
    params = [p for _, p in named]
    optimizer = build_optimizer(name, named, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    scaler, ema = LossScaler("cuda"), Ema(named, decay=0.99)

    def update(step: int) -> None:
        set_lr(optimizer, 1e-3 / step)
        norm = clip_by_global_norm_(params, 1.0, loss_scale=scaler.scale)
        scaler.step(optimizer, norm)
        optimizer.step()
        ema.update(step)

    for p in params:
        p.grad = torch.ones_like(p)
    update(1)  # state and kernels are made in the first step
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in params)
