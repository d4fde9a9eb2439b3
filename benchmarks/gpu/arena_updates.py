"""The arena step of fasttune_kernels as what follows the backward: norm, clip, AdamW and average."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fasttune_kernels import dispatch, optimizer_step
from fasttune_kernels.arena import Arena
from fasttune_kernels.gradient_norm import gradient_norm

Update = Callable[[], object]
LR, BETAS, EPS, DECAY, MAX_NORM, EMA = 1e-4, (0.9, 0.999), 1e-8, 0.01, 1.0, 0.999


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """Dtypes of what a step works on."""

    weights: torch.dtype
    state: torch.dtype
    """uint8 stands for 8 bits with scales."""
    average: torch.dtype
    rounding: str
    bytes_a_weight: int
    """Weight, gradient, moments and average are read, all but the gradient written. The gradient that
    the norm reads first is not in it."""


STORAGES = {
    "fp32": Storage(
        weights=torch.float32,
        state=torch.float32,
        average=torch.float32,
        rounding="nearest",
        bytes_a_weight=36,
    ),
    "bf16 8-bit": Storage(
        weights=torch.bfloat16,
        state=torch.uint8,
        average=torch.bfloat16,
        rounding="stochastic",
        bytes_a_weight=14,
    ),
}


def arena_update(weights: list[nn.Parameter], storage: Storage, backend: str | None) -> Update:
    """The step in "triton", in "cuda" (C++) or in "torch"; None leaves it to the dispatcher."""
    device, layout = weights[0].device, Arena.of(weights)
    narrow = storage.state == torch.uint8
    m, v = (layout.zeros(storage.state, device) for _ in range(2))
    scales = [layout.absmax(device) if narrow else None for _ in range(2)]
    average = layout.zeros(storage.average, device)
    views = layout.views(average, weights)
    for view, w in zip(views, weights, strict=True):
        view.copy_(w.detach())
    compensation = layout.zeros(torch.bfloat16, device) if storage.rounding == "kahan" else None
    hyper = torch.tensor([[1.0, DECAY]], device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    steps, betas = torch.zeros((), device=device), torch.tensor(BETAS, device=device)
    scalars = torch.tensor([LR, 1.0, 1.0, 0.0, 0.0, 1 - EMA], device=device)
    groups = [0] * len(weights)
    values = [w.detach() for w in weights]

    @torch.no_grad()
    def update() -> list[Tensor]:
        grads = [w.grad for w in weights if w.grad is not None]
        with _forced(backend):
            norm = gradient_norm(grads)
            steps.add_(1)
            seed.add_(1)
            scalars[1] = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
            scalars[3:5] = 1 - betas**steps
            optimizer_step.optimizer_step_(
                *(values, grads, m, v, *scales, average, compensation, groups, hyper, scalars),
                *(*BETAS, EPS, storage.rounding, seed),
            )
        return views

    return update


@contextmanager
def _forced(backend: str | None) -> Iterator[None]:
    """In CUDA C++ is the step alone; the norm is Triton's with both."""
    if backend is None:
        yield
        return
    with (
        dispatch.forced("torch" if backend == "torch" else "triton"),
        patch.object(optimizer_step, "is_default", lambda device: backend == "cuda"),
    ):
        yield
