"""Lion (https://arxiv.org/abs/2302.06675, algorithm 2): the sign of an interpolated momentum.

    u = sign(beta1 m + (1 - beta1) g)
    w = w - lr (u + weight_decay w)
    m = beta2 m + (1 - beta2) g

One float32 momentum a weight, half of AdamW's state. Every weight moves by lr in each step, so lr
is usually 3 to 10 times smaller than AdamW's and weight_decay as much larger; the paper's betas are
(0.9, 0.99).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fasttune.optim.chunks import chunks, float32, gradients, write_back_


class Lion(Optimizer):
    """Multi-tensor Lion without host synchronisation; weights of any floating dtype."""

    _step_supports_amp_scaling = True  # reads found_inf, see loss_scale.py

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        keep = 1.0 if found_inf is None else 1 - found_inf
        for group in self.param_groups:
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for params in chunks(group["params"]):
                grads = gradients(params, found_inf)
                weights = float32(p.detach() for p in params)
                momenta = [self._momentum(p) for p in params]
                update = torch._foreach_mul(momenta, beta1)
                torch._foreach_add_(update, grads, alpha=1 - beta1)
                torch._foreach_sign_(update)
                torch._foreach_mul_(update, keep * lr)
                torch._foreach_mul_(weights, 1 - keep * (lr * decay))
                torch._foreach_sub_(weights, update)
                torch._foreach_mul_(momenta, 1 - keep * (1 - beta2))
                torch._foreach_add_(momenta, grads, alpha=1 - beta2)
                write_back_(params, weights)

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
        return state["momentum"]


def build_lion(
    params: Any,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    state_dtype: str = "auto",
    seed: int = 0,
) -> Lion:
    """Lion divides by nothing, so `eps` has no place; its state is float32, and nothing is rounded
    stochastically."""
    return Lion(params, lr=lr, betas=betas, weight_decay=weight_decay)
