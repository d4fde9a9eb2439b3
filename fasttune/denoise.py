"""The denoising loop: Euler steps along the schedule of the model folder, the numbers of the
diffusers schedulers, with classifier-free guidance (https://arxiv.org/abs/2207.12598) as two halves
of one batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fasttune import ddpm, flow_matching
from fasttune.ddpm import Ddpm
from fasttune.flow_matching import FlowMatching
from fasttune.models.spec import Conditions, ModelSpec, cast_conditions

StepDone = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseSchedule:
    """The noise levels of a denoising loop of n steps."""

    sigmas: Tensor
    """(n + 1,) float32 on the CPU, falling to 0."""
    timesteps: Tensor
    """(n,) float32 on the CPU: what the network is told at each step."""
    initial: float
    """Standard deviation of the noise at the start."""
    prediction: Literal["velocity", "epsilon", "v_prediction"]


def noise_schedule(
    objective: FlowMatching | Ddpm,
    scheduler: Mapping[str, Any],
    *,
    num_steps: int,
    image_seq_len: int,
) -> NoiseSchedule:
    """The schedule of a scheduler_config.json, for a network trained with `objective`.

    A DDPM objective brings its prediction and betas, so that sampling follows training where the
    config changes them. Flow matching samples with the file's shift: the shift of training is a
    distribution of noise levels and may be another.
    """
    if isinstance(objective, FlowMatching):
        flow = flow_matching.from_scheduler_config(scheduler)
        sigmas = flow_matching.sampling_sigmas(
            num_steps,
            image_seq_len,
            shift=flow.shift,
            base_shift=flow.base_shift,
            max_shift=flow.max_shift,
            base_seq_len=flow.base_seq_len,
            max_seq_len=flow.max_seq_len,
        )
        return NoiseSchedule(
            sigmas=sigmas, timesteps=sigmas[:-1], initial=1.0, prediction="velocity"
        )
    numbers = ddpm.from_scheduler_config(scheduler)
    # Trained to zero terminal SNR by the config: only "trailing" starts at that last step.
    rescaled = objective.zero_terminal_snr and not numbers.zero_terminal_snr
    spacing = "trailing" if rescaled else numbers.timestep_spacing
    timesteps, sigmas = ddpm.sampling_schedule(
        num_steps,
        num_train_timesteps=objective.num_train_timesteps,
        beta_start=objective.beta_start,
        beta_end=objective.beta_end,
        beta_schedule=objective.beta_schedule,
        zero_terminal_snr=objective.zero_terminal_snr,
        timestep_spacing=spacing,
        steps_offset=numbers.steps_offset,
    )
    return NoiseSchedule(
        sigmas=sigmas,
        timesteps=timesteps,
        initial=float(ddpm.init_noise_sigma(sigmas, timestep_spacing=spacing)),
        prediction=objective.prediction,
    )


@torch.no_grad()
def denoise(
    spec: ModelSpec,
    denoiser: nn.Module,
    *,
    conditions: Conditions,
    negative_conditions: Conditions | None,
    sizes: Tensor,
    negative_sizes: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    guidance_scale: float,
    compute_dtype: torch.dtype,
    step_done: StepDone | None = None,
) -> Tensor:
    """Latents (B, C, h, w) float32 from standard normal noise (B, C, h, w) by Euler steps.

    conditions: batch first, B each; sizes (B, 6). With `negative_conditions`, guidance_scale > 1
    and a family without embedded guidance, each step predicts 2 B samples at once and moves from
    the negative prediction to `guidance_scale` times the difference; else it predicts B.
    """
    device, batch = noise.device, len(noise)
    guided = negative_conditions is not None and guidance_scale > 1 and not spec.has_guidance
    if guided:
        assert negative_conditions is not None
        conditions = {k: torch.cat([negative_conditions[k], v]) for k, v in conditions.items()}
        sizes = torch.cat([negative_sizes, sizes])
    conditions = cast_conditions({k: v.to(device) for k, v in conditions.items()}, compute_dtype)
    sizes = sizes.to(device, torch.float32)
    guidance = torch.full((len(sizes),), float(guidance_scale), device=device)
    kind = schedule.prediction
    sigmas, timesteps = schedule.sigmas.to(device), schedule.timesteps.to(device)
    x = noise.float() * schedule.initial
    for i, timestep in enumerate(timesteps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        noisy = x if kind == "velocity" else ddpm.scale_model_input(x, sigma)
        if guided:
            noisy = torch.cat([noisy, noisy])
        prediction = spec.predict(
            denoiser,
            noisy.to(compute_dtype),
            timestep.expand(len(noisy)),
            conditions,
            sizes,
            guidance,
        ).float()
        if guided:
            negative, positive = prediction.split(batch)
            prediction = negative + guidance_scale * (positive - negative)
        if kind == "velocity":
            x = flow_matching.euler_step(x, prediction, sigma, sigma_next)
        else:
            x = ddpm.euler_step(x, prediction, sigma, sigma_next, kind=kind)
        if step_done is not None:
            step_done()
    return x
