"""What follows the backward: clipping, AdamW and the average, as one operation on many tensors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.gpu.libraries import CLOSE
from benchmarks.harness import ROOT
from fasttune.adapters.lora import apply_lora
from fasttune.models import MODELS
from fasttune.models.weights import build_on_meta
from fasttune.optim import build_optimizer
from fasttune.optim.clip import clip_by_global_norm_
from fasttune.optim.ema import Ema

NAME = "clip, adamw, ema"
BYTES_A_WEIGHT = 36
"""float32 weight, gradient, two moments and average are read, all but the gradient written."""
_LR, _BETAS, _EPS, _DECAY, _MAX_NORM, _EMA = 1e-4, (0.9, 0.999), 1e-8, 0.01, 1.0, 0.999

ALONE = 10**9
"""Weights from which on contenders are measured one after the other: the states of four of them on SDXL,
with weights and gradients, would take 100 GB and more."""

Shapes = list[tuple[int, ...]]
Update = Callable[[], object]


def parameter_sets(*, small: bool) -> dict[str, Callable[[], Shapes]]:
    """Name -> shapes of what is trained: a LoRA's many small pairs, a part and all of a network."""
    if small:
        return {"tiny": lambda: [(64, 32), (32,), (16, 8, 3, 3)]}
    return {
        "sdxl lora": lambda: _sdxl(lora=True),
        "sdxl middle block": lambda: _sdxl(prefix="mid_block."),
        "sdxl": lambda: _sdxl(),
    }


def _sdxl(*, lora: bool = False, prefix: str = "") -> Shapes:
    network = build_on_meta(MODELS["sdxl"], ROOT / "benchmarks" / "models" / "sdxl")
    if lora:
        apply_lora(
            network, targets=MODELS["sdxl"].adapter_targets["attention"], rank=16, alpha=16.0
        )
    named = network.named_parameters()
    return [tuple(p.shape) for name, p in named if p.requires_grad and name.startswith(prefix)]


def weights_like(
    shapes: Shapes, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """Random weights with random gradients."""
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for shape in shapes:
        weight = nn.Parameter(torch.randn(shape, generator=generator, device=device).to(dtype))
        weight.grad = torch.randn(shape, generator=generator, device=device).to(dtype)
        found.append(weight)
    return found


def plain(weights: list[nn.Parameter], **options: Any) -> Update:
    """torch's own: clip_grad_norm_, AdamW (multi-tensor unless `options` say otherwise), lerp."""
    optimizer = torch.optim.AdamW(
        weights, lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY, **options
    )
    return _with_torch_around(optimizer, weights)


def ours(weights: list[nn.Parameter]) -> Update:
    """What `Trained.update` does, at the average's final decay."""
    optimizer = build_optimizer(
        "adamw",
        [(str(i), w) for i, w in enumerate(weights)],
        lr=_LR,
        betas=_BETAS,
        eps=_EPS,
        weight_decay=_DECAY,
    )
    ema = Ema([(str(i), w) for i, w in enumerate(weights)], decay=_EMA)

    def update() -> list[Tensor]:
        clip_by_global_norm_(weights, _MAX_NORM)
        optimizer.step()
        ema.update(10**6)  # far beyond the steps in which the decay grows
        return ema.shadow

    return update


def _with_torch_around(optimizer: Optimizer, weights: list[nn.Parameter]) -> Update:
    shadow = [w.detach().clone() for w in weights]

    def update() -> list[Tensor]:
        nn.utils.clip_grad_norm_(weights, _MAX_NORM)
        optimizer.step()
        torch._foreach_lerp_(shadow, [w.detach() for w in weights], 1 - _EMA)
        return shadow

    return update


def _bitsandbytes(weights: list[nn.Parameter]) -> Update:
    import bitsandbytes

    optimizer = bitsandbytes.optim.AdamW8bit(
        weights, lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY
    )
    return _with_torch_around(optimizer, weights)


def _apex(weights: list[nn.Parameter]) -> Update:
    from apex.optimizers import FusedAdam

    optimizer = FusedAdam(weights, lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY)
    return _with_torch_around(optimizer, weights)


CONTENDERS: Mapping[str, Callable[[list[nn.Parameter]], Update]] = {
    "eager": plain,
    "ours": ours,
    "bitsandbytes 8-bit": _bitsandbytes,
    "apex": _apex,
}
"""torch.compile is not among them: it would make one graph of thousands of tensors."""


def why_not(contender: str, device: torch.device) -> str | None:
    """Why this one does not work here; None if it does: a small step must be right."""
    weights, expected = (weights_like([(128, 64)], device) for _ in range(2))
    try:
        plain(expected)()
        CONTENDERS[contender](weights)()
        moved = (expected[0] - weights[0]).abs().max().item()
        # A first step of Adam moves each weight by lr.
        return None if moved <= CLOSE * _LR else f"another update: off by {moved / _LR:.2g} lr"
    except ImportError as error:
        return f"not installed ({error})"
    except Exception as error:  # whatever a library raises when its kernels are missing
        return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


ODD: Mapping[str, Shapes] = {
    "small": [(33, 7), (5,), (4, 3, 3, 3), (1, 130)],
    "one number": [(1,)],
    "past a chunk": [(65537,), (257, 1025), (1,), (3, 5, 3, 3)],
    "many": [(n % 7 + 1, n) for n in range(1, 150)],
}
"""Where mistakes show: multi-tensor kernels work in chunks of 65536 numbers, on 110 tensors or fewer a launch."""


def three_steps(device: torch.device, shapes: Shapes) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Weights and averages after three steps: (ours, torch's in float32, torch's in float64)."""
    exact_device = torch.device("cpu") if device.type == "mps" else device
    starts = weights_like(shapes, device)
    found = []
    for make, where, dtype in (
        (ours, device, torch.float32),
        (plain, device, torch.float32),
        (plain, exact_device, torch.float64),
    ):
        weights = [nn.Parameter(w.detach().to(where, dtype, copy=True)) for w in starts]
        update = make(weights)
        for step in range(3):
            for w, start in zip(weights, starts, strict=True):
                assert start.grad is not None
                w.grad = (start.grad * (step + 1)).to(where, dtype, copy=True)
            shadow = update()
        assert isinstance(shadow, list)
        found.append(
            [torch.cat([t.detach().flatten() for t in part]) for part in (weights, shadow)]
        )
    return {
        "weights": (found[0][0], found[1][0], found[2][0]),
        "average": (found[0][1], found[1][1], found[2][1]),
    }
