"""Rectified flow matching, the objective of Flux and SD3.

Between an image's latents x_0 and Gaussian noise eps runs a straight line, and the network learns
the velocity along it:

    x_sigma = (1 - sigma) x_0 + sigma eps        target = d x_sigma / d sigma = eps - x_0

sigma is the noise level in [0, 1]: 0 is the image, 1 pure noise. What remains to choose is the
distribution of sigma in training and the steps in sampling. Both are bent by a *shift* towards
noise, which larger images need more of, because at the same sigma they show more of the image.

- Flow matching: https://arxiv.org/abs/2210.02747, https://arxiv.org/abs/2209.03003
- SD3, timestep distributions and shift: https://arxiv.org/abs/2403.03206 (sections 3.1 and 5.3.2)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fasttune.errors import ConfigError, ModelError
from fasttune.losses import LossName
from fasttune_kernels.diffusion_loss import diffusion_loss

Shift = Literal["none", "resolution"] | float

# The open interval (0, 1) in float32: at 0 no noise is left to predict, at 1 no image.
_SMALLEST = 2.0**-24
_LARGEST = 1.0 - 2.0**-24


def interpolate(x_0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x_0 + sigma eps. x_0, eps (B, ...), sigma (B,) -> (B, ...) float32."""
    sigma = sigma.float().view(-1, *[1] * (x_0.dim() - 1))
    return (1 - sigma) * x_0.float() + sigma * eps.float()


def velocity(x_0: Tensor, eps: Tensor) -> Tensor:
    """The target eps - x_0, float32; independent of sigma on a straight line."""
    return eps.float() - x_0.float()


def logit_normal(n: int, *, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """n times from sigmoid(N(mean, std)), float32; SD3 paper, equation 19."""
    device = generator.device
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=device))


def mode(u: Tensor, *, scale: float) -> Tensor:
    """f_mode(u; s) = 1 - u - s (cos^2(pi u / 2) - 1 + u); SD3 paper, equation 20.

    Maps uniform u to [0, 1]; monotonic for -1 <= s <= 2 / (pi - 2). s > 0 favours the middle,
    s < 0 the ends, s = 0 is uniform.
    """
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def resolution_mu(
    image_seq_len: int,
    *,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
) -> float:
    """mu of `time_shift`, linear in the number of image tokens through (base_seq_len, base_shift)
    and (max_seq_len, max_shift); not clipped outside, as in Flux."""
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    return image_seq_len * slope + (base_shift - slope * base_seq_len)


def time_shift(mu: float, sigma: Tensor) -> Tensor:
    """Flux's exponential shift e^mu / (e^mu + 1 / sigma - 1): `static_shift` by e^mu. 0 -> 0."""
    e_mu = torch.tensor(math.exp(mu), dtype=sigma.dtype)
    return e_mu / (e_mu + (1 / sigma - 1))  # a tensor: number / tensor rounds twice in torch


def static_shift(s: float, sigma: Tensor) -> Tensor:
    """s sigma / (1 + (s - 1) sigma); SD3 paper, equation 23, with s = sqrt(m / n)."""
    return s * sigma / (1 + (s - 1) * sigma)


def shifted(
    sigma: Tensor,
    image_seq_len: int,
    *,
    shift: Shift,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
) -> Tensor:
    """`sigma` after the shift the config names; image_seq_len matters for "resolution" alone."""
    if shift == "none":
        return sigma
    if shift == "resolution":
        mu = resolution_mu(
            image_seq_len,
            base_shift=base_shift,
            max_shift=max_shift,
            base_seq_len=base_seq_len,
            max_seq_len=max_seq_len,
        )
        return time_shift(mu, sigma)
    return static_shift(float(shift), sigma)


def sampling_sigmas(
    num_steps: int,
    image_seq_len: int,
    *,
    shift: Shift,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
) -> Tensor:
    """Noise levels of the denoising loop, from 1 down to exactly 0: (num_steps + 1,) float32, CPU.

    The numbers of diffusers' FlowMatchEulerDiscreteScheduler as FluxPipeline sets it: `num_steps`
    levels from 1 to 1 / num_steps, then the shift ("resolution" for FLUX.1-dev, "none" for schnell).
    """
    # In float32 and in this order of operations the levels equal the scheduler's to the last bit.
    levels = torch.from_numpy(np.linspace(1.0, 1 / num_steps, num_steps).astype(np.float32))
    levels = shifted(
        levels,
        image_seq_len,
        shift=shift,
        base_shift=base_shift,
        max_shift=max_shift,
        base_seq_len=base_seq_len,
        max_seq_len=max_seq_len,
    )
    return torch.cat([levels, torch.zeros(1)])


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x + (sigma_next - sigma) velocity, in float32: one step of the denoising loop."""
    return x.float() + (sigma_next - sigma) * velocity.float()


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerNumbers:
    """What a flow-matching scheduler_config.json says, under our names."""

    shift: Shift
    base_shift: float
    max_shift: float
    base_seq_len: int
    max_seq_len: int


def from_scheduler_config(config: Mapping[str, Any]) -> SchedulerNumbers:
    """Reads scheduler_config.json of a flow-matching model.

    Raises ModelError for schedules that would be sampled wrongly without being implemented.
    """
    unsupported = {
        "shift_terminal": None,
        "invert_sigmas": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    }
    kind = str(config.get("_class_name", "FlowMatch"))
    if not kind.startswith("FlowMatch"):
        raise ModelError(f"scheduler_config.json: {kind} is not a schedule of flow matching")
    for key, allowed in unsupported.items():
        if (config.get(key, allowed) or allowed) != allowed:
            raise ModelError(
                f"scheduler_config.json: {key} = {config[key]!r} is not supported, only {allowed!r};"
                " use a model whose scheduler is FLUX.1's or SD3's"
            )
    static = float(config.get("shift", 1.0))
    dynamic = bool(config.get("use_dynamic_shifting", False))
    return SchedulerNumbers(
        shift="resolution" if dynamic else "none" if static == 1.0 else static,
        base_shift=float(config.get("base_shift", 0.5)),
        max_shift=float(config.get("max_shift", 1.15)),
        base_seq_len=int(config.get("base_image_seq_len", 256)),
        max_seq_len=int(config.get("max_image_seq_len", 4096)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowMatching:
    """The objective as the loop sees it; Ddpm and Reconstruction have the same three methods."""

    timestep_sampling: Literal["uniform", "logit_normal", "mode", "explicit"]
    shift: Shift
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    timesteps: tuple[float, ...] = ()
    """Noise levels in [0, 1] for "explicit", used as they are, without shift."""
    loss_name: LossName = "mse"
    huber_delta: float = 0.1
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_seq_len: int = 256
    max_seq_len: int = 4096
    # Made once a device: a copy from host memory in each micro-batch would be a synchronisation.
    _explicit: dict[torch.device, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        problems = []
        if self.timestep_sampling == "explicit" and not self.timesteps:
            problems.append(
                'objective.timesteps is empty; timestep_sampling = "explicit" needs noise levels'
                " in [0, 1]"
            )
        outside = [t for t in self.timesteps if not 0 <= t <= 1]
        if self.timestep_sampling == "explicit" and outside:
            problems.append(
                f"objective.timesteps holds {outside[0]}; noise levels of flow matching are in [0, 1]"
            )
        if not isinstance(self.shift, str) and not self.shift > 0:
            problems.append(f"objective.shift = {self.shift}; a shift factor is larger than 0")
        if self.timestep_sampling == "mode" and not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            problems.append(
                f"objective.mode_scale = {self.mode_scale}; allowed are -1 to"
                f" {2 / (math.pi - 2):.3f}, outside of which mode sampling is not monotonic"
            )
        if self.timestep_sampling == "logit_normal" and not self.logit_std > 0:
            problems.append(f"objective.logit_std = {self.logit_std}; it must be larger than 0")
        if self.loss_name == "huber" and not self.huber_delta > 0:
            problems.append(f"objective.huber_delta = {self.huber_delta}; it must be larger than 0")
        if problems:
            raise ConfigError(problems)

    def sample_times(
        self,
        batch_size: int,
        image_seq_len: int,
        generator: torch.Generator,
        device: torch.device | str,
    ) -> Tensor:
        """Noise levels of a micro-batch after the shift, in (0, 1): (batch_size,) float32.

        Drawn on the generator's device and moved to `device`.
        """
        draw_on = generator.device
        if self.timestep_sampling == "explicit":
            index = torch.randint(
                len(self.timesteps), (batch_size,), generator=generator, device=draw_on
            )
            levels = self._explicit.get(index.device)
            if levels is None:
                levels = torch.tensor(self.timesteps, dtype=torch.float32, device=draw_on)
                self._explicit[index.device] = levels
            return levels[index].to(device)
        if self.timestep_sampling == "logit_normal":
            sigma = logit_normal(
                batch_size, mean=self.logit_mean, std=self.logit_std, generator=generator
            )
        else:
            sigma = torch.rand(batch_size, generator=generator, device=draw_on)
            if self.timestep_sampling == "mode":
                sigma = mode(sigma, scale=self.mode_scale)
        sigma = shifted(
            sigma.clamp(_SMALLEST, _LARGEST),
            image_seq_len,
            shift=self.shift,
            base_shift=self.base_shift,
            max_shift=self.max_shift,
            base_seq_len=self.base_seq_len,
            max_seq_len=self.max_seq_len,
        )
        return sigma.clamp(_SMALLEST, _LARGEST).to(device)

    def held_out_times(self, n: int) -> list[float]:
        """Midpoints of n equal parts of [0, 1]; the same for every config, so that held-out losses
        of runs with other timestep distributions compare."""
        return [(i + 0.5) / n for i in range(n)]

    def loss(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        clean_latents: Tensor,
        noise: Tensor,
        t: Tensor,
    ) -> Tensor:
        """(B,) float32 from latents and noise (B, C, H, W) and noise levels t (B,).

        predict(noisy_latents (B, C, H, W) float32, t (B,)) -> velocity (B, C, H, W).
        """
        prediction = predict(interpolate(clean_latents, noise, t), t)
        return diffusion_loss(  # from `velocity`
            prediction,
            clean_latents,
            noise,
            clean_factor=torch.full_like(t, -1.0),
            kind=self.loss_name,
            huber_delta=self.huber_delta,
        )
