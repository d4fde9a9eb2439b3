"""Gradient clipping without a host synchronisation."""

from collections.abc import Iterable

import torch
from torch import Tensor


def clip_factor(
    norm: Tensor, max_norm: float | None, loss_scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(norm of the unscaled gradients, what to multiply the gradients with; None for 1), 0-dim both, from
    the norm of gradients as they are. See `clip_by_global_norm_`."""
    factor = None
    if loss_scale is not None:
        factor = 1 / loss_scale
        norm = norm * factor
    if max_norm is not None:
        # 1e-6 as in torch.nn.utils.clip_grad_norm_, with which this agrees to the last bit or two.
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = clip if factor is None else clip * factor
    return norm, factor


@torch.no_grad()
def clip_by_global_norm_(
    params: Iterable[Tensor], max_norm: float | None, *, loss_scale: Tensor | None = None
) -> Tensor:
    """Scales the gradients of `params` in place so that their global 2-norm is at most `max_norm`.

    Returns the norm before clipping, a float32 scalar on the device that nothing waits for. With
    `loss_scale` (0-dim) the gradients are those of a scaled loss; they are divided by it in the
    same pass, and the norm is that of the unscaled ones. `max_norm` None measures and unscales.
    A non-finite gradient makes the norm non-finite. Without any gradient the norm is 0.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = torch._foreach_norm(grads, 2.0, dtype=torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(list(norms)))
    norm, factor = clip_factor(norm, max_norm, loss_scale)
    if factor is not None:
        torch._foreach_mul_(grads, factor)
    return norm
