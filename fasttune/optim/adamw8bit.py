"""AdamW with its two moments in 8 bits, block-wise (https://arxiv.org/abs/2110.02861).

2 bytes of state a weight instead of 8. By `FusedAdamW` where it runs. Elsewhere from bitsandbytes if
that works, else from torchao, whose updates are compiled once for each shape of weight; both keep
float32 for tensors under 4096 elements. Which of them works is found out by a step on a small weight,
because both import without error on machines where their kernels are missing.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fasttune.errors import HardwareError
from fasttune.optim import fused_adamw
from fasttune.optim.adamw import build_adamw
from fasttune.optim.chunks import device_type_of, named_parameters

log = logging.getLogger(__name__)


OpenClass = Callable[[], Callable[..., Optimizer]]
"""Imports a library and returns its AdamW8bit."""


def _bitsandbytes() -> Callable[..., Optimizer]:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit


def _torchao() -> Callable[..., Optimizer]:
    import torchao.optim

    return torchao.optim.AdamW8bit


LIBRARIES: dict[str, OpenClass] = {
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
}
"""In the order they are tried: bitsandbytes has kernels, torchao has to compile first."""


def why_not(open_class: OpenClass, device: torch.device) -> str | None:
    """Why this library's AdamW8bit does not work on `device`; None if it does."""
    weight = nn.Parameter(torch.ones(64, 64, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        optimizer = open_class()([weight], lr=0.5, weight_decay=0.0)
        optimizer.step()
    except ImportError as error:
        return f"not installed ({error})"
    except Exception as error:  # whatever a library raises when its kernels are missing
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    # The first step of Adam is lr times the sign of the gradient: 1 becomes 0.5.
    if not torch.allclose(weight.detach(), torch.tensor(0.5, device=device), atol=0.02):
        return "its first step gives wrong weights on this machine"
    return None


def build_adamw8bit(
    params: Any,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    state_dtype: str = "auto",
    seed: int = 0,
) -> Optimizer:
    """FusedAdamW, or the first of LIBRARIES that works on the device of the parameters.

    Raises HardwareError with the reason of each if none does. `state_dtype` is "auto" or "int8".
    """
    flat = [p for _, p in named_parameters(params)]
    device = flat[0].device
    own = fused_adamw.why_not(flat, eps=eps, device_type=device_type_of(flat[0]))
    if own is None:
        return build_adamw(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            state_dtype="int8",
            seed=seed,
        )
    reasons = [f"fasttune: {own}"]
    for name, open_class in LIBRARIES.items():
        reason = why_not(open_class, device)
        if reason is None:
            log.info("adamw8bit: %s", "; ".join([*reasons, f"using {name}"]))
            return open_class()(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        reasons.append(f"{name}: {reason}")
    raise HardwareError(
        f'optimizer.name = "adamw8bit" does not work on {device.type}. {"; ".join(reasons)}. Install'
        ' one with pip install "fasttune[bitsandbytes]" or "fasttune[torchao]", or choose'
        ' "adafactor", whose state is smaller still, or "adamw"'
    )
