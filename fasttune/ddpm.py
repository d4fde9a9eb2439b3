"""Denoising diffusion with a discrete schedule, the objective of SD 1.x, 2.x and SDXL.

With abar_t the cumulative product of alpha_t = 1 - beta_t over the integer timesteps t:

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    target = eps                                           (epsilon)
    target = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0       (v_prediction)
    SNR(t) = abar_t / (1 - abar_t)

- DDPM: https://arxiv.org/abs/2006.11239; v: https://arxiv.org/abs/2202.00512
- min-SNR weights: https://arxiv.org/abs/2303.09556
- Zero terminal SNR: https://arxiv.org/abs/2305.08891
- Offset noise: https://www.crosslabs.org/blog/diffusion-with-offset-noise
- Sampling in sigma = sqrt((1 - abar) / abar), Euler steps: https://arxiv.org/abs/2206.00364
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from fasttune.errors import ConfigError, ModelError
from fasttune.losses import LossName
from fasttune_kernels.diffusion_loss import diffusion_loss

Prediction = Literal["epsilon", "v_prediction"]
BetaSchedule = Literal["scaled_linear", "linear"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]

# abar of the last step when sampling a zero-terminal schedule: 0 would make its sigma infinite.
# diffusers' value, the smallest positive float16: sigma = 4096.
_TERMINAL_ABAR = 2.0**-24


def alphas_cumprod(
    *,
    num_train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    beta_schedule: BetaSchedule = "scaled_linear",
    zero_terminal_snr: bool = False,
) -> Tensor:
    """abar_t: (num_train_timesteps,) float64 on the CPU. Defaults are Stable Diffusion's.

    In float64, because 1 - abar_t loses 4 digits to cancellation at small t; cast the results.
    """
    if beta_schedule == "scaled_linear":
        betas = torch.linspace(
            beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64
        ).square()
    else:
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, dim=0)
    return rescale_zero_terminal_snr(abar) if zero_terminal_snr else abar


def rescale_zero_terminal_snr(abar: Tensor) -> Tensor:
    """abar_t (T,) shifted and scaled so that abar_T = 0 and abar_1 stays; algorithm 1 of
    https://arxiv.org/abs/2305.08891."""
    root = abar.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * (first / (first - last))).square()


def add_noise(x_0: Tensor, eps: Tensor, signal: Tensor, std: Tensor) -> Tensor:
    """x_t = signal x_0 + std eps, with signal = sqrt(abar) and std = sqrt(1 - abar).
    x_0, eps (B, ...), signal, std (B,) -> (B, ...) float32."""
    return _mix(signal, x_0, std, eps)


def v_target(x_0: Tensor, eps: Tensor, signal: Tensor, std: Tensor) -> Tensor:
    """v = signal eps - std x_0; arguments as of `add_noise`. (B, ...) float32."""
    return _mix(signal, eps, -std, x_0)


def _mix(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y in float32, a and b one number a sample."""
    shape = (-1, *[1] * (x.dim() - 1))
    return a.float().view(shape) * x.float() + b.float().view(shape) * y.float()


def min_snr_weight(snr: Tensor, *, gamma: float, prediction: Prediction) -> Tensor:
    """Loss weight of each sample, shape of `snr`; https://arxiv.org/abs/2303.09556, section 3.4.

    min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v: both weigh the error
    of the implied x_0 by min(SNR, gamma). At SNR = 0 the weight of v is 0, that of epsilon its
    limit 1.
    """
    if prediction == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))


def add_offset_noise(noise: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """`noise` (B, C, H, W) plus `strength` times one normal number per sample and channel, so that
    the model also learns to move an image's mean."""
    offset = torch.randn(
        (*noise.shape[:2], 1, 1), generator=generator, device=generator.device, dtype=torch.float32
    )
    return noise + strength * offset.to(noise.device, noise.dtype)


def sampling_schedule(
    num_steps: int,
    *,
    num_train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    beta_schedule: BetaSchedule = "scaled_linear",
    zero_terminal_snr: bool = False,
    timestep_spacing: TimestepSpacing = "leading",
    steps_offset: int = 1,
) -> tuple[Tensor, Tensor]:
    """Timesteps (num_steps,) and noise levels sigma (num_steps + 1,) of the denoising loop, both
    float32 on the CPU, falling; the last sigma is 0.

    The numbers of diffusers' EulerDiscreteScheduler. `steps_offset` matters for "leading" alone.
    """
    T = num_train_timesteps
    if timestep_spacing == "leading":
        t = np.arange(num_steps)[::-1] * float(T // num_steps) + steps_offset
    elif timestep_spacing == "trailing":
        t = np.round(np.arange(T, 0, -T / num_steps)) - 1
    else:
        t = np.linspace(0, T - 1, num_steps)[::-1]
    timesteps = t.astype(np.float32)
    abar = alphas_cumprod(
        num_train_timesteps=T,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule=beta_schedule,
        zero_terminal_snr=zero_terminal_snr,
    ).numpy()
    if zero_terminal_snr:
        abar[-1] = _TERMINAL_ABAR
    sigmas = np.interp(timesteps, np.arange(T), np.sqrt((1 - abar) / abar))
    sigmas = np.append(sigmas, 0.0).astype(np.float32)
    return torch.from_numpy(timesteps), torch.from_numpy(sigmas)


def init_noise_sigma(sigmas: Tensor, *, timestep_spacing: TimestepSpacing) -> Tensor:
    """Standard deviation of the noise that sampling starts from; scalar.

    "trailing" and "linspace" start at the last training step, where the image is taken to be gone;
    "leading" starts before it, at variance sigma^2 + 1.
    """
    largest = sigmas.max()
    return (largest**2 + 1).sqrt() if timestep_spacing == "leading" else largest


def scale_model_input(x: Tensor, sigma: Tensor) -> Tensor:
    """x / sqrt(sigma^2 + 1), float32: from x = x_0 + sigma eps to the x_t the network knows."""
    return x.float() / (sigma**2 + 1).sqrt()


def denoised(x: Tensor, prediction: Tensor, sigma: Tensor, *, kind: Prediction) -> Tensor:
    """The image that a prediction implies, from x = x_0 + sigma eps; float32, the shape of x.

    epsilon: x - sigma eps.  v: x / (sigma^2 + 1) - sigma / sqrt(sigma^2 + 1) v.
    """
    if kind == "epsilon":
        return x.float() - sigma * prediction.float()
    return x.float() / (sigma**2 + 1) - prediction.float() * (sigma / (sigma**2 + 1).sqrt())


def euler_step(
    x: Tensor, prediction: Tensor, sigma: Tensor, sigma_next: Tensor, *, kind: Prediction
) -> Tensor:
    """One step of the denoising loop from sigma to sigma_next; float32, the shape of x.

    x + (sigma_next - sigma) d with d = (x - denoised) / sigma, written without dividing by sigma.
    """
    if kind == "epsilon":
        return x.float() + (sigma_next - sigma) * prediction.float()
    slope = x.float() * (sigma / (sigma**2 + 1)) + prediction.float() / (sigma**2 + 1).sqrt()
    return x.float() + (sigma_next - sigma) * slope


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerNumbers:
    """What the scheduler_config.json of a DDPM model says, under our names."""

    prediction: Prediction
    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: BetaSchedule
    zero_terminal_snr: bool
    timestep_spacing: TimestepSpacing
    steps_offset: int


# diffusers schedulers leave their defaults out of hand-written files, and differ in one of them.
_LEADING_BY_DEFAULT = {"DDIMScheduler", "DDPMScheduler", "PNDMScheduler"}


def from_scheduler_config(config: Mapping[str, Any]) -> SchedulerNumbers:
    """Reads scheduler_config.json of a DDPM model; absent keys have diffusers' defaults.

    Raises ModelError for schedules that would be trained or sampled wrongly.
    """
    kind = str(config.get("_class_name", ""))
    if kind.startswith(("EDM", "FlowMatch", "CM")):
        raise ModelError(
            f"scheduler_config.json: {kind} is not a DDPM schedule; its model cannot be trained as one"
        )
    spacing_default = "leading" if kind in _LEADING_BY_DEFAULT else "linspace"
    prediction = config.get("prediction_type", "epsilon")
    beta_schedule = config.get("beta_schedule", "linear")
    spacing = config.get("timestep_spacing", spacing_default)
    for key, given, allowed in (
        ("prediction_type", prediction, get_args(Prediction)),
        ("beta_schedule", beta_schedule, get_args(BetaSchedule)),
        ("timestep_spacing", spacing, get_args(TimestepSpacing)),
        ("trained_betas", config.get("trained_betas"), (None,)),
    ):
        if given not in allowed:
            raise ModelError(
                f"scheduler_config.json: {key} = {given!r} is not supported, only"
                f" {', '.join(map(repr, allowed))}; correct the file or use another model"
            )
    return SchedulerNumbers(
        prediction=cast(Prediction, prediction),
        num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
        beta_start=float(config.get("beta_start", 0.0001)),
        beta_end=float(config.get("beta_end", 0.02)),
        beta_schedule=cast(BetaSchedule, beta_schedule),
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        timestep_spacing=cast(TimestepSpacing, spacing),
        steps_offset=int(config.get("steps_offset", 0)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ddpm:
    """The objective as the loop sees it; FlowMatching and Reconstruction have the same three
    methods."""

    prediction: Prediction
    timestep_sampling: Literal["uniform", "explicit"] = "uniform"
    timesteps: tuple[float, ...] = ()
    """Integers in [0, num_train_timesteps) for "explicit"."""
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    zero_terminal_snr: bool = False
    min_snr_gamma: float | None = None
    loss_name: LossName = "mse"
    huber_delta: float = 0.1
    # Made once a device: a copy from host memory in each micro-batch would be a synchronisation.
    _tables: dict[torch.device, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _explicit: dict[torch.device, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        problems = []
        if self.timestep_sampling not in ("uniform", "explicit"):
            problems.append(
                f"objective.timestep_sampling = {self.timestep_sampling!r} is for flow matching;"
                ' DDPM models have "uniform" and "explicit"'
            )
        if self.timestep_sampling == "explicit":
            last = self.num_train_timesteps - 1
            if not self.timesteps:
                problems.append(
                    'objective.timesteps is empty; timestep_sampling = "explicit" needs integers'
                    f" from 0 to {last}"
                )
            bad = [t for t in self.timesteps if not (0 <= t <= last and t == int(t))]
            if bad:
                problems.append(
                    f"objective.timesteps holds {bad[0]}; timesteps of DDPM models are integers"
                    f" from 0 to {last}"
                )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            problems.append(
                'objective.zero_terminal_snr = true needs objective.prediction = "v_prediction":'
                " at the last step the input is pure noise, and epsilon says nothing of the image"
            )
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            problems.append(
                f"objective.min_snr_gamma = {self.min_snr_gamma}; it must be larger than 0"
            )
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
        """Integer timesteps of a micro-batch: (batch_size,) float32. `image_seq_len` is not used.

        Drawn on the generator's device and moved to `device`.
        """
        explicit = self.timestep_sampling == "explicit"
        high = len(self.timesteps) if explicit else self.num_train_timesteps
        t = torch.randint(high, (batch_size,), generator=generator, device=generator.device)
        if explicit:
            table = self._explicit.get(t.device)
            if table is None:
                table = torch.tensor(self.timesteps, device=t.device)
                self._explicit[t.device] = table
            t = table[t]
        return t.to(device, torch.float32)

    def held_out_times(self, n: int) -> list[float]:
        """Midpoints of n equal parts of the training timesteps, as integers."""
        return [float(int((i + 0.5) / n * self.num_train_timesteps)) for i in range(n)]

    def loss(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        clean_latents: Tensor,
        noise: Tensor,
        t: Tensor,
    ) -> Tensor:
        """(B,) float32 from latents and noise (B, C, H, W) and integer timesteps t (B,).

        predict(noisy_latents (B, C, H, W) float32, t (B,)) -> epsilon or v (B, C, H, W).
        """
        signal, std = self._signal_and_noise(t)
        prediction = predict(add_noise(clean_latents, noise, signal, std), t)
        weight = None
        if self.min_snr_gamma is not None:
            snr = (signal / std).square()
            weight = min_snr_weight(snr, gamma=self.min_snr_gamma, prediction=self.prediction)
        is_epsilon = self.prediction == "epsilon"  # else the target is `v_target`
        return diffusion_loss(
            prediction,
            None if is_epsilon else clean_latents,
            noise,
            clean_factor=None if is_epsilon else -std,
            noise_factor=None if is_epsilon else signal,
            weight=weight,
            kind=self.loss_name,
            huber_delta=self.huber_delta,
        )

    def _signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), each (B,) float32 on t's device."""
        table = self._tables.get(t.device)
        if table is None:
            abar = alphas_cumprod(
                num_train_timesteps=self.num_train_timesteps,
                beta_start=self.beta_start,
                beta_end=self.beta_end,
                beta_schedule=self.beta_schedule,
                zero_terminal_snr=self.zero_terminal_snr,
            )
            table = torch.stack([abar.sqrt(), (1 - abar).sqrt()]).float().to(t.device)
            self._tables[t.device] = table
        signal, std = table[:, t.long()]
        return signal, std
