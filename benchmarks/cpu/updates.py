"""What follows the backward, on the CPU: clipping, optimizers and the average of the weights.

Every contender has weights of its own, the same as ours at the start, and the same gradients. The
check compares the weights after two updates.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from benchmarks.cpu.contest import Contender, Contest, installed, timed
from benchmarks.cpu.weights import (
    Named,
    adapter_weights,
    network_weights,
    num_weights,
    set_gradients,
)
from fasttune.optim import build_optimizer
from fasttune.optim.clip import clip_by_global_norm_
from fasttune.optim.ema import Ema

LR = 1e-4
BETAS = (0.9, 0.999)
LION_BETAS = (0.9, 0.99)
EPS = 1e-8
WEIGHT_DECAY = 0.01
DECAY = 0.999
LATE_STEP = 10**6
"""Where the average's decay has risen to its final value."""
MAX_NORM = 1.0

Build = Callable[[list[nn.Parameter]], Optimizer]


def ema(folder: Path, *, quick: bool) -> Iterator[Contest]:
    """One update of the average of a LoRA's weights."""
    named = adapter_weights(quick)
    start = adapter_weights(quick)  # the averages begin elsewhere than the weights
    with torch.no_grad():
        torch._foreach_mul_([p for _, p in start], 0.5)
    params = [p for _, p in named]
    ours = Ema(start, decay=DECAY)
    ours.params = params
    theirs = [p.detach().clone() for _, p in start]
    update = get_ema_multi_avg_fn(DECAY)
    contenders = {
        "torch get_ema_multi_avg_fn": Contender(
            measure=timed(lambda: update(theirs, params, 0), quick=quick)
        )
    }
    for _ in range(2):
        ours.update(LATE_STEP)
    again = [p.detach().clone() for _, p in start]
    for _ in range(2):
        update(again, params, 0)
    torch.testing.assert_close(ours.shadow, again)
    if installed("diffusers"):
        model = import_module("diffusers.training_utils").EMAModel(
            [p for _, p in start], decay=DECAY, foreach=True
        )
        model.optimization_step = LATE_STEP
        for _ in range(2):
            model.step(params)
        torch.testing.assert_close(ours.shadow, [t.detach() for t in model.shadow_params])
        contenders["diffusers EMAModel(foreach=True)"] = Contender(
            measure=timed(lambda: model.step(params), quick=quick), package="diffusers"
        )
    yield Contest(
        what="EMA, LoRA",
        ours=timed(lambda: ours.update(LATE_STEP), quick=quick),
        theirs=contenders,
        facts=_facts(named),
    )


def clip(folder: Path, *, quick: bool) -> Iterator[Contest]:
    """Norm of a LoRA's gradients, and their scaling. After the first call they are at the limit, and
    are multiplied by 1 for all contenders alike."""
    runs = [adapter_weights(quick) for _ in range(2)]
    mine, other = ([p for _, p in named] for named in runs)
    for named in runs:
        set_gradients(named)
        for _, p in named:
            assert p.grad is not None
            p.grad.mul_(100)  # beyond the limit
    norms = clip_by_global_norm_(mine, MAX_NORM), nn.utils.clip_grad_norm_(other, MAX_NORM)
    torch.testing.assert_close(*norms)
    torch.testing.assert_close([p.grad for p in mine], [p.grad for p in other])
    yield Contest(
        what="gradient clipping, LoRA",
        ours=timed(lambda: clip_by_global_norm_(mine, MAX_NORM), quick=quick),
        theirs={
            "torch clip_grad_norm_": Contender(
                measure=timed(lambda: nn.utils.clip_grad_norm_(other, MAX_NORM), quick=quick)
            )
        },
        facts=_facts(runs[0]),
    )


def adamw(folder: Path, *, quick: bool) -> Iterator[Contest]:
    """float32 weights: ours is torch's fused kernel, so what is measured beside it is our choice of it
    and what our way to build it costs."""

    def torch_adamw(**way: Any) -> Build:
        return lambda params: torch.optim.AdamW(params, **_adamw_numbers(), **way)

    yield _optimizers(
        "AdamW, LoRA in fp32",
        "adamw",
        lambda: adapter_weights(quick),
        {
            "torch AdamW(foreach=True)": _Other(torch_adamw(foreach=True)),
            "torch AdamW(fused=True)": _Other(torch_adamw(fused=True)),
        },
        quick=quick,
    )


def adamw_bf16(folder: Path, *, quick: bool) -> Iterator[Contest]:
    """bf16 weights with moments in float32."""
    yield _optimizers(
        "AdamW, bf16 weights",
        "adamw",
        lambda: network_weights(quick, torch.bfloat16),
        {
            "torch AdamW(fused=True) on a float32 copy": _Other(
                _WithFloat32Copy,
                differs="keeps the weights in float32 as well, 4 bytes a weight more",
                # its copy goes on from weights that ours rounds after each update
                tolerance=2**-8,
            ),
            "torch AdamW(foreach=True)": _Other(
                lambda params: torch.optim.AdamW(params, **_adamw_numbers(), foreach=True),
                differs="keeps the moments in bf16, where the second one stops moving",
                tolerance=2**-8,
            ),
        },
        quick=quick,
    )


def adafactor(folder: Path, *, quick: bool) -> Iterator[Contest]:
    others = {
        "torch Adafactor(foreach=True)": _Other(
            lambda params: torch.optim.Adafactor(
                params, lr=LR, weight_decay=WEIGHT_DECAY, foreach=True
            ),
            differs="scales the update by the weights' RMS as well",
            tolerance=None,
        )
    }
    if installed("transformers"):
        build = import_module("transformers.optimization").Adafactor
        others["transformers Adafactor"] = _Other(
            lambda params: build(
                params,
                lr=LR,
                weight_decay=WEIGHT_DECAY,
                scale_parameter=False,
                relative_step=False,
            ),
            package="transformers",
        )
    yield _optimizers(
        "Adafactor, fp32 weights", "adafactor", lambda: network_weights(quick), others, quick=quick
    )


def lion(folder: Path, *, quick: bool) -> Iterator[Contest]:
    others = {"the paper's loop over tensors": _Other(_PublishedLion)}
    if installed("bitsandbytes"):
        build = import_module("bitsandbytes").optim.Lion32bit
        others["bitsandbytes Lion32bit"] = _Other(
            lambda params: build(params, lr=LR, betas=LION_BETAS, weight_decay=WEIGHT_DECAY),
            package="bitsandbytes",
        )
    yield _optimizers(
        "Lion, fp32 weights", "lion", lambda: network_weights(quick), others, quick=quick
    )


class _Other:
    """Another optimizer, and how close its weights must come to ours in two updates (see
    `_check_updates`); None where they are meant to differ."""

    def __init__(
        self,
        build: Build,
        *,
        package: str = "torch",
        differs: str = "",
        tolerance: float | None = 1e-3,
    ) -> None:
        self.build, self.package, self.differs, self.tolerance = build, package, differs, tolerance


def _optimizers(
    what: str, name: str, draw: Callable[[], Named], others: dict[str, _Other], *, quick: bool
) -> Contest:
    named = draw()
    start = [p.detach().clone() for _, p in named]
    ours = build_optimizer(
        name,
        named,
        lr=LR,
        betas=LION_BETAS if name == "lion" else BETAS,
        eps=1e-30 if name == "adafactor" else EPS,
        weight_decay=WEIGHT_DECAY,
    )
    after_two = _two_steps(ours, named)
    contenders = {}
    for other_name, other in others.items():
        their_named = draw()
        optimizer = other.build([p for _, p in their_named])
        found = _two_steps(optimizer, their_named)
        if other.tolerance is not None:
            _check_updates(start, after_two, found, other.tolerance, other_name)
        contenders[other_name] = Contender(
            measure=timed(optimizer.step, quick=quick),
            package=other.package,
            differs=other.differs,
        )
    return Contest(
        what=what, ours=timed(ours.step, quick=quick), theirs=contenders, facts=_facts(named)
    )


def _two_steps(optimizer: Optimizer, named: Named) -> list[Tensor]:
    set_gradients(named)
    optimizer.step()
    optimizer.step()
    return [p.detach().clone() for _, p in named]


def _check_updates(
    start: list[Tensor], ours: list[Tensor], theirs: list[Tensor], tolerance: float, name: str
) -> None:
    """RuntimeError if the weights differ by more than `tolerance`, on average, of an update; for
    bf16 weights, whose rounding is as large as an update, of a weight: at 2^-8 by a third of
    the two updates."""
    difference = sum(
        float((a.float() - b.float()).abs().sum()) for a, b in zip(ours, theirs, strict=True)
    )
    if start[0].dtype == torch.float32:
        scale = sum(float((a - s).abs().sum()) for a, s in zip(ours, start, strict=True))
    else:  # an update is smaller than the weights' rounding
        scale = sum(float(s.float().abs().sum()) for s in start)
    if difference > tolerance * scale:
        raise RuntimeError(
            f"{name} is another computation: {difference / scale:.2g} > {tolerance:.2g}"
        )


class _WithFloat32Copy(Optimizer):
    """bf16 weights trained through a float32 copy, as mixed-precision trainers do."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})
        self.params: list[Tensor] = list(params)
        self.copies: list[Tensor] = [nn.Parameter(p.detach().float()) for p in params]
        self.inner = torch.optim.AdamW(self.copies, **_adamw_numbers(), fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for copy, p in zip(self.copies, self.params, strict=True):
            assert p.grad is not None
            copy.grad = p.grad.float()
        self.inner.step()
        torch._foreach_copy_(self.params, self.copies)


class _PublishedLion(Optimizer):
    """Program 1 of https://arxiv.org/abs/2302.06675, tensor by tensor, in place."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})
        self.momenta = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        beta1, beta2 = LION_BETAS
        for p, m in zip(self.param_groups[0]["params"], self.momenta, strict=True):
            p.mul_(1 - LR * WEIGHT_DECAY)
            p.add_((m * beta1).add_(p.grad, alpha=1 - beta1).sign_(), alpha=-LR)
            m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def _adamw_numbers() -> dict[str, Any]:
    return {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}


def _facts(named: Named) -> dict[str, int]:
    return {"tensors": len(named), "weights": num_weights(named)}
