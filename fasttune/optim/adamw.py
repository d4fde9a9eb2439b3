"""AdamW (https://arxiv.org/abs/1711.05101): `FusedAdamW` where it runs, else what follows.

For float32 weights that is torch.optim.AdamW(fused=True), which CUDA, ROCm, MPS and the CPU have. For
16-bit weights torch would keep the moments in 16 bits as well, where a second moment with beta2 =
0.999 stops moving: its updates are smaller than half a unit in the last place. `NarrowAdamW` keeps
them in float32.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fasttune.errors import HardwareError
from fasttune.optim import fused_adamw
from fasttune.optim.chunks import (
    chunks,
    device_type_of,
    float32,
    gradients,
    named_parameters,
    write_back_,
)
from fasttune.optim.fused_adamw import STATE_DTYPES, FusedAdamW


class NarrowAdamW(Optimizer):
    """AdamW for bf16 and fp16 weights: float32 state and arithmetic, rounded once at the end.

    Multi-tensor, without host synchronisation; also takes float32 weights.
    """

    _step_supports_amp_scaling = True  # reads found_inf, see loss_scale.py

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        # One count for all, on the device, because a skipped update must not count.
        device = self.param_groups[0]["params"][0].device
        self._num_updates = torch.zeros((), dtype=torch.float32, device=device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        keep = 1.0 if found_inf is None else 1 - found_inf
        self._num_updates += keep
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            correction1, correction2 = self._correction(beta1), self._correction(beta2)
            for params in chunks(group["params"]):
                grads = gradients(params, found_inf)
                weights = float32(p.detach() for p in params)
                m = [self._moment(p, "exp_avg") for p in params]
                v = [self._moment(p, "exp_avg_sq") for p in params]
                torch._foreach_mul_(m, 1 - keep * (1 - beta1))
                torch._foreach_add_(m, grads, alpha=1 - beta1)
                torch._foreach_mul_(v, 1 - keep * (1 - beta2))
                torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)
                denominator = torch._foreach_sqrt(v)
                torch._foreach_div_(denominator, correction2.sqrt())
                torch._foreach_add_(denominator, group["eps"])
                update = torch._foreach_div(m, denominator)
                torch._foreach_mul_(update, keep * lr / correction1)
                torch._foreach_mul_(weights, 1 - keep * (lr * group["weight_decay"]))
                torch._foreach_sub_(weights, update)
                write_back_(params, weights)

    def _correction(self, beta: float) -> Tensor:
        """1 - beta^t. By expm1: in float32, 1 - 0.999 is off by 1e-5."""
        if beta == 0:
            return torch.ones_like(self._num_updates)
        return -torch.expm1(self._num_updates.clamp(min=1) * math.log(beta))

    def _moment(self, p: nn.Parameter, name: str) -> Tensor:
        state = self.state[p]
        if name not in state:
            state["step"] = self._num_updates
            state[name] = torch.zeros_like(p, dtype=torch.float32)
        return state[name]


def build_adamw(
    params: Any,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    state_dtype: str = "auto",
    seed: int = 0,
) -> Optimizer:
    """FusedAdamW where it runs; elsewhere torch's for float32 weights and NarrowAdamW if one is narrower.

    "auto" is float32 state. HardwareError for another where FusedAdamW does not run. On CUDA lr is a
    device tensor, so that a captured graph would see it change; `set_lr` writes it.
    """
    flat = [p for _, p in named_parameters(params)]
    device = flat[0].device
    reason = fused_adamw.why_not(flat, eps=eps, device_type=device_type_of(flat[0]))
    if reason is None:
        return FusedAdamW(
            params,
            lr=torch.tensor(lr, device=device) if device.type == "cuda" else lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            state_dtype=STATE_DTYPES["fp32" if state_dtype == "auto" else state_dtype],
            seed=seed,
        )
    if state_dtype not in ("auto", "fp32"):
        raise HardwareError(
            f'optimizer.state_dtype = "{state_dtype}" does not work on {device.type}: {reason}. Set it to'
            ' "auto", or choose optimizer.name = "adafactor", whose state is smaller than any'
        )
    return torch_adamw(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def torch_adamw(
    params: Any, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Optimizer:
    """Fused AdamW of torch for float32 weights, NarrowAdamW if one is narrower."""
    flat = [p for _, p in named_parameters(params)]
    if any(p.dtype != torch.float32 for p in flat):
        return NarrowAdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    device = flat[0].device
    rate = torch.tensor(lr, device=device) if device.type == "cuda" else lr
    return torch.optim.AdamW(
        params, lr=rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
    )
