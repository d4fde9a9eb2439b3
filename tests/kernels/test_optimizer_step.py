"""The optimizer step: torch's AdamW is the truth, and what rounding and 8 bits may add to it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttune_kernels.arena import Arena
from fasttune_kernels.dispatch import forced
from fasttune_kernels.gradient_norm import gradient_norm
from fasttune_kernels.optimizer_step import optimizer_step_, optimizer_step_ref

BETAS, EPS = (0.9, 0.999), 1e-8
SHAPES = ((3,), (1,), (257, 5), (2, 3, 3, 3), (1024,), (0,), (40, 33))
"""Scalars, a tile, less and more than one, and no element at all."""


def tensors(
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    seed: int = 0,
    scale: float = 1.0,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * scale).to(dtype) for s in shapes]


@dataclass
class Run:
    """Weights with the state of a run."""

    weights: list[Tensor]
    state: torch.dtype = torch.float32
    ema: torch.dtype | None = None
    rounding: str = "nearest"
    hyper: tuple[tuple[float, float], ...] = ((1.0, 0.1),)
    groups: list[int] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arena = self.arena = Arena.of(self.weights)
        self.groups = self.groups or [0] * len(self.weights)
        eight = self.state == torch.uint8
        self.tensors = {
            "m": arena.zeros(self.state, "cpu"),
            "v": arena.zeros(self.state, "cpu"),
            "m_absmax": arena.absmax("cpu") if eight else None,
            "v_absmax": arena.absmax("cpu") if eight else None,
            "ema": None if self.ema is None else arena.zeros(self.ema, "cpu"),
            "compensation": arena.zeros(torch.bfloat16, "cpu")
            if self.rounding == "kahan"
            else None,
        }
        if self.ema is not None:
            for view, w in zip(self.views("ema"), self.weights, strict=True):
                view.copy_(w)

    def views(self, name: str) -> list[Tensor]:
        return self.arena.views(self.tensors[name], self.weights)

    def step(
        self,
        grads: Sequence[Tensor],
        t: int,
        *,
        lr: float = 1e-2,
        factor: float = 1.0,
        keep: float = 1.0,
        ema_decay: float = 0.9,
        seed: int = 0,
    ) -> None:
        corrections = [1 - beta**t for beta in BETAS]
        optimizer_step_(
            self.weights,
            grads,
            **self.tensors,
            groups=self.groups,
            hyper=torch.tensor(self.hyper),
            scalars=torch.tensor([lr, factor, keep, *corrections, 1 - ema_decay]),
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            rounding=self.rounding,
            seed=torch.tensor([seed + t]),
        )


def test_reference_is_adamw() -> None:
    w = torch.randn(50, dtype=torch.float64)
    theirs = w.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=0.1)
    m = v = torch.zeros_like(w)
    for t in range(1, 6):
        g = torch.randn(50, dtype=torch.float64)
        theirs.grad = g * 0.5
        optimizer.step()
        w, m, v, _ = optimizer_step_ref(
            *(w, g, m, v, None),
            lr=1e-2, factor=0.5, weight_decay=0.1, beta1=0.9, beta2=0.999, eps=EPS, step=t,
        )  # fmt: skip
        torch.testing.assert_close(w, theirs.detach(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float32_follows_adamw_step_by_step(backend: str) -> None:
    run = Run(tensors(torch.float32), ema=torch.float32, hyper=((1.0, 0.0), (0.5, 0.1)))
    run.groups[1::2] = [1] * len(run.groups[1::2])
    truth = [w.double().requires_grad_() for w in run.weights]
    average = [w.detach().clone() for w in truth]
    groups = [
        {"params": truth[0::2], "lr": 1e-2, "weight_decay": 0.0},
        {"params": truth[1::2], "lr": 0.5e-2, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    for t in range(1, 5):
        grads = tensors(torch.float32, seed=t)
        for w, g in zip(truth, grads, strict=True):
            w.grad = g.double() * 0.25
        optimizer.step()
        torch._foreach_lerp_(average, [w.detach() for w in truth], 0.1)
        with forced(backend):
            run.step(grads, t, factor=0.25)
        # A float32 update of at most 2 lr each step, in weights of up to 4: half an ulp of 4 a step.
        for w, e, right, mean in zip(run.weights, run.views("ema"), truth, average, strict=True):
            torch.testing.assert_close(w.double(), right.detach(), rtol=0, atol=t * 2.4e-7 + 1e-7)
            torch.testing.assert_close(e.double(), mean, rtol=0, atol=t * 2.4e-7 + 1e-7)
    for w, m, v in zip(truth, run.views("m"), run.views("v"), strict=True):
        torch.testing.assert_close(m.double(), optimizer.state[w]["exp_avg"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            v.double(), optimizer.state[w]["exp_avg_sq"], rtol=1e-5, atol=1e-9
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_norm(backend: str) -> None:
    grads = tensors(torch.float32) + tensors(torch.bfloat16, seed=1)
    right = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    with forced(backend):
        assert gradient_norm(grads).item() == pytest.approx(right, rel=1e-6)
