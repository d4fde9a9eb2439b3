"""Dynamic loss scaling for float16 (https://arxiv.org/abs/1710.03740, section 3.2).

float16 gradients below 6e-8 vanish, so the loss is multiplied by a large power of two before the
backward and the gradients are divided by it after. When a gradient overflows, the update is skipped
and the scale halved; after `growth_interval` good steps it doubles.

torch.amp.GradScaler reads on the host in each step whether a gradient overflowed. Here that stays
a device tensor: the AdamWs, Adafactor and Lion take it as `found_inf` and leave
weights and state as they are when it is 1. Optimizers that do not know it (8-bit AdamW of libraries)
cost the one synchronisation.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fasttune.errors import CheckpointError

_LARGEST_SCALE = 2.0**24
_SMALLEST_SCALE = 2.0**-14


class LossScaler:
    """The scale and the count of good steps, both 0-dim tensors on `device`.

    In a step: `scaler.scaled(loss).backward()`, then
    `norm = clip_by_global_norm_(params, max_norm, loss_scale=scaler.scale)`, then
    `scaler.step(optimizer, norm)` in place of `optimizer.step()`.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        initial_scale: float = 2.0**16,
        growth_interval: int = 2000,
    ) -> None:
        self.scale = torch.tensor(initial_scale, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.growth_interval = growth_interval

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to call backward on; float32."""
        return loss.float() * self.scale

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> Tensor:
        """Updates the weights unless `grad_norm` is non-finite, then adapts the scale.

        Returns whether the update was skipped: 0-dim float32, 1 or 0.
        """
        found_inf = (~grad_norm.isfinite()).float()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
        elif not found_inf.item():  # sync: this optimizer cannot skip on the device
            optimizer.step()
        self._adapt(found_inf)
        return found_inf

    @torch.no_grad()
    def adapt(self, grad_norm: Tensor) -> Tensor:
        """`step` without the update: adapts the scale and returns whether the update is to be skipped."""
        found_inf = (~grad_norm.isfinite()).float()
        self._adapt(found_inf)
        return found_inf

    def _adapt(self, found_inf: Tensor) -> None:
        overflowed = found_inf > 0
        good_steps = torch.where(overflowed, 0, self.good_steps + 1)
        grows = good_steps >= self.growth_interval
        factor = 1.0 - 0.5 * overflowed + 1.0 * grows  # 0.5, 1 or 2
        self.scale.copy_((self.scale * factor).clamp(_SMALLEST_SCALE, _LARGEST_SCALE))
        self.good_steps.copy_(torch.where(grows, 0, good_steps))

    def state_tensors(self) -> dict[str, Tensor]:
        """For the checkpoint: "scale" and "good_steps"."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continues from `state_tensors`; CheckpointError if it is something else."""
        if set(tensors) != {"scale", "good_steps"}:
            raise CheckpointError(
                f"the loss scale's state has {sorted(tensors)}, not good_steps and scale;"
                " resume with the precision the checkpoint was trained with"
            )
        self.scale.copy_(tensors["scale"])
        self.good_steps.copy_(tensors["good_steps"])
