"""Training an autoencoder: reconstruct the pixels, keep the latents near a standard normal.

    loss = distance(x_hat, x) + kl_weight KL(N(mean, var) || N(0, 1)) / number of pixel values

The division keeps the balance of the latent diffusion paper (https://arxiv.org/abs/2112.10752),
which sums both terms, with a loss that does not grow with the image. Without its perceptual and
adversarial terms, which need networks of their own; large autoencoders want them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttune.errors import ConfigError
from fasttune.losses import LossName, distance


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) summed over all but the batch, in nats: (B,) float32.

    logvar is clamped to [-30, 20] as where the latents are drawn, so that exp stays finite.
    """
    mean, logvar = mean.float(), logvar.float().clamp(-30.0, 20.0)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """The objective as the loop sees it; FlowMatching and Ddpm have the same three methods."""

    kl_weight: float
    loss_name: LossName = "mse"
    huber_delta: float = 0.1

    def __post_init__(self) -> None:
        problems = []
        if not self.kl_weight >= 0:
            problems.append(f"objective.kl_weight = {self.kl_weight}; it must be 0 or larger")
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
        """(batch_size,) float32 zeros: an autoencoder has no noise level."""
        return torch.zeros(batch_size, device=device)

    def held_out_times(self, n: int) -> list[float]:
        """One level is all there is: [0.0] for any n."""
        return [0.0]

    def loss(
        self,
        predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
        pixels: Tensor,
        noise: Tensor,
        t: Tensor,
    ) -> Tensor:
        """(B,) float32 from pixels (B, 3, H, W) in [-1, 1]; `noise` is not used.

        predict(pixels float32, t) -> reconstruction (B, 3, H, W), mean and logvar (B, C, h, w).
        """
        reconstruction, mean, logvar = predict(pixels.float(), t)
        error = distance(reconstruction, pixels, loss=self.loss_name, huber_delta=self.huber_delta)
        kl = kl_to_standard_normal(mean, logvar) / pixels[0].numel()
        return error + self.kl_weight * kl
