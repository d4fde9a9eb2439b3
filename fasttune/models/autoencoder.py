"""The autoencoder between pixels and latents, frozen for the other families and itself a family.

Latents leave `encode_moments` as the denoiser sees them, (z - shift_factor) * scaling_factor with
the numbers of the folder's config.json, and `decode` takes them so. Both ask for no other number.

As the family "autoencoder" the trained network is the autoencoder, its "latents" are pixels in
[-1, 1] and the objective is reconstruction with a KL term (https://arxiv.org/abs/2112.10752).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fasttune.errors import ModelError
from fasttune.models.spec import Conditions, ModelSpec, Predict


def load_autoencoder(folder: Path, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The frozen diffusers AutoencoderKL of a model folder.

    float16 becomes float32 when the config says force_upcast, which is also its default: the
    activations of the released SDXL autoencoder leave float16's range and images turn black.
    Raises ModelError for a missing, damaged or incomplete one.
    """
    from diffusers import AutoencoderKL

    path = folder / "vae"
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path}: no autoencoder here (config.json is missing); model.path must be a whole"
            " diffusers folder"
        )
    name = "diffusion_pytorch_model"
    plain, half = path / f"{name}.safetensors", path / f"{name}.fp16.safetensors"
    try:
        config = AutoencoderKL.load_config(path, local_files_only=True)
        upcast = dtype == torch.float16 and config.get("force_upcast", True)
        vae, report = AutoencoderKL.from_pretrained(
            path,
            variant="fp16" if half.is_file() and not plain.is_file() else None,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers and safetensors raise their own, undocumented types
        raise ModelError(
            f"{path}: the autoencoder cannot be loaded ({error}); its .safetensors file is missing,"
            " damaged or of another model: download the folder again"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{path}: {len(missing)} tensors are missing, such as {missing[0]}; download the folder"
            " again"
        )
    # torch's own `to`: the one of diffusers warns of every dtype, also of the one it has
    nn.Module.to(vae, device=device, dtype=torch.float32 if upcast else dtype)
    return vae.eval().requires_grad_(False)


def downscale(config: Mapping[str, Any]) -> int:
    """Pixels per latent along each side, from vae/config.json: 8 for all released families."""
    return 2 ** (len(config["block_out_channels"]) - 1)


@torch.no_grad()
def encode_moments(vae: Any, images_u8: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) uint8 -> mean and std of the latents as the denoiser sees them, each
    (B, C, H / 8, W / 8) float32. H and W must be multiples of `downscale`."""
    scale, shift = _scale_and_shift(vae)
    pixels, _ = encode_pixels(images_u8.to(vae.device))
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale


def encode_pixels(images_u8: Tensor) -> tuple[Tensor, Tensor]:
    """The moments of the family "autoencoder": images (B, 3, H, W) uint8 -> pixels in [-1, 1] and
    their std, zeros; both (B, 3, H, W) float32."""
    pixels = images_u8.float() / 255 * 2 - 1
    return pixels, torch.zeros_like(pixels)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as the denoiser sees them -> images (B, 3, 8h, 8w) uint8.

    One image at a time, because the decoder's activations at full size are the largest of all.
    """
    scale, shift = _scale_and_shift(vae)
    latents = latents.to(vae.device, torch.float32) / scale + shift
    images = []
    for z in latents.to(vae.dtype).split(1):
        pixels = vae.decode(z).sample.float()
        images.append(((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(images)


def build(config: Mapping[str, Any]) -> nn.Module:
    """AutoencoderKL from vae/config.json."""
    from diffusers import AutoencoderKL

    return cast(nn.Module, AutoencoderKL.from_config(dict(config)))


def predict(
    denoiser: Any,
    noisy_latents: Tensor,
    timestep: Tensor,
    conditions: Conditions,
    sizes: Tensor,
    guidance: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (B, 3, H, W) in [-1, 1] -> reconstruction (B, 3, H, W), and mean and log-variance of
    the unscaled latents, (B, C, H / 8, W / 8). No other argument is used.

    The latents are drawn with the default generator of the device, which the loop seeds. Compute
    dtype is the dtype of the weights: diffusers' layers do not cast.
    """
    posterior = denoiser.encode(noisy_latents.to(denoiser.dtype)).latent_dist
    mean, logvar = posterior.mean, posterior.logvar
    latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    return denoiser.decode(latents).sample, mean, logvar


AUTOENCODER = ModelSpec(
    family="autoencoder",
    class_name="AutoencoderKL",
    denoiser_folder="vae",
    objective="reconstruction",
    prediction="epsilon",  # not used by reconstruction
    build=build,
    predict=cast(Predict, predict),  # a triple, which the objective Reconstruction expects
    open_text_encoders=lambda folder, device, dtype: [],
    merge_text=lambda parts: {},
    empty_caption_is_zero=False,
    latent_multiple=downscale,
    input_shapes=lambda config, width, height: {"latents": (3, height, width)},
    adapter_targets={
        "attention": ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0"),
        "all-linear": ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0", "*.conv1", "*.conv2"),
    },
    timestep_sampling="uniform",
    has_guidance=False,
)


def _scale_and_shift(vae: Any) -> tuple[float, float]:
    config = vae.config
    return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)
