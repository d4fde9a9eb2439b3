"""The held-out loss: a number that falls when the model gets better and for no other reason.

The training loss of a step is mostly the luck of its noise levels. Here every sample is looked at
with the same noise levels and the same noise each time, functions of the seed and the sample
alone, so that two steps of a run, or two runs with the same held-out images, compare.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.ddpm import Ddpm
from fasttune.flow_matching import FlowMatching
from fasttune.models.spec import Conditions, ModelSpec, cast_conditions
from fasttune.reconstruction import Reconstruction
from fasttune.seeds import derive_seed, generator_for


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutBatch:
    """Some held-out samples of one size."""

    clean_latents: Tensor
    """(B, C, h, w): the mean of the autoencoder, so that nothing is drawn."""
    conditions: Conditions
    sizes: Tensor
    """(B, 6), see spec.Predict."""
    keys: Sequence[str | int]
    """What each sample's noise depends on besides the seed: its path or index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutLoss:
    """Means over the samples."""

    loss: float
    by_timestep: list[float]
    """One for each noise level, in the order they were given; `loss` is their mean."""


@torch.no_grad()
def held_out_loss(
    spec: ModelSpec,
    denoiser: nn.Module,
    objective: FlowMatching | Ddpm | Reconstruction,
    batches: Iterable[HeldOutBatch],
    *,
    timesteps: Sequence[float],
    seed: int,
    device: torch.device,
    compute_dtype: torch.dtype,
    guidance: float = 1.0,
) -> HeldOutLoss:
    """The objective's loss at fixed noise levels (objective.held_out_times) and with fixed noise.

    Samples may be batched otherwise from time to time, except for an autoencoder, which draws its
    latents batch by batch. The denoiser's mode and the default generator of the CPU and of CUDA are
    left as they were. Without any batch the losses are NaN.
    """
    total = torch.zeros(len(timesteps), dtype=torch.float64)
    count = 0
    training = denoiser.training
    denoiser.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for batch in batches:
                total += _losses(
                    spec,
                    denoiser,
                    objective,
                    batch,
                    timesteps,
                    seed,
                    device,
                    compute_dtype,
                    guidance,
                )
                count += len(batch.keys)
    finally:
        denoiser.train(training)
    by_timestep = (total / count if count else total / 0).tolist()
    return HeldOutLoss(loss=sum(by_timestep) / len(by_timestep), by_timestep=by_timestep)


def _losses(
    spec: ModelSpec,
    denoiser: nn.Module,
    objective: FlowMatching | Ddpm | Reconstruction,
    batch: HeldOutBatch,
    timesteps: Sequence[float],
    seed: int,
    device: torch.device,
    compute_dtype: torch.dtype,
    guidance: float,
) -> Tensor:
    """Sums over the batch, one a noise level: (len(timesteps),) float64 on the CPU."""
    clean = batch.clean_latents.to(device, torch.float32)
    sizes = batch.sizes.to(device, torch.float32)
    on_device = {name: value.to(device) for name, value in batch.conditions.items()}
    conditions = cast_conditions(on_device, compute_dtype)
    guidances = torch.full((len(clean),), guidance, device=device)

    def predict(noisy: Tensor, timestep: Tensor) -> Any:  # a triple from an autoencoder
        return spec.predict(
            denoiser, noisy.to(compute_dtype), timestep, conditions, sizes, guidances
        )

    sums = []
    for level, t in enumerate(timesteps):
        # Drawn on the CPU: the same on every device.
        noise = torch.stack(
            [
                torch.randn(clean.shape[1:], generator=generator_for(seed, "held-out", key, level))
                for key in batch.keys
            ]
        )
        torch.manual_seed(derive_seed(seed, "held-out", level))  # the autoencoder draws by itself
        times = torch.full((len(clean),), float(t), device=device)
        sums.append(objective.loss(predict, clean, noise.to(device), times).double().sum())
    return torch.stack(sums).cpu()  # sync: one a batch
