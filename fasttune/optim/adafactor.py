"""Adafactor (https://arxiv.org/abs/1804.04235, algorithm 4) with a given learning rate.

The second moment of a matrix is kept as its row and column means, R + C numbers instead of R C:

    beta2 = 1 - t^-0.8
    r = beta2 r + (1 - beta2) mean over columns of (g^2 + eps^2)
    c = beta2 c + (1 - beta2) mean over rows of (g^2 + eps^2)
    u = g / sqrt(r c / mean(r))
    u = u / max(1, RMS(u) / d),  d = 1
    w = w - lr (u + weight_decay w)

Without first moment and without the paper's relative step sizes: lr and schedule mean what they
mean for AdamW. Weights of more than two dimensions are factored as (out, in * kernel) matrices,
vectors keep their full second moment.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fasttune.optim.chunks import chunks, float32, write_back_

_DECAY = 0.8
_CLIP = 1.0


class Adafactor(Optimizer):
    """Batched over parameters of equal shape, without host synchronisation; any floating dtype."""

    _step_supports_amp_scaling = True  # reads found_inf, see loss_scale.py

    def __init__(self, params: Any, *, lr: float, eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        # One count for all, on the device, because a skipped update must not count.
        device = self.param_groups[0]["params"][0].device
        self._num_updates = torch.zeros((), dtype=torch.float32, device=device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        keep = 1.0 if found_inf is None else 1 - found_inf
        self._num_updates += keep
        new_share = self._num_updates.clamp(min=1) ** -_DECAY * keep  # 1 - beta2
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            for params in chunks(group["params"], same_shape=True):
                update = self._update(params, new_share, keep * lr, group["eps"], found_inf)
                weights = float32(p.detach() for p in params)
                torch._foreach_mul_(weights, 1 - keep * (lr * decay))
                torch._foreach_sub_(weights, list(update.unbind(0)))
                write_back_(params, weights)

    def _update(
        self,
        params: list[nn.Parameter],
        new_share: Tensor,
        lr: Tensor | float,
        eps: float,
        found_inf: Tensor | None,
    ) -> Tensor:
        """lr u of N parameters of one shape, (N, *shape) float32; updates their state."""
        shape = params[0].shape
        g = torch.stack([p.grad.float() for p in params if p.grad is not None])
        g = g.contiguous()  # of one channels_last gradient the stack is channels_last, too
        if found_inf is not None:
            g = torch.where(found_inf > 0, 0.0, g)
        # From here `g` is a copy of our own: it becomes the update in place, in few passes.
        if len(shape) < 2:
            g = g.view(len(params), -1)  # (N, C)
            variance = self._moments(params, "variance", g.shape[1])
            g.mul_(_blend_(variance, g.square() + eps**2, new_share).rsqrt())
        else:
            g = g.view(len(params), shape[0], -1)  # (N, R, C)
            rows = self._moments(params, "row", g.shape[1])
            columns = self._moments(params, "column", g.shape[2])
            square = g.square()
            r = _blend_(rows, square.mean(2) + eps**2, new_share)
            c = _blend_(columns, square.mean(1) + eps**2, new_share)
            del square
            r = r / r.mean(1, keepdim=True)
            g.mul_(r.rsqrt()[:, :, None]).mul_(c.rsqrt()[:, None, :])
        u = g.view(len(params), -1)
        rms = torch.linalg.vector_norm(u, dim=1, keepdim=True) / u.shape[1] ** 0.5
        u.mul_(lr / (rms / _CLIP).clamp(min=1.0))
        if found_inf is not None:  # before the first good step the moments are 0 and u is NaN
            u = torch.where(found_inf > 0, 0.0, u)
        return u.view(len(params), *shape)

    def _moments(self, params: list[nn.Parameter], name: str, size: int) -> list[Tensor]:
        for p in params:
            if name not in self.state[p]:
                self.state[p]["step"] = self._num_updates
                self.state[p][name] = torch.zeros(size, dtype=torch.float32, device=p.device)
        return [self.state[p][name] for p in params]


def _blend_(moments: list[Tensor], new: Tensor, new_share: Tensor) -> Tensor:
    """moments[i] += new_share (new[i] - moments[i]); returns them stacked. moments N times (K,),
    new (N, K)."""
    blended = torch.stack(moments).lerp_(new, new_share)
    torch._foreach_copy_(moments, list(blended.unbind(0)))
    return blended


def build_adafactor(
    params: Any,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    state_dtype: str = "auto",
    seed: int = 0,
) -> Adafactor:
    """`eps` is the gradient below which a weight counts as at rest, as in AdamW; Adafactor has no
    first moment and a decay of its own, so `betas` has no place. Its state is float32, and nothing is
    rounded stochastically."""
    return Adafactor(params, lr=lr, eps=eps, weight_decay=weight_decay)
