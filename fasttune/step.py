"""What a micro-batch computes, from cached latents to the loss: the part of the loop that is timed,
traced and rehearsed as well as run."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.data.loader import Batch
from fasttune.ddpm import Ddpm, add_offset_noise
from fasttune.flow_matching import FlowMatching
from fasttune.models.spec import ModelSpec, cast_conditions, select_conditions
from fasttune.reconstruction import Reconstruction

Objective = FlowMatching | Ddpm | Reconstruction


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The network, its objective, and how the two are joined."""

    spec: ModelSpec
    denoiser: nn.Module
    objective: Objective
    compute_dtype: torch.dtype
    token_side: int
    """Heights and widths of latents that make one token of the noise level's shift."""
    offset_noise: float
    text_mask: bool
    """Whether the network is given the text mask."""
    guidance: Tensor
    """(B,) float32: embedded guidance."""

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean loss of the micro-batch, float32 on its device, with the graph to its backward.

        `generator` is on the batch's device and gives, in this order, latents, noise and noise levels.
        """
        clean = batch.draw_latents(generator)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        if self.offset_noise:
            noise = add_offset_noise(noise, self.offset_noise, generator)
        num_tokens = clean.shape[-2] * clean.shape[-1] // self.token_side**2
        t = self.objective.sample_times(len(clean), num_tokens, generator, clean.device)
        conditions = select_conditions(batch.conditions, text_mask=self.text_mask)
        conditions = cast_conditions(conditions, self.compute_dtype)
        predict = partial(self._predict, conditions, batch.sizes)
        return self.objective.loss(predict, clean, noise, t).mean()

    def _predict(
        self, conditions: dict[str, Tensor], sizes: Tensor, noisy: Tensor, t: Tensor
    ) -> Any:
        noisy = noisy.to(self.compute_dtype)
        return self.spec.predict(self.denoiser, noisy, t, conditions, sizes, self.guidance)
