"""The optimizer step for state on the CPU, from gradients to averaged weights, beside PyTorch's own steps.

Ours is the library of csrc/cpu: the norm of the gradients, then clipping, AdamW and the average in one pass. 50 M
weights, as everything that is on a processor's memory bus has to be larger than its caches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cpu.contest import Contender, Contest, timed
from benchmarks.cpu.updates import BETAS, DECAY, EPS, LATE_STEP, LR, MAX_NORM, WEIGHT_DECAY
from benchmarks.cpu.updates import _check_updates as check_updates
from fasttune.optim.adamw import NarrowAdamW
from fasttune.optim.clip import clip_by_global_norm_
from fasttune.optim.ema import Ema
from fasttune.seeds import generator_for
from fasttune_kernels import cpu_library
from fasttune_kernels.arena import Arena

Draw = Callable[[], tuple[list[Tensor], list[Tensor]]]
"""Weights and gradients, the same on every call."""

NUMBERS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
TENSORS = 20


def draw(quick: bool, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients with a norm of about 7, which are clipped."""
    size = 10_000 if quick else 2_500_000
    g = generator_for(0, "arena")
    scales = (0.02, 7 / (TENSORS * size) ** 0.5)
    weights, grads = (
        [(scale * torch.randn(size, generator=g)).to(dtype) for _ in range(TENSORS)]
        for scale in scales
    )
    return weights, grads


@dataclass(frozen=True, kw_only=True, slots=True)
class Ours:
    """Weights in place, state in arenas."""

    weights: list[Tensor]
    grads: list[Tensor]
    state: dict[str, Tensor | None]
    scalars: Tensor
    rounding: str

    @staticmethod
    def of(
        weights: list[Tensor], grads: list[Tensor], state: torch.dtype, ema: torch.dtype
    ) -> "Ours":
        arena = Arena.of(weights)
        eight = state == torch.uint8
        average = arena.zeros(ema, "cpu")
        for view, weight in zip(arena.views(average, weights), weights, strict=True):
            view.copy_(weight)
        return Ours(
            weights=weights,
            grads=grads,
            state={
                "m": arena.zeros(state, "cpu"),
                "v": arena.zeros(state, "cpu"),
                "m_absmax": arena.absmax("cpu") if eight else None,
                "v_absmax": arena.absmax("cpu") if eight else None,
                "ema": average,
                "compensation": None,
            },
            scalars=torch.tensor([LR, 1.0, 1.0, 0.0, 0.0, 1 - DECAY]),
            rounding="nearest" if weights[0].dtype == torch.float32 else "stochastic",
        )

    def step(self, t: int) -> None:
        norm = cpu_library.gradient_norm(self.grads)
        self.scalars[1] = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        self.scalars[3], self.scalars[4] = 1 - BETAS[0] ** t, 1 - BETAS[1] ** t
        cpu_library.optimizer_step_(
            self.weights,
            self.grads,
            **self.state,
            groups=[0] * len(self.weights),
            hyper=torch.tensor([[1.0, WEIGHT_DECAY]]),
            scalars=self.scalars,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            rounding=self.rounding,
            seed=torch.tensor([t]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Theirs:
    params: list[nn.Parameter]
    step: Callable[[], None]


def parameters(weights: list[Tensor], grads: list[Tensor]) -> list[nn.Parameter]:
    params = [nn.Parameter(w) for w in weights]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params


def torch_steps(weights: list[Tensor], grads: list[Tensor]) -> Theirs:
    params = parameters(weights, grads)
    optimizer = torch.optim.AdamW(params, **NUMBERS, fused=True)  # type: ignore[arg-type]
    average = [w.clone() for w in weights]

    @torch.no_grad()
    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - DECAY)

    return Theirs(params=params, step=step)


def copy_steps(weights: list[Tensor], grads: list[Tensor]) -> Theirs:
    """A float32 copy of bf16 weights is trained, as mixed-precision trainers do."""
    copies = torch_steps([w.float() for w in weights], [g.float() for g in grads])
    params = parameters(weights, grads)
    wide = [p.grad for p in copies.params if p.grad is not None]

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_(wide, grads)
        copies.step()
        torch._foreach_copy_(params, [p.detach() for p in copies.params])

    return Theirs(params=params, step=step)


def narrow_steps(weights: list[Tensor], grads: list[Tensor]) -> Theirs:
    params = parameters(weights, grads)
    optimizer = NarrowAdamW(params, **NUMBERS)  # type: ignore[arg-type]
    average = Ema([(str(i), p) for i, p in enumerate(params)], decay=DECAY)

    def step() -> None:
        clip_by_global_norm_(params, MAX_NORM)
        optimizer.step()
        average.update(LATE_STEP)

    return Theirs(params=params, step=step)


def arena(folder: Path, *, quick: bool) -> Iterator[Contest]:
    """RuntimeError if the library is not built."""
    if not cpu_library.available():
        raise RuntimeError(cpu_library.reason())
    fused = {"torch clip_grad_norm_, AdamW(fused=True), _foreach_lerp_": (torch_steps, "")}
    narrow = {
        "torch's the same on a float32 copy": (copy_steps, "keeps the weights in float32 as well"),
        "fasttune's NarrowAdamW, clip and Ema": (narrow_steps, "rounds weights to the nearest"),
    }
    small = {
        name: (build, f"{differs}; moments and average in float32")
        for name, (build, differs) in narrow.items()
    }
    f32, bf16 = torch.float32, torch.bfloat16
    yield _contest("fp32", f32, f32, f32, fused, quick=quick)
    yield _contest("bf16 weights", bf16, f32, f32, narrow, quick=quick)
    yield _contest(
        "bf16 weights and average, 8-bit moments", bf16, torch.uint8, bf16, small, quick=quick
    )


def _contest(
    what: str,
    weights: torch.dtype,
    state: torch.dtype,
    ema: torch.dtype,
    others: dict[str, tuple[Callable[[list[Tensor], list[Tensor]], Theirs], str]],
    *,
    quick: bool,
) -> Contest:
    ours = Ours.of(*draw(quick, weights), state, ema)
    start = [w.clone() for w in ours.weights]
    for t in (1, 2):
        ours.step(t)
    contenders = {}
    for name, (build, differs) in others.items():
        theirs = build(*draw(quick, weights))
        for _ in range(2):
            theirs.step()
        # Of bf16 weights an update is less than what rounding, and a copy that is not rounded, leaves.
        tolerance = 1e-3 if weights == torch.float32 else 2**-8
        check_updates(start, ours.weights, [p.detach() for p in theirs.params], tolerance, name)
        contenders[name] = Contender(measure=timed(theirs.step, quick=quick), differs=differs)
    return Contest(
        what=f"clip, AdamW and EMA, {what}",
        ours=timed(lambda: ours.step(3), quick=quick),
        theirs=contenders,
        facts={"tensors": TENSORS, "weights": sum(w.numel() for w in ours.weights)},
    )
