"""What follows the backward: clipping, AdamW and the average, as one operation on many tensors."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.gpu.arena_updates import (
    BETAS,
    DECAY,
    EMA,
    EPS,
    LR,
    MAX_NORM,
    STORAGES,
    Update,
    arena_update,
)
from benchmarks.gpu.libraries import CLOSE
from benchmarks.gpu.names import EAGER, OURS
from benchmarks.harness import ROOT
from fasttune.adapters.lora import apply_lora
from fasttune.config import Config
from fasttune.config_file import config_from_tables
from fasttune.device import Placement
from fasttune.models import MODELS
from fasttune.models.weights import build_on_meta
from fasttune.trained import Trained

NAME = "clip, adamw, ema"
TARGET_MS = 10.0
"""For the SDXL U-Net on an H200."""
TARGET_SET = "sdxl"
ALONE = 10**9
"""Weights from which on contenders are measured one after the other: the states of four of them on SDXL,
with weights and gradients, would take 100 GB and more."""

Shapes = list[tuple[int, ...]]
ThreeSteps = Callable[[torch.device, Shapes], dict[str, tuple[Tensor, Tensor, Tensor]]]
Make = Callable[[list[nn.Parameter]], Update]


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
        weights, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **options
    )
    return _with_torch_around(optimizer, weights)


def ours(weights: list[nn.Parameter]) -> Update:
    """The trainer's own update, at the average's final decay."""
    device = weights[0].device
    placement = Placement(
        device=device, base_dtype=weights[0].dtype, compute_dtype=torch.bfloat16, reason="given"
    )
    trained = Trained(_config(device), nn.ParameterList(weights), placement, resuming=True)
    groups, _ = trained.state()
    average = list(groups["ema"].values())

    def update() -> list[Tensor]:
        grads = [w.grad for w in weights]
        trained.update(10**6)  # far beyond the steps in which the decay grows
        for w, grad in zip(weights, grads, strict=True):
            w.grad = grad  # which it takes away
        return average

    return update


def _config(device: torch.device) -> Config:
    tables: dict[str, Any] = {
        "run": {"device": device.type},
        "model": {"family": "sdxl", "path": "none"},
        "data": [{"path": "none"}],
        "train": {"max_grad_norm": MAX_NORM},
        "optimizer": {
            "name": "adamw", "lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY
        },
        "ema": {"enabled": True, "decay": EMA},
    }  # fmt: skip
    return config_from_tables(tables, check_files=False)


def _with_torch_around(optimizer: Optimizer, weights: list[nn.Parameter]) -> Update:
    shadow = [w.detach().clone() for w in weights]

    def update() -> list[Tensor]:
        nn.utils.clip_grad_norm_(weights, MAX_NORM)
        optimizer.step()
        torch._foreach_lerp_(shadow, [w.detach() for w in weights], 1 - EMA)
        return shadow

    return update


def _bitsandbytes(weights: list[nn.Parameter]) -> Update:
    import bitsandbytes

    optimizer = bitsandbytes.optim.AdamW8bit(
        weights, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY
    )
    return _with_torch_around(optimizer, weights)


def _apex(weights: list[nn.Parameter]) -> Update:
    from apex.optimizers import FusedAdam

    optimizer = FusedAdam(weights, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    return _with_torch_around(optimizer, weights)


def _arena(storage: str, backend: str | None) -> Make:
    """On the CPU every backend stands for what runs there."""

    def make(weights: list[nn.Parameter]) -> Update:
        on_gpu = weights[0].device.type == "cuda"
        return arena_update(weights, STORAGES[storage], backend if on_gpu else None)

    return make


TRITON, CUDA = f"{OURS} triton", f"{OURS} cuda c++"
CONTENDERS: Mapping[str, Mapping[str, Make]] = {
    "fp32": {
        EAGER: plain,
        OURS: ours,
        TRITON: _arena("fp32", "triton"),
        CUDA: _arena("fp32", "cuda"),
        "bitsandbytes 8-bit": _bitsandbytes,
        "apex": _apex,
    },
    "bf16 8-bit": {
        EAGER: plain,
        TRITON: _arena("bf16 8-bit", "triton"),
        CUDA: _arena("bf16 8-bit", "cuda"),
        "bitsandbytes 8-bit": _bitsandbytes,
    },
}
"""By the storage of weights and state. "ours" is what the trainer does; the arena step stands beside it
in Triton and in CUDA C++, so that the faster one can be made the default. In bf16 the others round to
the nearest, and eager keeps its state in bf16. torch.compile is not among them: it would make one graph of
thousands of tensors."""


def why_not(storage: str, contender: str, device: torch.device) -> str | None:
    """Why this one does not work here; None if it does: a small step must be right."""
    dtype = STORAGES[storage].weights
    weights, expected = (weights_like([(128, 64)], device, dtype) for _ in range(2))
    try:
        plain(expected)()
        CONTENDERS[storage][contender](weights)()
        moved = (expected[0].float() - weights[0].float()).abs()
        # A first step of Adam moves each weight by lr; in bf16 it may be rounded to either side.
        unit = torch.finfo(dtype).eps * expected[0].float().abs()
        off = (moved - (unit if dtype != torch.float32 else 0)).max().item()
        return None if off <= CLOSE * LR else f"another update: off by {off / LR:.2g} lr"
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


def three_steps(
    device: torch.device, shapes: Shapes, make: Make, like: Make, dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Weights and averages after three steps: (of `make`, of `like` in the same dtype, torch's in
    float64)."""
    exact_device = torch.device("cpu") if device.type == "mps" else device
    starts = weights_like(shapes, device, dtype)
    found = []
    for builder, where, precision in (
        (make, device, dtype),
        (like, device, dtype),
        (plain, exact_device, torch.float64),
    ):
        weights = [nn.Parameter(w.detach().to(where, precision, copy=True)) for w in starts]
        update = builder(weights)
        for step in range(3):
            for w, start in zip(weights, starts, strict=True):
                assert start.grad is not None
                w.grad = (start.grad * (step + 1)).to(where, precision, copy=True)
            shadow = update()
        assert isinstance(shadow, list)
        found.append(
            [torch.cat([t.detach().flatten() for t in part]) for part in (weights, shadow)]
        )
    return {
        "weights": (found[0][0], found[1][0], found[2][0]),
        "average": (found[0][1], found[1][1], found[2][1]),
    }


def _checked(storage: str, make: Make, like: Make) -> ThreeSteps:
    dtype = STORAGES[storage].weights
    return partial(three_steps, make=make, like=like, dtype=dtype)


def _in_torch(weights: list[nn.Parameter]) -> Update:
    """PyTorch's form of the same step, which draws the same bits: what 8 bits cost is in it."""
    return arena_update(weights, STORAGES["bf16 8-bit"], "torch")


IN_CUDA = {
    "arena fp32 in CUDA C++": _checked("fp32", _arena("fp32", "cuda"), plain),
    "arena bf16 8-bit in CUDA C++": _checked("bf16 8-bit", _arena("bf16 8-bit", "cuda"), _in_torch),
}
CHECKED: Mapping[str, ThreeSteps] = {
    "trainer": _checked("fp32", lambda weights: ours(weights), plain),
    "arena fp32": _checked("fp32", _arena("fp32", None), plain),
    "arena bf16 8-bit": _checked("bf16 8-bit", _arena("bf16 8-bit", None), _in_torch),
    **IN_CUDA,
}
"""What is compared with float64: the trainer's step, the arena's as it is dispatched, and in CUDA C++."""
