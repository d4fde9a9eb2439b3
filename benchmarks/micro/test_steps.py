"""Whole steps: clipping, optimizers, the average, and a step of the quickstart."""

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.cpu.quickstart import quickstart_rehearsal
from benchmarks.cpu.weights import Named, adapter_weights, network_weights, set_gradients
from fasttune.optim import build_optimizer
from fasttune.optim.clip import clip_by_global_norm_
from fasttune.optim.ema import Ema


def on(device: torch.device, named: Named) -> Named:
    """The same weights there, with gradients."""
    moved = [(name, nn.Parameter(p.detach().to(device))) for name, p in named]
    set_gradients(moved)
    return moved


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_optimizer(benchmark: Any, device: torch.device, name: str, dtype: str) -> None:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    named = on(device, network_weights(device.type == "cpu", kind))
    optimizer = build_optimizer(
        name, named, lr=1e-4, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01
    )
    optimizer.step()  # makes its state
    benchmark(optimizer.step)


def test_clip(benchmark: Any, device: torch.device) -> None:
    params = [p for _, p in on(device, adapter_weights(device.type == "cpu"))]
    norm = benchmark(clip_by_global_norm_, params, 1.0)
    assert norm > 0


def test_ema(benchmark: Any, device: torch.device) -> None:
    ema = Ema(on(device, adapter_weights(device.type == "cpu")), decay=0.999)
    benchmark(ema.update, 10**6)


def test_quickstart_step(benchmark: Any, device: torch.device) -> None:
    rehearsal = quickstart_rehearsal(2 if device.type == "cpu" else None, device=device.type)
    loss = benchmark(rehearsal.take_step)
    assert bool(loss.isfinite())
